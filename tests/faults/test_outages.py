"""Promise: a database or an object store that stops, or hangs, in any phase of a job is waited for, and nobody has to help.

The servers are real ones: PostgreSQL, and an S3 server. Each is stopped and started again, and frozen and thawed, while a job
of the service is submitted, validated, trained, committed and finished. The job ends with the bits of an undisturbed one.
Whoever asks meanwhile for what is away is told so in words, and when to ask again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import httpx
import pytest

from chainfed_ray.api.rest.errors import MEDIA_TYPE
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.states import FINISHED
from tests import postgres
from tests import s3 as s3_server
from tests.builders import a_document, assert_same
from tests.lacking import without
from tests.services import Running
from tests.watching import wait_for

PHASES = ("submitting", "validating", "training", "committing", "finishing")
ROUNDS = 3
REFUSED_SECONDS = 150.0  # until a server that hangs is taken for away, also by who waits behind others
SHORT_SECONDS = 5.0  # of a hang after which nobody has given up
pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Outage:
    """How a server is away, and comes back; and a path that needs it."""

    begin: Callable[[], None]
    end: Callable[[], None]
    path: str


@dataclass(frozen=True)
class Stored:
    """A service with both servers, its records, and what an undisturbed job of it has come to."""

    database: postgres.Server
    objects: s3_server.Server
    storage: Storage
    jobs: JobStore
    http: httpx.Client
    document: dict[str, Any]
    upload: str

    def outage(self, server: str, how: str) -> Outage:
        """An outage of one of the servers. How much has come of an upload is asked of the object store each time."""
        one: Any = self.database if server == "PostgreSQL" else self.objects
        path = "/v1/jobs" if server == "PostgreSQL" else f"/v1/uploads/{self.upload}"
        if how == "hangs":
            return Outage(one.freeze, one.thaw, path)
        return Outage(one.stop, one.start if server == "PostgreSQL" else one.start_again, path)

    def submitted(self, name: str) -> str:
        """The id of a job that is submitted until it is accepted, as who asks is told to."""
        headers = {"Idempotency-Key": name}
        while True:
            with suppress(httpx.ReadTimeout):
                answer = self.http.post("/v1/jobs", json=self.document | {"name": name}, headers=headers)
                if answer.is_success:
                    return str(answer.json()["id"])
                assert is_refused(answer)
                sleep(int(answer.headers["retry-after"]))

    def rounds(self, job: str) -> int:
        """How many rounds of a job were told."""
        return len(self.jobs.of_kind(job, "round"))

    def ended(self, job: str) -> JobRecord:
        """A job, once it is over. The test waits for the servers as well."""

        def over() -> JobRecord | None:
            with suppress(*NO_ANSWER):
                record = self.jobs.get(job)
                return record if record.status in FINISHED else None
            return None

        record: JobRecord = wait_for(over, "end", 300)
        return record

    def stack(self, job: str) -> Tensors:
        """The tensors of a job's model."""
        return load_stack(self.storage.model(job)).stack.tensors()


@pytest.fixture(scope="module")
def stored(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    folder = tmp_path_factory.mktemp("outages")
    programs, program = postgres.installed(), s3_server.installed()
    if programs is None or program is None:
        without("a PostgreSQL server or the S3 server of the tests is not installed")
    with ExitStack() as stack:
        database = stack.enter_context(postgres.server(programs))
        objects = stack.enter_context(s3_server.server(program, folder / "recording"))
        url = objects.url("outages")
        settings = {"CHAINFED_STORAGE": url, "CHAINFED_DATABASE": database.url, "CHAINFED_CACHE": str(folder / "cache")}
        service = stack.enter_context(Running(folder / "unused", settings=settings))
        storage = Storage.at(folder / "watched", database.url, url=url)
        jobs = stack.enter_context(closing(JobStore(database.url, existing=True)))
        http = stack.enter_context(httpx.Client(base_url=service.address, timeout=REFUSED_SECONDS, trust_env=False))
        document = a_document(tiny_model_folder, tiny_data)
        document["rounds"] |= {"total": ROUNDS}
        begun = http.post("/v1/uploads", json={"name": "rows.csv", "bytes": 1, "sha256": 64 * "0"})
        yield Stored(database, objects, storage, jobs, http, document, begun.json()["id"])


@pytest.fixture(scope="module")
def undisturbed(stored: Stored) -> str:
    """A job that met no outage."""
    job = stored.submitted("undisturbed")
    assert stored.ended(job).status == "succeeded"
    return job


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["stops", "hangs"])
@pytest.mark.parametrize("server", ["PostgreSQL", "S3"])
def test_an_outage_is_waited_for(server: str, how: str, phase: str, stored: Stored, undisturbed: str) -> None:
    outage = stored.outage(server, how)
    name = f"{server}-{how}-{phase}".lower()
    with ThreadPoolExecutor(1) as threads:
        if phase == "submitting":
            outage.begin()
            submitting = threads.submit(stored.submitted, name)
        else:
            submitting = threads.submit(stored.submitted, name)
            begin_in(phase, stored, submitting.result(), outage)
        try:
            if how == "stops" or phase == "training":  # after a while, one that hangs is taken for away as well
                wait_for(lambda: is_refused(stored.http.get(outage.path)), "refusal", REFUSED_SECONDS)
            else:
                with suppress(httpx.ReadTimeout):
                    stored.http.get(outage.path, timeout=SHORT_SECONDS)
        finally:
            outage.end()
        job = submitting.result()
    record = stored.ended(job)
    assert record.status == "succeeded", record.error
    events = stored.jobs.of_kind(job, "round")
    assert [event.data["index"] for event in events] == list(range(ROUNDS))
    assert not any(event.data["failed_turns"] for event in events)
    assert_same(stored.stack(job), stored.stack(undisturbed))
    wait_for(lambda: stored.http.get(outage.path).is_success, "answer", 60)


def begin_in(phase: str, stored: Stored, job: str, outage: Outage) -> None:
    """Begin an outage as soon as the job is in a phase. It commits when it puts files of a round into the object store."""
    if phase == "committing":
        begun = Event()

        def heard(sent: bytes) -> None:
            if not begun.is_set() and sent.startswith(b"PUT ") and job.encode() in sent and stored.rounds(job):
                begun.set()
                outage.begin()

        stored.objects.door.heard = heard
        try:
            assert begun.wait(120), "it commits"
        finally:
            stored.objects.door.heard = lambda _: None
        return
    reached = {
        "validating": lambda: stored.jobs.get(job).status != "queued",
        "training": lambda: stored.rounds(job),
        "finishing": lambda: stored.rounds(job) == ROUNDS,
    }
    wait_for(reached[phase], phase)
    outage.begin()


def is_refused(answer: httpx.Response) -> bool:
    """Whether an answer says that something is away, and when to ask again. Any other error fails the test."""
    if answer.is_success:
        return False
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    assert int(answer.headers["retry-after"]) > 0
    return True
