"""Promises of the ``Idempotency-Key``: a request that is sent again is carried out once, and answered as before."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from threading import Barrier, Event
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from chainfed_ray.api.serve import idempotency
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.first_answers import HELD_SECONDS, FirstAnswers
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app
from tests.builders import SPEC

DOCUMENT = SPEC.document()
KEY = {"Idempotency-Key": "once"}
AGAIN = "idempotency-replayed"


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def processes(storage: Storage, store: JobStore, clock: Clock) -> Iterator[list[TestClient]]:
    """Three processes of the API on one database."""
    made, opened = [], []
    for _ in range(3):
        own, uploads, answers = (
            JobStore(storage.database),
            UploadStore(storage),
            FirstAnswers(storage.database, clock=clock),
        )
        made.append(TestClient(an_app(own, uploads=uploads, answers=answers), "http://localhost"))
        opened += [own, uploads, answers]
    yield made
    for one in opened:
        one.close()


@pytest.mark.slow
def test_the_first_answer_comes_again_from_any_process(processes: list[TestClient], store: JobStore) -> None:
    first = processes[0].post("/v1/jobs", json=DOCUMENT, headers=KEY)
    assert (first.status_code, AGAIN in first.headers) == (201, False)
    store.move(first.json()["id"], "cancelled")
    for process in processes:
        again = process.post("/v1/jobs", json=DOCUMENT, headers=KEY)
        assert (again.status_code, again.text, again.headers[AGAIN]) == (201, first.text, "true")
        for name in ("location", "content-type", "content-length"):
            assert again.headers[name] == first.headers[name], name
    assert len(store.page()) == 1
    other = processes[1].post("/v1/jobs", json=DOCUMENT, headers={"Idempotency-Key": "twice"})
    assert other.json()["id"] != first.json()["id"]


@pytest.mark.slow
def test_another_request_with_the_key_is_refused(processes: list[TestClient], store: JobStore) -> None:
    assert processes[0].post("/v1/jobs", json=DOCUMENT, headers=KEY).status_code == 201
    others: list[tuple[str, dict[str, Any]]] = [
        ("/v1/jobs", {"json": {**DOCUMENT, "seed": 1}}),
        ("/v1/jobs?x=1", {"json": DOCUMENT}),
        ("/v1/uploads", {"json": DOCUMENT}),
    ]
    for path, given in others:
        refused = processes[1].post(path, headers=KEY, **given)
        assert (refused.status_code, refused.json()["type"]) == (409, "urn:chainfed:problem:idempotency-conflict"), path
    assert len(store.page()) == 1


@pytest.mark.slow
def test_of_twins_that_come_together_one_is_carried_out(
    processes: list[TestClient], store: JobStore, uploads_of: dict[str, Any]
) -> None:
    for path, body in (("/v1/jobs", DOCUMENT), ("/v1/uploads", uploads_of)):
        start, key = Barrier(12), {"Idempotency-Key": path}

        def post(number: int, start: Barrier = start, path: str = path, body: Any = body, key: Any = key) -> str:
            start.wait(60)
            answer = processes[number % 3].post(path, json=body, headers=key)
            assert answer.status_code == 201, answer.text
            return answer.text

        with ThreadPoolExecutor(12) as threads:
            assert len(set(threads.map(post, range(12)))) == 1
    assert len(store.page()) == 1


@pytest.fixture
def uploads_of() -> dict[str, Any]:
    """The body that begins an upload."""
    return {"name": "rows.csv", "bytes": 3, "sha256": sha256(b"abc").hexdigest()}


@pytest.mark.slow
def test_an_alias_is_rolled_back_once(processes: list[TestClient], store: JobStore) -> None:
    for name in "abc":
        job = store.submit(parse_job({**DOCUMENT, "name": name})).id
        store.move(job, "running")
        store.move(job, "succeeded", result={"classes": ["x", "y"], "accuracy": 0.5})
        store.aliases.set("mine", {f"minilm:{name}": 1.0})
    told = {process.post("/v1/aliases/mine/rollback", headers=KEY).text for process in processes}
    assert len(told) == 1
    assert store.aliases.get("mine") == {"minilm:b": 1.0}


@pytest.mark.slow
def test_what_was_deleted_is_made_anew(
    processes: list[TestClient], store: JobStore, uploads_of: dict[str, Any]
) -> None:
    for path, body in (("/v1/jobs", DOCUMENT), ("/v1/uploads", uploads_of)):
        key = {"Idempotency-Key": path}
        first = processes[0].post(path, json=body, headers=key).json()["id"]
        if path == "/v1/jobs":
            store.move(first, "cancelled")
        assert processes[0].delete(f"{path}/{first}").status_code == 204
        anew = [process.post(path, json=body, headers=key) for process in processes]
        assert [(answer.status_code, AGAIN in answer.headers) for answer in anew] == [
            (201, False),
            (201, True),
            (201, True),
        ]
        (made,) = {answer.json()["id"] for answer in anew}
        assert made != first
        assert processes[1].get(f"{path}/{made}").status_code == 200


@pytest.mark.slow
def test_what_was_refused_may_be_mended_under_the_same_key(processes: list[TestClient]) -> None:
    for body in (b"no JSON", json.dumps({**DOCUMENT, "seed": "x"}).encode()):
        refused = processes[0].post("/v1/jobs", content=body, headers={**KEY, "Content-Type": "application/json"})
        assert refused.status_code in (400, 422)
    assert processes[1].post("/v1/jobs", json=DOCUMENT, headers=KEY).status_code == 201


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "x" * 201, "caf\u00e9", "tab\there"])
def test_what_is_no_key_is_refused(processes: list[TestClient], key: str) -> None:
    for path in ("/v1/jobs", "/v1/uploads", "/v1/aliases/a/rollback"):
        refused = processes[0].post(path, json=DOCUMENT, headers={b"idempotency-key": key.encode("latin-1")})
        assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "header.idempotency-key")


@pytest.mark.slow
def test_a_process_that_was_killed_is_followed_by_another(
    processes: list[TestClient], storage: Storage, store: JobStore, clock: Clock
) -> None:
    """The first process has queued the job, and is killed before the answer is kept."""
    dying = FirstAnswers(storage.database, clock=clock)
    request = processes[0].build_request("POST", "/v1/jobs", json=DOCUMENT, headers=KEY)
    digest = sha256(b"POST /v1/jobs?\n" + request.content).hexdigest()
    dying.claim("default", "once", digest, "dying")
    job = store.submit(SPEC, "once").id
    dying.close()
    clock.now += HELD_SECONDS + 1
    answer = processes[1].post("/v1/jobs", json=DOCUMENT, headers=KEY)
    assert (answer.status_code, answer.json()["id"]) == (201, job)
    assert processes[2].post("/v1/jobs", json=DOCUMENT, headers=KEY).headers[AGAIN] == "true"


@pytest.mark.slow
def test_a_twin_waits_for_the_first_one_and_in_the_end_no_more(
    processes: list[TestClient], storage: Storage, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    working = FirstAnswers(storage.database, clock=clock)
    request = processes[0].build_request("POST", "/v1/jobs", json=DOCUMENT, headers=KEY)
    digest = sha256(b"POST /v1/jobs?\n" + request.content).hexdigest()
    working.claim("default", "once", digest, "working")
    monkeypatch.setattr(idempotency, "_WAIT_SECONDS", 0.0)
    late = processes[1].post("/v1/jobs", json=DOCUMENT, headers=KEY)
    assert (late.status_code, late.json()["type"]) == (409, "urn:chainfed:problem:idempotency-conflict")
    assert "not answered yet" in late.json()["detail"]
    monkeypatch.undo()

    asked = Event()
    claim = FirstAnswers.claim

    def noted(self: FirstAnswers, *given: str) -> Any:
        found = claim(self, *given)
        asked.set()
        return found

    monkeypatch.setattr(FirstAnswers, "claim", noted)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(processes[1].post, "/v1/jobs", json=DOCUMENT, headers=KEY)
        assert asked.wait(60)
        working.release("default", "once", "working")
        assert waiting.result(60).status_code == 201
    working.close()


@pytest.mark.slow
def test_keys_are_a_tenants_own_and_answers_wait_for_the_database(
    storage: Storage, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, answers = KeyStore(storage.database), FirstAnswers(storage.database)
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "nobody"), answers=answers), "http://localhost")
    found = []
    for who in ("alice", "bob", "alice", "bob"):
        token = keys.make_key(who, ["submit"]).token
        answer = client.post("/v1/jobs", json=DOCUMENT, headers={**KEY, "Authorization": f"Bearer {token}"})
        found.append(answer.json()["id"])
    assert found[:2] == found[2:]
    assert len({*found}) == 2

    def gone(*_: object) -> None:
        raise OperationalError("", None, Exception("gone"))

    monkeypatch.setattr(FirstAnswers, "claim", gone)
    answer = client.post("/v1/jobs", json=DOCUMENT, headers={**KEY, "Authorization": f"Bearer {token}"})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:chainfed:problem:database-unavailable")
    keys.close()
    answers.close()


@pytest.mark.slow
def test_limits_of_a_body_are_told_as_ever(processes: list[TestClient]) -> None:
    refused = processes[0].post(
        "/v1/jobs", content=b" " * (5 * 2**20), headers={**KEY, "Content-Type": "application/json"}
    )
    assert (refused.status_code, refused.json()["type"]) == (413, "urn:chainfed:problem:content-too-large")
