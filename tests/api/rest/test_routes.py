"""Promises of the REST API: the resources of version 1, and one shape for every error.

The application is the real one, over a real database, real checks and a real classifier; only Ray is not there.
"""

import json
import re
from collections.abc import AsyncGenerator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from chainfed_ray.activity import Activity
from chainfed_ray.api.rest.service import Service, listed_in
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import PartUnavailable, ServiceBusy
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.planning.dry_run import dry_run
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.fleet import AdmittedClients, LateClient, LateSite
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from tests.pools import Killed, dying
from tests.watching import wait_for


@pytest.fixture
def client(storage: Storage, store: JobStore) -> Iterator[TestClient]:
    async def check(spec: JobSpec, reads_anything: bool, tenant: str) -> None:
        prepare_job(spec, Path())

    async def plan(spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast:
        return dry_run(spec, at_once=1)

    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        classifier = Classifier(model.base, torch.float32)
        answers: list[list[float]] = classifier.probabilities(load_stack(storage.model(str(model.job))), texts).tolist()
        return answers

    async def embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
        raise NotImplementedError

    def write(model: ModelKey, prompt: object, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
        raise NotImplementedError

    async def broken() -> None:
        raise OSError("out of order")

    async def works() -> None:
        store.check()

    parts = {"database": works, "inference": broken}
    app = create_app(Service(store, check, plan, classify, embed, write, parts, listed_in(storage.job)))
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def small(document: dict[str, Any]) -> dict[str, Any]:
    """A job of one round."""
    document["rounds"] |= {"total": 1, "clients": 2}
    return document


def run(job: str, storage: Storage, store: JobStore) -> None:
    """What the controller and a coordinator do, here."""
    assert store.move(job, "running")
    run_queued_job(job, storage, in_this_process)


@pytest.mark.slow
def test_a_job_from_submission_to_an_answer(
    client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    created = client.post("/v1/jobs", json=small)
    assert created.status_code == 201
    job = created.json()["id"]
    assert created.headers["location"] == f"/v1/jobs/{job}"
    assert created.json()["spec"] == parse_job(small).document()
    assert client.get("/v1/models").json() == {"models": [], "object": "list", "data": [], "has_more": False}
    assert client.get(f"/v1/jobs/{job}/clients").json() == {"clients": [], "next": None}

    run(job, storage, store)
    done = client.get(f"/v1/jobs/{job}").json()
    assert (done["status"], done["error"]) == ("succeeded", None)
    assert done["progress"]["round"] == done["progress"]["total_rounds"] == 1
    phone = done["progress"]["memory"]["phone"]
    assert 0 < phone["peak"] <= phone["budget"]
    (memory,) = done["result"]["memory"]
    assert (memory["client_class"], memory["stage"], memory["turns"], memory["exceeded"]) == ("phone", 0, 2, 0)
    assert memory["peak_bytes"] == done["result"]["peak_bytes"]["phone"] == phone["peak"]
    assert memory["planned_bytes"] == phone["planned"]
    assert f'chainfed_client_memory_bytes{{class="phone",job="{job}",kind="peak"}} ' in client.get("/metrics").text
    assert done["result"]["classes"] == ["sea", "sky", "soil"]
    assert not storage.scratch(job).exists()

    first = client.get(f"/v1/jobs/{job}/clients?limit=3").json()
    rest = client.get(f"/v1/jobs/{job}/clients?after={first['next']}").json()
    assert ([found["client"] for found in first["clients"]], first["next"]) == (["phone-0", "phone-1", "phone-2"], 3)
    assert ([found["client"] for found in rest["clients"]], rest["next"]) == (["phone-3"], None)
    started = next(
        event["data"] for event in client.get(f"/v1/jobs/{job}/events").json()["events"] if event["kind"] == "started"
    )
    (plan,) = started["admitted"]
    assert (plan["client_class"], plan["clients"], plan["examples"]) == ("phone", 4, 96)
    assert all(found["plan"] == 0 and found["planned_bytes"] <= plan["planned_bytes"] for found in first["clients"])
    assert client.get("/v1/jobs/nothing/clients").status_code == 404
    came = LateClient(client="far-0", examples=9, longest=5, tokens=20, planned_bytes=7, plan=0)
    late = LateSite(client_class="far", site="far", clients=(came,), admitted=(AdmittedClients.model_validate(plan),))
    store.publish(job, "late-far", "late_site", late.model_dump(mode="json"))
    rest = client.get(f"/v1/jobs/{job}/clients?after={first['next']}").json()["clients"]
    assert [(found["client"], found["examples"], found["plan"]) for found in rest[1:]] == [("far-0", 9, 1)]
    assert client.get(f"/v1/jobs/{job}/clients?after=4").json() == {"clients": rest[1:], "next": None}

    model = client.get("/v1/models/tiny:tiny").json()
    assert (model["name"], model["job"], model["classes"]) == ("tiny:tiny", job, ["sea", "sky", "soil"])
    answer = client.post("/v1/classify", json={"model": "tiny:tiny", "texts": ["salt tide", "root"]}).json()
    assert answer["job"] == job
    for found in answer["results"]:
        assert found["scores"][found["label"]] == found["score"] == max(found["scores"].values())
        assert sum(found["scores"].values()) == pytest.approx(1)


@pytest.mark.slow
def test_the_served_model_is_the_judged_one(
    client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore, tmp_path: Path
) -> None:
    """The accuracy that the API's answers have on the test rows is the accuracy on the job's record."""
    test_rows = [json.loads(line) for line in Path(small["data"]["train"][5:]).read_text().splitlines()[::5]]
    held_out = tmp_path / "test.jsonl"
    held_out.write_text("\n".join(json.dumps(row) for row in test_rows))
    small["data"]["test"] = f"path:{held_out}"
    small["rounds"]["total"] = 3
    job = client.post("/v1/jobs", json=small).json()["id"]
    run(job, storage, store)
    texts = [row["text"] for row in test_rows]
    answers = client.post("/v1/classify", json={"model": "tiny:tiny", "texts": texts}).json()["results"]
    right = sum(answer["label"] == row["label"] for answer, row in zip(answers, test_rows, strict=True))
    assert right / len(texts) == client.get(f"/v1/jobs/{job}").json()["accuracy"]
    alone = client.post("/v1/classify", json={"model": "tiny:tiny", "texts": texts[3:4]}).json()["results"][0]
    assert alone["scores"] == pytest.approx(answers[3]["scores"], abs=1e-6)


@pytest.mark.slow
def test_a_run_that_was_killed_tells_its_story_once(
    small: dict[str, Any], storage: Storage, store: JobStore, tmp_path: Path
) -> None:
    small["rounds"]["total"] = 3
    spec = parse_job(small)
    whole, halved = store.submit(spec).id, store.submit(spec).id
    run(whole, storage, store)

    store.move(halved, "running")
    with pytest.raises(Killed):
        run_queued_job(halved, storage, lambda source, note: dying(LocalPool(source), turns=3))
    assert store.get(halved).status == "running"
    run_queued_job(halved, storage, in_this_process)
    told = {job: [event.kind for event in store.events(job)] for job in (whole, halved)}
    assert told[whole] == told[halved]
    assert told[whole].count("round") == 3
    stacks = [load_stack(storage.model(job)).stack.tensors() for job in (whole, halved)]
    assert all(torch.equal(tensor, stacks[1][name]) for name, tensor in stacks[0].items())


@pytest.mark.slow
def test_a_job_shows_what_it_is_busy_with_while_it_runs(
    client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    job = client.post("/v1/jobs", json=small).json()["id"]
    assert client.get(f"/v1/jobs/{job}").json()["activity"] is None
    seen: list[dict[str, Any]] = []

    class Watched(LocalPool):
        """Its second turn begins when the first one is on record as done."""

        def run(self, *arguments: Any) -> Any:
            for outcome in super().run(*arguments):
                yield outcome
                seen.append(wait_for(partial(self._training, outcome.place + 1), "activity"))

        @staticmethod
        def _training(done: int) -> dict[str, Any] | None:
            found: dict[str, Any] | None = client.get(f"/v1/jobs/{job}").json()["activity"]
            return found if found and found["done"] == done and "training" in found["what"] else None

    store.move(job, "running")
    run_queued_job(job, storage, lambda source, note: Watched(source))
    assert [activity["done"] for activity in seen] == [1, 2]
    assert [(activity["what"], activity["total"], activity["unit"]) for activity in seen] == [
        ("round 1 of 1: training", 2, "clients")
    ] * 2
    assert seen[0]["since"].endswith("Z")
    assert [activity["seconds_left"] for activity in seen] == [None, 0]
    done = client.get(f"/v1/jobs/{job}").json()
    assert (done["status"], done["activity"]) == ("succeeded", None)
    assert {event.kind for event in store.events(job)} == {
        "queued", "running", "started", "round", "finished", "succeeded",
    }  # fmt: skip


def test_a_stream_of_events_tells_what_goes_on_without_a_number(
    client: TestClient, small: dict[str, Any], store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the job ends as the stream looks again."""
    job, activity = store.submit(parse_job(small)).id, Activity(what="fitting the head", done=3, total=12)
    store.move(job, "running")
    store.note_activity(job, activity)
    look, looks = store.latest, [0]

    def looked(asked: list[str]) -> Any:
        found = look(asked)
        looks[0] += 1
        if looks[0] == 2:
            store.move(job, "failed", error={"message": "enough"})
        return found

    monkeypatch.setattr(store, "latest", looked)
    text = client.get(f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}).text
    told = events_of(text)
    assert [event["kind"] for event in told] == ["queued", "running", "activity", "failed"]
    assert told[2] == {"kind": "activity", "data": activity.model_dump(mode="json")}
    assert re.findall("^id: (.*)$", text, re.MULTILINE) == ["1", "2", "3"]


@pytest.mark.slow
def test_a_database_that_is_away_costs_a_job_its_activity_and_no_more(
    small: dict[str, Any], storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Activity] = []

    def away(self: JobStore, job: str, activity: Activity) -> None:
        refused.append(activity)
        raise OperationalError("update jobs", {}, ConnectionError("no answer"))

    monkeypatch.setattr(JobStore, "note_activity", away)
    job = store.submit(parse_job(small)).id
    run(job, storage, store)
    assert refused
    assert store.get(job).status == "succeeded"


@pytest.mark.slow
def test_a_job_that_fails_says_why(
    client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(Path(small["data"]["train"][5:]).read_bytes())
    small["data"]["train"] = f"path:{rows}"
    job = client.post("/v1/jobs", json=small).json()["id"]
    rows.unlink()
    run(job, storage, store)
    failed = client.get(f"/v1/jobs/{job}").json()
    assert failed["status"] == "failed"
    assert failed["error"]["problems"][0]["field"] == "data.train"
    assert client.get(f"/v1/jobs/{job}/events").json()["events"][-1]["data"] == failed["error"]


@pytest.mark.slow
def test_events_as_a_page_and_as_a_stream(
    client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    job = client.post("/v1/jobs", json=small).json()["id"]
    path = f"/v1/jobs/{job}/events"
    assert client.get(path).json()["finished"] is False
    run(job, storage, store)
    page = client.get(path).json()
    kinds = ["queued", "running", "started", "round", "finished", "succeeded"]
    assert [event["kind"] for event in page["events"]] == kinds
    assert (page["last"], page["finished"]) == (6, True)
    part = client.get(path, params={"after": 2, "limit": 2}).json()
    assert [event["seq"] for event in part["events"]] == [3, 4]
    assert part["finished"] is False

    wire = {"Accept": "text/event-stream"}
    streamed = client.get(path, headers=wire)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert events_of(streamed.text) == page["events"]
    resumed = client.get(path, headers=wire | {"Last-Event-ID": "4"})
    assert events_of(resumed.text) == page["events"][4:]
    assert client.get(path, headers=wire | {"Last-Event-ID": "6"}).status_code == 204
    for beyond in ("9223372036854775808", "9" * 20, "-1"):  # more than any database counts
        for refused in (
            client.get(path, params={"after": beyond}),
            client.get(path, headers={"Last-Event-ID": beyond}),
        ):
            assert (refused.status_code, refused.json()["type"]) == (422, "urn:chainfed:problem:invalid-request")


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream; each line must be one of the standard's fields."""
    assert all(line.partition(":")[0] in ("id", "event", "data", "") for line in text.splitlines())
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.slow
def test_lists_and_cancelling(client: TestClient, small: dict[str, Any], storage: Storage, store: JobStore) -> None:
    jobs = [client.post("/v1/jobs", json=small).json()["id"] for _ in range(3)]
    page = client.get("/v1/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in page["jobs"]] == jobs[:0:-1]
    assert client.get("/v1/jobs", params={"cursor": page["next"]}).json()["jobs"][0]["id"] == jobs[0]
    cancelled = client.post(f"/v1/jobs/{jobs[0]}/cancel")
    assert (cancelled.status_code, cancelled.json()["status"]) == (202, "cancelled")
    assert client.post(f"/v1/jobs/{jobs[0]}/cancel").status_code == 202
    store.move(jobs[1], "running")
    assert client.post(f"/v1/jobs/{jobs[1]}/cancel").json()["status"] == "cancelling"
    run(jobs[2], storage, store)
    refused = client.post(f"/v1/jobs/{jobs[2]}/cancel")
    assert (refused.status_code, refused.json()["type"]) == (409, "urn:chainfed:problem:job-conflict")
    assert [job["id"] for job in client.get("/v1/jobs", params={"status": "cancelled"}).json()["jobs"]] == [jobs[0]]


@pytest.mark.slow
def test_a_retried_submission_and_a_yaml_one(client: TestClient, small: dict[str, Any]) -> None:
    key = {"Idempotency-Key": "once"}
    first, second = (client.post("/v1/jobs", json=small, headers=key).json() for _ in range(2))
    assert first["id"] == second["id"]
    assert client.post("/v1/jobs", json={**small, "seed": 9}, headers=key).status_code == 409
    assert client.post("/v1/jobs", json=small, headers={"Idempotency-Key": ""}).status_code == 422
    text = "\n".join(f"{key}: {json.dumps(value)}" for key, value in small.items())
    by_yaml = client.post("/v1/jobs", content=text, headers={"Content-Type": "application/yaml"})
    assert by_yaml.json()["spec"] == first["spec"]


BAD = [
    ({"modle": 1}, "modle", "model"),
    ({"rounds": {"clients": "five"}}, "rounds.clients", "a whole number"),
    ({"rounds": {"clients": 99}}, "rounds.clients", "at most 4"),
    ({"fleet": {"clients": [{"name": "phone", "count": 4, "memory": "1KiB"}]}}, "fleet.clients", "or more"),
    ({"fleet": {"clients": [{"name": "phone", "count": 999, "memory": "64MiB"}]}}, "fleet.clients", "training rows"),
    ({"data": {"train": "path:/nowhere.jsonl"}}, "data.train", "exists"),
    ({"data": {"label": "class"}}, "data.label", "a column"),
    ({"data": {"train": "ftp:x"}}, "data.train", "builtin:docstrings"),
    ({"model": {"base": "path:/nowhere"}}, "model.base", "exists"),
    ({"chain": {"window": 9}}, "chain.window", "at most 4"),
    ({"chain": {"start": 3}}, "chain.start", "at most 2"),
    ({"name": "Not A Name"}, "name", "lower-case"),
]


@pytest.mark.parametrize(("change", "field", "expected"), BAD)
def test_a_bad_job_is_refused_with_its_field(
    client: TestClient, document: dict[str, Any], change: dict[str, Any], field: str, expected: str
) -> None:
    for section, values in change.items():
        inside = document.get(section)
        document[section] = {**inside, **values} if isinstance(inside, dict) else values
    refused = client.post("/v1/jobs", json=document)
    assert refused.status_code == 422
    problem = refused.json()
    assert refused.headers["content-type"] == "application/problem+json"
    assert (problem["type"], problem["status"]) == ("urn:chainfed:problem:invalid-job", 422)
    assert [(found["field"], expected in found["expected"]) for found in problem["errors"]] == [(field, True)]
    assert client.get("/v1/jobs").json()["jobs"] == []


@pytest.mark.parametrize(
    ("section", "key"),
    [("rounds", "total"), ("data", "max_length"), ("data", "label"), (None, "seed"), (None, "name"), (None, "x")],
)
def test_a_number_of_more_digits_than_python_reads_is_refused_with_its_field(
    client: TestClient, document: dict[str, Any], section: str | None, key: str
) -> None:
    (document[section] if section else document)[key] = "in this place"
    body = json.dumps(document).replace('"in this place"', "7" * 4001)
    refused = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert refused.status_code == 422
    assert [found["field"] for found in refused.json()["errors"]] == [f"{section}.{key}" if section else key]
    assert "777" in refused.json()["errors"][0]["value"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "options", "status", "slug"),
    [
        ("GET", "/v1/jobs/none", {}, 404, "job-not-found"),
        ("GET", "/v1/jobs/none/events", {}, 404, "job-not-found"),
        ("POST", "/v1/jobs/none/cancel", {}, 404, "job-not-found"),
        ("GET", "/v1/jobs?limit=0", {}, 422, "invalid-request"),
        ("GET", "/v1/jobs?status=odd", {}, 422, "invalid-request"),
        ("GET", "/v1/jobs?state=odd", {}, 422, "invalid-request"),
        ("GET", "/v1/jobs?label=team", {}, 422, "invalid-request"),
        ("GET", "/v1/jobs?cursor=none", {}, 422, "invalid-job"),
        ("POST", "/v1/jobs", {"content": b"{"}, 400, "bad-request"),
        ("POST", "/v1/jobs", {"content": b"\xff"}, 400, "bad-request"),
        (
            "POST",
            "/v1/jobs",
            {"content": b"{}", "headers": {"Content-Type": "text/plain"}},
            415,
            "unsupported-media-type",
        ),
        ("POST", "/v1/jobs", {"content": b"[]"}, 422, "invalid-job"),
        ("POST", "/v1/jobs", {"content": b'{"seed": 1, "seed": 2}'}, 422, "invalid-job"),
        ("POST", "/v1/jobs", {"content": b"[" * 100_000}, 400, "bad-request"),
        ("POST", "/v1/classify", {"json": {"model": "x:y", "texts": ["a"]}}, 404, "model-not-found"),
        ("POST", "/v1/classify", {"json": {"model": "x:y", "texts": []}}, 422, "invalid-request"),
        ("POST", "/v1/classify", {"json": {"model": 1}}, 422, "invalid-request"),
        ("POST", "/v1/classify", {"content": b"{"}, 400, "bad-request"),
        ("GET", "/nowhere", {}, 404, "not-found"),
        ("GET", "/v1/jobs/", {}, 404, "not-found"),
        ("DELETE", "/v1/jobs", {}, 405, "method-not-allowed"),
        ("GET", "/v1/jobs", {"headers": {"Host": "evil.example"}}, 421, "host-not-allowed"),
    ],
)
def test_every_error_has_one_shape(
    client: TestClient, method: str, path: str, options: dict[str, Any], status: int, slug: str
) -> None:
    headers = {"X-Request-ID": "mine", "Content-Type": "application/json", **options.pop("headers", {})}
    refused = client.request(method, path, headers=headers, **options)
    problem = refused.json()
    assert refused.status_code == problem["status"] == status
    assert refused.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:chainfed:problem:{slug}"
    assert problem["request_id"] == "mine"
    assert problem["instance"] == path.partition("?")[0]
    assert problem["detail"] == problem["error"]["message"]
    assert problem["error"]["code"] == slug.replace("-", "_")


def test_a_method_that_is_not_allowed_says_which_are(client: TestClient) -> None:
    assert client.delete("/v1/jobs").headers["allow"] == "GET, POST"
    assert client.put("/v1/models").headers["allow"] == "GET"


@pytest.mark.parametrize("error", [PoolTimeout(), OperationalError("select", {}, Exception("database is locked"))])
def test_a_database_that_does_not_answer_is_waited_for(
    client: TestClient, store: JobStore, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> None:
        raise error

    monkeypatch.setattr(store, "get", away)
    answer = client.get("/v1/jobs/any")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:chainfed:problem:database-unavailable")
    assert int(answer.headers["retry-after"]) > 0
    assert "nothing was changed" in answer.json()["detail"]


def test_a_commit_that_was_lost_is_not_said_to_have_changed_nothing(
    client: TestClient, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost(Exception):
        is_in_doubt = True

    def lost(*_: Any) -> None:
        raise OperationalError("commit", None, Lost())

    monkeypatch.setattr(store, "get", lost)
    answer = client.get("/v1/jobs/any")
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:chainfed:problem:database-unavailable")
    assert "not known whether the request was done" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("error", "status"), [(ServiceBusy("checks", 7), 429), (PartUnavailable("it", "ended", 7), 503)]
)
def test_what_cannot_be_done_now_may_be_asked_again(
    client: TestClient, document: dict[str, Any], error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_: object) -> None:
        raise error

    monkeypatch.setattr(f"{__name__}.prepare_job", busy)
    answer = client.post("/v1/jobs", json=document)
    assert (answer.status_code, answer.headers["retry-after"]) == (status, "7")
    assert answer.json()["detail"] == str(error)


def test_a_mistake_of_ours_is_logged_and_not_shown(client: TestClient, store: JobStore, caplog: Any) -> None:
    store.lines = lambda *_: 1 / 0  # type: ignore[method-assign,assignment,return-value]
    failed = client.get("/v1/jobs")
    assert (failed.status_code, failed.json()["type"]) == (500, "urn:chainfed:problem:internal-error")
    assert failed.headers["x-request-id"] == failed.json()["request_id"]
    assert failed.json()["request_id"] in caplog.text
    assert "division" not in failed.text


def test_health(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "checks": {}}
    ready = client.get("/readyz")
    assert ready.status_code == 503
    assert ready.json()["checks"] == {"database": "ok", "inference": "OSError; the service's log says more"}


@pytest.mark.slow
def test_the_schema_describes_a_job_file(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["components"]["schemas"]["JobSpec"]["properties"]) == set(JobSpec.model_fields)
