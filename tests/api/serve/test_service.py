"""Promises of the whole service, over its front door: what `chainfed serve` starts, spoken to by `chainfed`'s other commands.

One service for the file: a Ray cluster, Ray Serve with HAProxy, SQLite, in a process of its own. It has no key until the last
tests, which are of keys and of two tenants.
"""

import json
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from rich.console import Console

from chainfed_ray.activity import Activity
from chainfed_ray.api.command.following import follow
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import (
    AccessDenied,
    InvalidJob,
    JobConflict,
    JobFailed,
    JobNotFound,
    ModelNotFound,
)
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import Piece, Sampling
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, assert_same, run
from tests.causal import causal_folder
from tests.collector import Collector, collector
from tests.project import COMMAND
from tests.services import Running, listening
from tests.watching import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as started:
        yield started


@pytest.fixture(scope="module")
def service(storage: Path, spans: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """It reads what tests write, and nothing else. Its requests and jobs are traced."""
    roots = str(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CHAINFED_DATA_ROOTS", roots)
        environment.setenv("CHAINFED_MODEL_ROOTS", roots)
        with Running(storage, settings=spans.settings) as running:
            yield running


def test_a_service_for_the_network_needs_a_key(tmp_path: Path) -> None:
    """Without one it is refused before anything starts."""
    environment = {**os.environ, "CHAINFED_STORAGE": str(tmp_path / "storage")}
    command = [*COMMAND, "serve", "--host", "0.0.0.0", "--port", "65001"]
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert refused.returncode == 1
    assert "error: --host is '0.0.0.0'; expected 127.0.0.1, as long as no key was made" in refused.stderr


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        (b"x-request-id", b"\xff", 200),  # another id is made
        (b"x-request-id", b"a\xfe-" * 100, 200),
        (b"idempotency-key", b"\x7f", 400),
        (b"authorization", b"Bearer \x01", 400),
    ],
)
def test_a_header_that_is_no_text_is_answered_as_the_api_does(
    service: Running, header: bytes, value: bytes, status: int
) -> None:
    """Such a request does not reach our API, or Ray Serve fails at it before."""
    with httpx.Client(base_url=service.address, trust_env=False) as http:
        answer = http.get("/v1/jobs", headers=[(header, value)])
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == ("application/json" if status == 200 else "application/problem+json")
    assert answer.headers.get("x-request-id", "none").isascii()


def test_a_job_over_the_command_line(service: Running, document: dict[str, Any], tmp_path: Path) -> None:
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump({**document, "name": "first"}))
    code, done = service.chainfed("submit", str(job_file), "--watch")
    assert (code, done["status"], done["progress"]["round"]) == (0, "succeeded", 4)
    code, listed = service.chainfed("list")
    assert [job["id"] for job in listed["jobs"]] == [done["id"]]
    code, answer = service.chainfed("predict", "tiny:first", "salt tide wave", "worm seed root")
    assert (code, [found["label"] for found in answer["results"]]) == (0, ["sea", "soil"])
    many = service.client.finish_json(exchanges.labels("tiny:first", ["salt tide wave"] * 300 + ["worm seed root"]))[
        "results"
    ]
    assert [found["label"] for found in many] == ["sea"] * 300 + ["soil"]
    long = service.client.finish_json(exchanges.labels("tiny:first", ["salt tide wave " * 6000] * 8))["results"]
    assert [found["label"] for found in long] == ["sea"] * 8, "of more characters than one request may have"
    exits = [model["name"] for model in service.client.json(calls.list_models())["models"] if model["layers"]]
    assert exits == ["tiny:first#layers=3"]
    assert service.client.finish_json(exchanges.labels(exits[0], ["salt tide wave"]))["model"] == exits[0]
    code, refused = service.chainfed("predict", "tiny:none", "x")
    assert (code, refused["error"]["message"]) == (
        1,
        "there is no model 'tiny:none'; did you mean tiny? Served now: tiny, tiny:first",
    )
    code, refused = service.chainfed("cancel", done["id"])
    assert (code, refused["error"]["type"]) == (1, "JobConflict")


