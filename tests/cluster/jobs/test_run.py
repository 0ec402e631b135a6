"""Promises of a queued job's run: a trouble outside is waited for, and only what is the job's own ends it."""

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from errno import EHOSTDOWN, EIO, ENODEV, ENOSPC, ENOTCONN, EROFS, ESTALE, ETIMEDOUT
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy import text as sql
from sqlalchemy.exc import InterfaceError, OperationalError

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.jobs.cleanup import fail, has_died_too_often
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.desk import Desk
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.errors import JobConflict, QuorumLost
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.reading import EVERYTHING, HubAway, ReadingRules
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.secret import secret_path
from chainfed_ray.records.states import Status
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app
from tests.builders import SPEC
from tests.pools import failing
from tests.watching import wait_for

RUN = "chainfed_ray.cluster.jobs.run"
CAUSE = {"client": None, "stage": None, "round": None, "message": "of the job"}
OF_THE_JOB = {"type": "ValueError", "message": "of the job", "cause": CAUSE}
FULL = OSError(ENOSPC, "No space left on device", "/data/jobs")


@pytest.fixture
def job(store: JobStore) -> str:
    made = store.submit(SPEC).id
    store.move(made, "running")
    return made


@pytest.fixture
def waits(job: str, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> list[JobRecord]:
    """The job's record at each wait. None lasts."""
    seen: list[JobRecord] = []
    monkeypatch.setattr(f"{RUN}.sleep", lambda seconds: seen.append(store.get(job)))
    return seen


def raising(*errors: Exception) -> Callable[..., NoReturn]:
    """In place of ``run_job``: each call raises the next of ``errors``."""
    left = iter(errors)

    def run_job(*_: Any, **__: Any) -> NoReturn:
        raise next(left)

    return run_job


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("trouble", [FULL, OSError(EROFS, "Read-only file system"), caused(ValueError("x"), FULL)])
def test_a_disk_that_fails_is_waited_for(
    trouble: Exception,
    job: str,
    storage: Storage,
    store: JobStore,
    waits: list[JobRecord],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{RUN}.run_job", raising(trouble, ValueError("of the job")))
    storage.scratch(job).mkdir(parents=True)
    run_queued_job(job, storage, in_this_process)
    (waiting,) = waits
    assert waiting.status == "running"
    assert waiting.activity is not None
    assert waiting.activity["what"] == "waiting for a disk"
    assert str(trouble.__cause__ or trouble) in waiting.activity["note"]
    assert not storage.scratch(job).exists(), "it may be what filled the disk"
    assert store.get(job).error == OF_THE_JOB


def test_clients_whose_disk_fails_are_waited_for(
    job: str, storage: Storage, store: JobStore, waits: list[JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They tell in words, so the disk is tried: here it fails for two more tries."""
    lost = QuorumLost("rounds 1 to 3", 2, {"phone-0": "OSError: no space left"})
    checks = iter([None, FULL, FULL, FULL, FULL])

    def check(_: Storage) -> None:
        if error := next(checks, None):
            raise error

    monkeypatch.setattr(f"{RUN}.run_job", raising(lost, lost))
    monkeypatch.setattr(Storage, "check", check)
    run_queued_job(job, storage, in_this_process)
    assert [record.status for record in waits] == ["running"] * 3
    ended = store.get(job)
    assert ended.error is not None
    assert ended.error["type"] == "QuorumLost", "the disk works, and it is lost again"


def test_so_are_clients_that_cannot_read_the_model(
    document: dict[str, Any], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, tried, waited = QuorumLost("rounds 1 to 3", 2, {"phone-0": "OSError: timed out"}), list[str](), list[str]()
    job = store.submit(parse_job(document)).id
    store.move(job, "running")

    def try_to_read(path: Path, of_model: bool) -> None:
        assert of_model == (str(path) in document["model"]["base"])
        tried.append(f"path:{path}")
        if len(tried) == 1:
            raise OSError(ETIMEDOUT, "Connection timed out", str(path))

    def wait(_: float) -> None:
        activity = store.get(job).activity
        waited.append(activity["note"] if activity else "")

    monkeypatch.setattr(f"{RUN}.run_job", raising(lost, ValueError("of the job")))
    monkeypatch.setattr(f"{RUN}.try_to_read", try_to_read)
    monkeypatch.setattr(f"{RUN}.sleep", wait)
    run_queued_job(job, storage, in_this_process)
    assert (len(waited), "Connection timed out" in waited[0]) == (1, True)
    assert {document["model"]["base"], document["data"]["train"]} == set(tried)
    assert store.get(job).error == OF_THE_JOB


def test_a_job_whose_data_is_away_begins_when_it_is_back(
    document: dict[str, Any], storage: Storage, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its root is an empty folder, as where a disk is not mounted."""
    root, rows = tmp_path / "mounted", Path(document["data"]["train"].removeprefix("path:"))
    root.mkdir()
    document["data"]["train"] = f"path:{root / rows.name}"
    document["data"]["label"] = "none"  # enough to see that its rows are read
    job = store.submit(parse_job(document), reads_anything=True).id
    store.move(job, "validating")
    waited = list[str]()

    def wait(_: float) -> None:
        activity = store.get(job).activity
        waited.append(activity["note"] if activity else "")
        if len(waited) == 12:
            shutil.copy(rows, root)

    monkeypatch.setattr(f"{RUN}.sleep", wait)
    run_queued_job(job, storage, in_this_process, rules=ReadingRules((root,)))
    assert (len(waited), {str(root) in note for note in waited}) == (12, {True})
    assert "data.label is 'none'" in str(store.get(job).error)


@pytest.mark.slow
def test_a_database_that_flaps_kills_no_coordinator(
    job: str, storage: Storage, store: JobStore, waits: list[JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = [kind("select 1", {}, ConnectionError("no answer")) for kind in (OperationalError, InterfaceError) * 4]
    monkeypatch.setattr(f"{RUN}.run_job", raising(*away, ValueError("of the job")))
    run_queued_job(job, storage, in_this_process)
    assert len(waits) == 8
    ended = store.get(job)
    assert (ended.restarts, ended.error) == (0, OF_THE_JOB)


@pytest.mark.slow
def test_the_end_of_the_whole_service_kills_no_job(
    job: str, storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(7):
        monkeypatch.setattr(f"{RUN}.run_job", raising(KeyboardInterrupt()))  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            run_queued_job(job, storage, in_this_process)
    assert (store.get(job).status, store.get(job).restarts) == ("running", 0)


@pytest.mark.parametrize("asked", ["pausing", "cancelling", "drain"])
def test_a_job_that_waits_for_its_sites_stops_at_once(
    storage: Storage, store: JobStore, document: dict[str, Any], asked: Status | Literal["drain"]
) -> None:
    document["fleet"]["clients"] += [{"name": "clinic", "memory": "64MiB", "site": "far", "data": "site:rows.jsonl"}]
    document["rounds"]["deadline"] = "15s"
    job = store.submit(parse_job(document)).id
    store.move(job, "validating")
    desk, mailbox = Desk(job, storage), Mailbox(storage)
    with ThreadPoolExecutor() as executor, closing(mailbox):
        ended = executor.submit(run_queued_job, job, storage, in_this_process, sites=desk)
        wait_for(lambda: mailbox.waiting({"far"}) or ended.done(), "survey")
        if asked == "drain":
            Drain(storage.root).begin()
        else:
            store.move(job, asked)
        ended.result(timeout=10)
    goes_on = {"pausing": "paused", "cancelling": "cancelling", "drain": "validating"}
    assert (store.get(job).status, store.get(job).error) == (goes_on[asked], None)


def test_a_conflict_that_nobody_thought_of_ends_the_job(
    job: str, storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be run again and again: only who waits for sites stops without an end."""
    monkeypatch.setattr(f"{RUN}.run_job", raising(JobConflict(job, "running", "be two jobs")))
    run_queued_job(job, storage, in_this_process)
    ended = store.get(job)
    assert (ended.status, ended.error and ended.error["type"]) == ("failed", "JobConflict")


def test_a_broken_folder_is_the_job_s_own(job: str, storage: Storage, store: JobStore) -> None:
    (storage.root / "jobs").mkdir()
    storage.job(job).write_text("a file where a folder is meant")
    run_queued_job(job, storage, in_this_process)
    ended = store.get(job)
    assert (ended.status, ended.error and ended.error["type"]) == ("failed", "FileExistsError")


@pytest.mark.slow
def test_a_job_whose_clients_all_fail_names_the_first_of_them(
    document: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    document["rounds"] |= {"quorum": 2}
    job = store.submit(parse_job(document)).id
    store.move(job, "validating")
    run_queued_job(job, storage, lambda source, note: failing(LocalPool(source), "out of paper"))
    ended = store.get(job)
    assert ended.error is not None
    cause = ended.error["cause"]
    assert (ended.status, ended.error["type"]) == ("failed", "QuorumLost")
    assert (cause["stage"], cause["round"], cause["message"]) == (1, 1, "out of paper")
    assert cause["client"].startswith("phone-")
    assert store.events(job)[-1].data == ended.error


def test_a_job_that_is_not_valid_fails_while_it_is_validated(
    document: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    job = store.submit(parse_job({**document, "data": {**document["data"], "label": "none"}})).id
    store.move(job, "validating")
    run_queued_job(job, storage, in_this_process)
    assert [event.kind for event in store.events(job)] == ["queued", "validating", "failed"]
    assert "data.label is 'none'" in str(store.get(job).error)


@pytest.mark.slow
def test_a_file_that_alone_does_not_work_fails_its_job_after_some_tries(
    job: str, storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk works otherwise. A job that waited for its file for ever would hold the place of others."""
    waited = list[float]()
    monkeypatch.setattr(f"{RUN}.sleep", waited.append)
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[OSError(EIO, "Input/output error", "/data/jobs/x")] * 9))
    run_queued_job(job, storage, in_this_process)
    ended = store.get(job)
    assert (ended.status, waited) == ("failed", [5.0] * ((5 + 10 + 20 + 40 + 80 + 160 + 320) // 5))
    assert ended.error is not None
    assert ended.error["message"] == "[Errno 5] Input/output error: '/data/jobs/x'"


@pytest.mark.slow
@pytest.mark.parametrize("number", [ENOSPC, ETIMEDOUT, EHOSTDOWN, ENODEV])
def test_a_disk_that_is_full_or_away_is_waited_for_however_long(
    number: int, job: str, storage: Storage, store: JobStore, waits: list[JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    trouble = OSError(number, os.strerror(number), "/data/rows.csv")
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[trouble] * 10, ValueError("of the job")))
    run_queued_job(job, storage, in_this_process)
    assert len(waits) == (5 + 10 + 20 + 40 + 80 + 160 + 4 * 320) // 5, (
        "less and less often, where the disk seems to work"
    )
    assert store.get(job).error == OF_THE_JOB


@pytest.fixture
def reading(document: dict[str, Any], store: JobStore, tmp_path: Path) -> tuple[str, Path]:
    """A job at work, and the file that it reads, in a folder of its own; and each time its coordinator gets EIO from it."""
    rows = Path(document["data"]["train"].removeprefix("path:"))
    folder = tmp_path / "disk"
    folder.mkdir()
    document["data"] = {**document["data"], "train": f"path:{shutil.copy(rows, folder)}"}
    job = store.submit(parse_job(document), reads_anything=True).id
    store.move(job, "running")
    return job, folder / rows.name


@pytest.mark.slow
@pytest.mark.parametrize("number", [EIO, ESTALE, ETIMEDOUT])
@pytest.mark.parametrize("by_root", [True, False])
def test_a_job_waits_as_long_as_the_whole_disk_with_its_data_is_away(
    by_root: bool,
    number: int,
    reading: tuple[str, Path],
    storage: Storage,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (job, rows), scandir, waited = reading, os.scandir, list[float]()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        assert str(rows) in str(store.get(job).activity)
        if len(waited) == 200:
            monkeypatch.setattr("os.scandir", scandir)

    def away(path: Any = ".") -> Any:
        if Path(path) == rows.parent:
            raise OSError(number, os.strerror(number))
        return scandir(path)

    trouble = OSError(number, os.strerror(number), f"path:{rows}")
    monkeypatch.setattr("os.scandir", away)
    monkeypatch.setattr(f"{RUN}.sleep", wait)
    monkeypatch.setattr(f"{RUN}.run_job", raising(trouble, ValueError("of the job")))
    run_queued_job(job, storage, in_this_process, rules=ReadingRules((rows.parent,) if by_root else None))
    assert (set(waited), len(waited)) == ({5.0}, 200), "it runs again once, when the disk is back"
    assert store.get(job).error == OF_THE_JOB


@pytest.mark.slow
@pytest.mark.parametrize("by_root", [True, False])
def test_a_file_that_alone_is_broken_is_not_waited_for_without_an_end(
    by_root: bool, reading: tuple[str, Path], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job, rows), stat, waited = reading, os.stat, list[float]()

    def broken(path: Any, *rest: Any, **more: Any) -> Any:
        if isinstance(path, str | Path) and Path(path) == rows:
            raise OSError(EIO, "Input/output error", str(rows))
        return stat(path, *rest, **more)

    monkeypatch.setattr("os.stat", broken)
    monkeypatch.setattr(f"{RUN}.sleep", waited.append)
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[OSError(EIO, "Input/output error", f"path:{rows}")] * 8))
    run_queued_job(job, storage, in_this_process, rules=ReadingRules((rows.parent,) if by_root else None))
    assert (store.get(job).status, sum(waited)) == ("failed", 635)


@pytest.mark.slow
def test_a_file_that_is_back_is_noticed_within_seconds(
    reading: tuple[str, Path], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job, rows), waited, is_back = reading, list[float](), False

    def try_to_read(path: Path, of_model: bool) -> None:
        if path == rows and not is_back:
            raise OSError(EIO, "Input/output error")

    def wait(seconds: float) -> None:
        nonlocal is_back
        waited.append(seconds)
        is_back = sum(waited) == 5 + 10 + 20 + 40 + 80 + 15

    trouble = OSError(EIO, "Input/output error", f"path:{rows}")
    monkeypatch.setattr(f"{RUN}.try_to_read", try_to_read)
    monkeypatch.setattr(f"{RUN}.sleep", wait)
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[trouble] * 6, ValueError("of the job")))
    run_queued_job(job, storage, in_this_process, rules=ReadingRules((rows.parent,)))
    assert (store.get(job).error, sum(waited)) == (OF_THE_JOB, 170), "of the sixth wait, of 160 s, no more than 15"


@pytest.mark.slow
@pytest.mark.parametrize("disk_works", [True, False])
@pytest.mark.parametrize("asked", ["pausing", "cancelling", "drain"])
def test_a_job_that_waits_for_a_disk_stops_within_seconds(
    asked: Status | Literal["drain"],
    disk_works: bool,
    job: str,
    storage: Storage,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited, check = list[float](), Storage.check

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) == 5 + 10 + 20 + 5 and not disk_works:
            monkeypatch.setattr(Storage, "check", raising(*[FULL] * 99))
        if sum(waited) == 5 + 10 + 20 + 15:
            if asked == "drain":
                Drain(storage.root).begin()
            else:
                store.move(job, asked)

    monkeypatch.setattr(f"{RUN}.sleep", wait)
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[OSError(EIO, "Input/output error", "/data/jobs/x")] * 8))
    run_queued_job(job, storage, in_this_process)
    monkeypatch.setattr(Storage, "check", check)
    assert sum(waited) == 50, "of the wait of 40 s, 15"
    goes_on = {"pausing": "paused", "cancelling": "cancelling", "drain": "running"}
    assert store.get(job).status == goes_on[asked]


@pytest.mark.slow
def test_the_hub_is_waited_for_and_named(
    job: str, storage: Storage, store: JobStore, waits: list[JobRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = HubAway(ETIMEDOUT, "status 503", "hf:org/x")
    monkeypatch.setattr(f"{RUN}.run_job", raising(*[away] * 9, ValueError("of the job")))
    run_queued_job(job, storage, in_this_process)
    said = {"what": "waiting for the hub", "note": "the hub does not answer (status 503): hf:org/x"}
    assert all(record.activity is not None and said.items() <= record.activity.items() for record in waits)
    assert store.get(job).error == OF_THE_JOB


def test_a_job_whose_document_cannot_be_read_fails_and_says_so(storage: Storage, store: JobStore) -> None:
    job = store.submit(SPEC).id
    spoil(storage, job, "spec", '{"name": ')
    store.move(job, "validating")
    run_queued_job(job, storage, in_this_process)
    ended = store.get(job)
    assert (ended.status, ended.spec) == ("failed", {})
    assert ended.error is not None
    assert "what the database has of it cannot be read" in ended.error["message"]


def test_a_job_whose_coordinators_all_die_fails_before_anything_else_is_loaded(
    job: str, storage: Storage, store: JobStore
) -> None:
    assert [has_died_too_often(job, store, storage) for _ in range(4)] == [False] * 4
    store.publish(job, "round-0", "round", {})  # a round in between
    assert [has_died_too_often(job, store, storage) for _ in range(5)] == [False] * 4 + [True]
    ended = store.get(job)
    assert ended.error is not None
    assert (ended.status, ended.error["type"]) == ("failed", "CoordinatorLost")
    assert "died 5 times" in ended.error["message"]
    assert ended.error["cause"]["message"] == ended.error["message"]


def spoil(storage: Storage, job: str, column: str, text: str) -> None:
    """Write something else than JSON into the row of a job."""
    engine = create_engine(storage.database)
    with engine.begin() as connection:
        connection.execute(sql(f"update jobs set {column} = :text where id = :job"), {"text": text, "job": job})
    engine.dispose()


@pytest.mark.slow
@pytest.mark.parametrize("text", ['{"name": ', "[]", "5", "null"])
@pytest.mark.parametrize("column", ["spec", "result", "error", "activity"])
def test_a_document_that_cannot_be_read_is_the_trouble_of_its_job_alone(
    column: str, text: str, storage: Storage, store: JobStore
) -> None:
    bad, good = store.submit(SPEC).id, store.submit(SPEC).id
    for job in (bad, good):
        store.move(job, "running")
        store.move(job, "succeeded", result={"classes": ["a"], "accuracy": 0.5})
    spoil(storage, bad, column, text)
    with TestClient(an_app(store), "http://localhost") as client:
        for path in ("/v1/jobs", f"/v1/jobs/{bad}", "/v1/models", "/v1/models/minilm", "/metrics"):
            assert client.get(path).status_code == 200, path
        assert [job["id"] for job in client.get("/v1/jobs").json()["jobs"]] == [good, bad]
        assert client.get("/v1/models/minilm:tiny").json()["job"] == good


@pytest.mark.slow
def test_a_job_with_a_key_reads_what_the_rules_name_and_one_without_everything(
    document: dict[str, Any], storage: Storage, store: JobStore, tiny_model_folder: Path, tiny_data: Path
) -> None:
    document["rounds"] |= {"total": 1, "clients": 2}
    roots = ReadingRules((tiny_data.parent,), (tiny_model_folder.parent,))
    for reads_anything, rules, refused in (
        (True, EVERYTHING, None),
        (False, EVERYTHING, "CHAINFED_MODEL_ROOTS"),
        (False, ReadingRules(model_roots=roots.model_roots), "CHAINFED_DATA_ROOTS"),
        (False, roots, None),
        (True, ReadingRules((storage.root,)), "CHAINFED_DATA_ROOTS"),
    ):
        job = store.submit(parse_job(document), reads_anything=reads_anything).id
        store.move(job, "running")
        run_queued_job(job, storage, in_this_process, rules=rules)
        ended = store.get(job)
        assert ended.status == ("failed" if refused else "succeeded"), ended.error
        assert refused is None or refused in str(ended.error)


def test_a_job_that_is_deleted_as_soon_as_it_is_over_is_let_go(
    job: str, storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process has looked at it before it ended, and looks again."""
    move = JobStore.move

    def and_delete(self: JobStore, job: str, to: Status, **more: Any) -> bool:
        moved = move(self, job, to, **more)
        if to == "failed":
            delete(store, job)
            store.deletions.purge(job)
        return moved

    monkeypatch.setattr(JobStore, "move", and_delete)
    monkeypatch.setattr(f"{RUN}.run_job", raising(ValueError("of the job")))
    run_queued_job(job, storage, in_this_process)
    run_queued_job(job, storage, in_this_process)  # by a process that Ray makes again
    assert store.page() == []


def test_a_secret_is_erased_before_a_job_fails(
    job: str, storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the store of its commits is away, the job has not failed yet: whoever counts its deaths comes again."""
    secret = CommitLog(storage.job(job)).secret()
    away = OSError(ENOTCONN, "the object store does not answer")

    def is_away(*_: object) -> NoReturn:
        raise away

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "erase_secret", is_away)
        with pytest.raises(OSError, match="does not answer"):
            fail(job, ValueError("it died"), store, storage)
        assert store.get(job).status == "running"
        assert CommitLog(storage.job(job)).secret() == secret
    with monkeypatch.context() as patch:
        patch.setattr(Mailbox, "forget", is_away)
        with pytest.raises(OSError, match="does not answer"):
            fail(job, ValueError("it died"), store, storage)
        assert not secret_path(storage.job(job)).exists()
    fail(job, ValueError("it died"), store, storage)
    assert store.get(job).status == "failed"