def test_a_language_model_from_its_chats_to_its_words(service: Running, storage: Path, tmp_path: Path) -> None:
    base = causal_folder("llama", tmp_path / "teller", chat=True)
    chats = [
        [{"role": "user", "content": f"{place}?"}, {"role": "assistant", "content": "tide"}] for place in range(60)
    ]
    rows = tmp_path / "chats.jsonl"
    rows.write_text("\n".join(json.dumps({"chat": chat}) for chat in chats))
    job = service.client.json(
        calls.submit_job(
            {
                "name": "chats",
                "model": {"base": f"path:{base}", "task": "causal-lm"},
                "data": {"train": f"path:{rows}", "messages": "chat", "max_length": 64},
                "fleet": {"clients": [{"name": "phone", "count": 3, "memory": "64MiB"}]},
                "chain": {"window": 1, "start": 0, "adapter": {"bottleneck": 8}},
                "rounds": {"total": 4, "clients": 2, "batch_size": 8, "learning_rate": 0.02},
            }
        )
    )["id"]
    heard: list[Activity] = []
    events = list(service.client.stream_json(exchanges.events(job, listen=heard.append)))
    assert {activity.what for activity in heard} >= {"starting the process of the coordinator"}
    assert all(0 <= activity.done <= activity.total for activity in heard if activity.total)
    assert service.client.json(calls.get_job(job))["activity"] is None
    assert events[-1]["kind"] == "succeeded"
    judged = [found for event in events if (found := event["data"].get("evaluation"))]
    assert len(judged) == 3, "after each of two stages, and at the end on the test rows"
    for evaluation in judged:
        assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["loss"]))
        # A model as small as this may find all the room it needs in what its process holds already.
        assert evaluation["peak_bytes"] <= evaluation["planned_bytes"]
        assert evaluation["peak_bytes"] < evaluation["process_bytes"]
    assert judged[1]["loss"] < judged[0]["loss"]
    greedy = {"max_tokens": 8, "temperature": 0}
    answer = service.chainfed("complete", "teller:chats", "7?", "--max-tokens", "8", "--temperature", "0")[1]
    told: list[str] = [choice["text"] for choice in answer["choices"]]
    assert told == [
        "".join(
            piece["text"] for piece in service.client.stream_json(exchanges.texts("teller:chats", ["7?"], **greedy))
        )
    ]
    pieces: list[Piece] = []
    saved = load_stack(storage / "jobs" / job / "model")
    Generator(LanguageModel(f"path:{base}", torch.float32)).write(saved, "7?", Sampling(**greedy), pieces.append)
    assert told == ["".join(piece.text for piece in pieces)]

    cut = service.client.json(calls.completions("teller:chats#layers=1", ["7?"], **greedy))
    pieces.clear()
    saved = load_stack(storage / "jobs" / job / "exit-1")
    Generator(LanguageModel(f"path:{base}", torch.float32, 1)).write(saved, "7?", Sampling(**greedy), pieces.append)
    assert [choice["text"] for choice in cut["choices"]] == ["".join(piece.text for piece in pieces)]


def test_killed_in_the_middle_and_it_ends_where_it_would_have(
    service: Running, storage: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    """One process after the other, each after a round."""
    document["name"] = "killed"
    document["rounds"] |= {"total": 6, "quorum": 1}
    job = service.client.json(calls.submit_job(document))["id"]
    events = service.client.stream_json(exchanges.events(job))
    for process in ("CoordinatorActor", "ControllerActor"):
        assert next(event for event in events if event["kind"] == "round")
        wait_for(lambda process=process: service.processes(process), process)[0].kill()
    kinds = [event["kind"] for event in service.client.stream_json(exchanges.events(job))]
    assert kinds == ["queued", "validating", "running", "started", *["round"] * 6, "finished", "succeeded"]
    assert service.client.json(calls.get_job(job))["model"] == "tiny:killed"
    _, expected = run(a_job(document, tmp_path), tmp_path / "log")
    assert_same(load_stack(storage / "jobs" / job / "model").stack.tensors(), expected)
    wait_for(lambda: not service.processes("CoordinatorActor"), "end of the coordinator")
    wait_for(lambda: not service.processes("ClientActor"), "end of the clients")
    assert not (storage / "scratch" / job).exists()


def test_cancelling_ends_the_processes(service: Running, document: dict[str, Any]) -> None:
    document["rounds"] |= {"total": 500}
    job, waiting = (service.client.json(calls.submit_job(document))["id"] for _ in range(2))
    next(event for event in service.client.stream_json(exchanges.events(job)) if event["kind"] == "round")
    assert service.client.json(calls.get_job(waiting))["status"] == "queued"
    shown = StringIO()
    with ThreadPoolExecutor(max_workers=1) as thread:
        watching = thread.submit(follow, service.client, waiting, parse_job(document), Console(file=shown, width=80))
        try:
            words = f"In the queue. Before it: {job} (running)."
            wait_for(lambda: words in " ".join(shown.getvalue().split()), "word of the job before it")
        finally:
            assert service.client.json(calls.cancel_job(waiting))["status"] == "cancelled"
        with pytest.raises(JobFailed, match="cancelled"):
            watching.result()
    service.client.json(calls.cancel_job(job))
    kinds = [event["kind"] for event in service.client.stream_json(exchanges.events(job))]
    assert "cancelling" in kinds
    assert kinds[-1] == "cancelled"
    wait_for(lambda: not service.processes("ClientActor"), "end of the clients")


def test_the_client_raises_what_the_service_means(service: Running, document: dict[str, Any]) -> None:
    parts = ("database", "storage", "controller", "inference")
    assert service.client.json(calls.readyz())["checks"] == dict.fromkeys(parts, "ok")
    with pytest.raises(InvalidJob, match=r"data\.label is 'none'; expected a column"):
        service.client.json(calls.submit_job({**document, "data": {**document["data"], "label": "none"}}))
    with pytest.raises(JobNotFound):
        service.client.json(calls.get_job("none"))
    with pytest.raises(JobNotFound):
        next(service.client.stream_json(exchanges.events("none")))
    with pytest.raises(ModelNotFound):
        service.client.finish_json(exchanges.labels("none:none", ["x"]))
    done = next(job["id"] for job in service.client.json(calls.list_jobs())["jobs"] if job["status"] == "succeeded")
    with pytest.raises(JobConflict, match="is succeeded; it cannot be cancelled"):
        service.client.json(calls.cancel_job(done))
    answer = httpx.get(f"{service.address}/v1/jobs/none", headers={"X-Request-ID": "mine"})
    assert (answer.headers["x-request-id"], answer.json()["request_id"]) == ("mine", "mine")
    assert httpx.get(f"{service.address}/healthz").headers["x-request-id"]


def test_nothing_listens_beyond_the_machine(service: Running) -> None:
    assert listening(service)


def test_two_services_do_not_share_a_storage(service: Running, storage: Path) -> None:
    environment = {**os.environ, "CHAINFED_STORAGE": str(storage)}
    command = [*COMMAND, "serve", "--port", "0", "--json"]
    wrong = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert wrong.returncode == 2
    command[-2] = "65000"
    second = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert second.returncode == 1
    assert json.loads(second.stdout)["error"]["type"] == "StorageInUse"


def test_a_key_that_is_made_while_it_runs_closes_it(
    service: Running, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From here on, nobody is answered without a key."""
    forwarded = httpx.get(f"{service.address}/v1/jobs", headers={"X-Forwarded-For": "10.1.2.3"})
    assert forwarded.status_code == 401, "a proxy on this machine does not open it to others"
    keys = KeyStore(f"sqlite:///{storage / 'chainfed.db'}", existing=True)
    token = keys.make_key("a", ["read"]).token
    keys.close()
    wait_for(lambda: httpx.get(f"{service.address}/v1/jobs").status_code == 401, "closed door", 10)
    # Each of the two processes of the API reads the keys by itself.
    refused = wait_for(lambda: service.chainfed("list")[1].get("error"), "door that is closed in every process", 30)
    assert refused["type"] == "AccessDenied"
    monkeypatch.setenv("CHAINFED_API_KEY", token)
    assert service.chainfed("list")[0] == 0


@pytest.fixture
def clients(service: Running, storage: Path) -> Iterator[dict[str, Client]]:
    """A client for each owner of a key. A new key is accepted at once; each process closes its door when it has read it."""
    keys = KeyStore(Storage.at(storage).database)
    scopes = {"alice": ["submit", "read", "infer"], "bob": ["submit", "read", "infer"], "ops": ["admin"]}
    made = {owner: Client(service.address, keys.make_key(owner, scopes[owner]).token) for owner in scopes}
    keys.close()
    made["nobody"] = Client(service.address)
    ask = f"{service.address}/v1/jobs"
    wait_for(lambda: all(httpx.get(ask).status_code == 401 for _ in range(20)), "closed door in every process", 30)
    yield made
    for client in made.values():
        client.close()


def test_two_tenants_and_their_operator(clients: dict[str, Client], document: dict[str, Any], tmp_path: Path) -> None:
    alice, bob, ops, nobody = (clients[who] for who in ("alice", "bob", "ops", "nobody"))
    with pytest.raises(AccessDenied):
        nobody.json(calls.submit_job(document))
    for outside in ("/etc/passwd", str(tmp_path.parent.parent.parent / "none.csv")):
        with pytest.raises(InvalidJob, match="CHAINFED_DATA_ROOTS"):
            alice.json(calls.submit_job({**document, "data": {**document["data"], "train": f"path:{outside}"}}))

    document["rounds"] |= {"total": 2}
    job = alice.json(calls.submit_job(document))["id"]
    assert [event["kind"] for event in alice.stream_json(exchanges.events(job))][-1] == "succeeded"
    assert alice.finish_json(exchanges.labels("tiny:tiny", ["salt tide wave"]))["results"][0]["label"] == "sea"
    assert ops.finish_json(exchanges.labels("alice/tiny:tiny", ["salt tide wave"]))["job"] == job
    for name in ("tiny:tiny", "alice/tiny:tiny", "tiny"):
        with pytest.raises(ModelNotFound):
            bob.finish_json(exchanges.labels(name, ["salt tide wave"]))
    for call in (calls.get_job(job), calls.cancel_job(job)):
        with pytest.raises(JobNotFound):
            bob.json(call)
    with pytest.raises(JobNotFound):
        next(bob.stream_json(exchanges.events(job)))
    assert (bob.json(calls.list_jobs())["jobs"], [found["id"] for found in alice.json(calls.list_jobs())["jobs"]]) == (
        [],
        [job],
    )
    assert job in [found["id"] for found in ops.json(calls.list_jobs())["jobs"] if found["tenant"] == "alice"]


def test_told_to_stop_it_answers_what_was_asked_and_its_job_stops_after_a_commit(
    service: Running, storage: Path, spans: Collector, document: dict[str, Any]
) -> None:
    """The last test: the service is gone. No span of what it did is lost."""
    keys = KeyStore(f"sqlite:///{storage / 'chainfed.db'}", existing=True)
    token = keys.make_key("default", ["submit", "read"]).token
    keys.close()
    with closing(JobStore(f"sqlite:///{storage / 'chainfed.db'}", existing=True)) as store:
        document["rounds"] |= {"total": 500}
        job = store.submit(parse_job(document)).id  # with a key, it might not read the rows
    headers, text = {"Authorization": f"Bearer {token}"}, b"text,label\n" + b"salt,sea\n" * 400_000
    with httpx.Client(base_url=service.address, headers=headers, timeout=60) as http, ThreadPoolExecutor(1) as thread:
        wait_for(lambda: http.get("/v1/jobs").status_code == 200, "a key that every process knows", 30)
        body = {"name": "rows.csv", "bytes": len(text), "sha256": sha256(text).hexdigest()}
        upload = http.post("/v1/uploads", json=body).json()["id"]
        wait_for(lambda: (http.get(f"/v1/jobs/{job}").json()["progress"] or {}).get("round"), "a round")

        uploads = storage / "uploads"

        def slowly() -> Iterator[bytes]:
            yield text[:-10]
            wait_for(
                lambda: any(path.is_file() and path.stat().st_size for path in uploads.rglob("*")),
                "a process that takes it",
                30,
            )
            service.process.send_signal(signal.SIGTERM)
            wait_for(lambda: httpx.get(f"{service.address}/healthz").status_code == 503, "a closed door", 30)
            yield text[-10:]

        with http.stream("GET", f"/v1/jobs/{job}/events", headers={"Accept": "text/event-stream"}) as watched:
            heard = thread.submit(lambda: [line for line in watched.iter_lines() if line.startswith("event: round")])
            sent = http.put(f"/v1/uploads/{upload}/content", params={"offset": 0}, content=slowly())
            assert heard.result(), "the stream ends, and is not cut"
    assert (sent.status_code, sent.json().get("complete")) == (200, True), sent.text
    service.close()
    with closing(JobStore(f"sqlite:///{storage / 'chainfed.db'}", existing=True)) as store:
        assert store.get(job).status == "running", "it goes on when the service starts again"
        told = [event.data["index"] for event in store.of_kind(job, "round")]
    assert told == [record.index for record in CommitLog(storage / "jobs" / job).rounds()]
    assert {"PUT /v1/uploads/{upload}/content", "GET /v1/jobs/{job}/events"} <= {span.name for span in spans.spans}
    assert any(span.name == "coordinator" and span.about["chainfed.job"] == job for span in spans.spans)
    asked = "POST /v1/classify"
    traces = [spans.paths(span.trace) for span in spans.spans if span.name == asked]
    assert {asked, f"{asked} → answer"} in traces
    assert {"POST /v1/completions", "POST /v1/completions → answer"} in [spans.paths(one.trace) for one in spans.spans]
    submitted = "POST /v1/jobs → coordinator → stage → round → turn"
    traces = [spans.paths(span.trace) for span in spans.spans if span.name == "turn"]
    assert any({"POST /v1/jobs → check → prepare", submitted} <= paths for paths in traces)
