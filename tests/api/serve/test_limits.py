"""Promises of the door about much and many: what is changed is put down, and a tenant has its limits and not another's."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.access.rates import Rates
from chainfed_ray.cluster.files.kept_bytes import KeptBytes
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.records.states import Status
from tests.apps import an_app, served
from tests.builders import SPEC

JOB = SPEC.document()


@pytest.fixture
def audit(storage: Storage) -> Iterator[AuditLog]:
    made = AuditLog(storage.database)
    yield made
    made.close()


def bearer(keys: KeyStore, owner: str, *scopes: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {keys.make_key(owner, scopes).token}"}


def test_a_change_that_fails_halfway_is_put_down(
    store: JobStore, keys: KeyStore, audit: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = an_app(store, AccessRules(KeyRing(keys), "nobody", audit=audit))
    client = TestClient(app, "http://localhost", raise_server_exceptions=False)
    alice, job = bearer(keys, "alice", "submit", "read"), store.seen_by("alice", everything=False).submit(SPEC).id

    def breaks(*_: object, **__: object) -> bool:
        raise RuntimeError("after it has done something")

    monkeypatch.setattr(JobStore, "move", breaks)
    monkeypatch.setattr(JobStore, "lines", breaks)
    assert client.post(f"/v1/jobs/{job}/cancel", headers=alice).status_code == 500
    assert client.get("/v1/jobs", headers=alice).status_code == 500, "which changes nothing"
    found = [(entry.tenant, entry.action, entry.target, entry.outcome) for entry in audit.page()]
    assert found == [("alice", "POST /v1/jobs/{job}/cancel", f"/v1/jobs/{job}/cancel", "500")]


@pytest.mark.slow
def test_what_is_changed_and_who_is_refused_is_put_down(store: JobStore, keys: KeyStore, audit: AuditLog) -> None:
    app = an_app(store, AccessRules(KeyRing(keys), "nobody", audit=audit))
    client = TestClient(app, "http://localhost", client=("10.1.2.3", 1), raise_server_exceptions=False)
    alice, admin = bearer(keys, "alice", "submit", "read", "infer"), bearer(keys, "ops", "admin")
    job = client.post("/v1/jobs", json=JOB, headers=alice).json()["id"]
    client.get("/v1/jobs", headers=alice)
    client.post("/v1/classify", json={"model": "none", "texts": ["x"]}, headers=alice)
    client.post(f"/v1/jobs/{job}/cancel", headers={**alice, "X-Request-ID": "mine"})
    client.post("/v1/jobs/none/cancel", headers=alice)
    client.get("/v1/audit", headers=alice)
    client.get("/v1/jobs", headers={"Authorization": "Bearer none"})
    page = client.get("/v1/audit", params={"limit": 4}, headers=admin).json()
    rest = client.get("/v1/audit", params={"before": page["next"]}, headers=admin).json()
    entries = page["entries"] + rest["entries"]
    assert rest["next"] is None
    assert [(entry["tenant"], entry["action"], entry["target"], entry["outcome"]) for entry in reversed(entries)] == [
        ("alice", "POST /v1/jobs", f"/v1/jobs/{job}", "201"),
        ("alice", "POST /v1/jobs/{job}/cancel", f"/v1/jobs/{job}/cancel", "202"),
        ("alice", "POST /v1/jobs/{job}/cancel", "/v1/jobs/none/cancel", "404"),
        ("alice", "GET /v1/audit", "/v1/audit", "403"),
        (None, "GET /v1/jobs", "/v1/jobs", "401"),
    ]
    assert {entry["address"] for entry in entries} == {"10.1.2.3"}
    assert next(entry["request"] for entry in entries if entry["outcome"] == "202") == "mine"
    (key,) = keys.keys("alice")
    assert {entry["key"] for entry in entries} == {key.id, None}
    secret = alice["Authorization"].rpartition("_")[2]
    assert secret not in str(entries)


def test_without_keys_changes_are_put_down_as_well(store: JobStore, keys: KeyStore, audit: AuditLog) -> None:
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "anyone", audit=audit)), "http://localhost")
    client.post("/v1/jobs", json=JOB)
    (entry,) = client.get("/v1/audit").json()["entries"]
    assert (entry["tenant"], entry["key"], entry["outcome"]) == ("default", None, "201")


def test_a_tenant_that_asks_too_often_waits_and_others_do_not(store: JobStore, keys: KeyStore) -> None:
    now = [0.0]
    rules = AccessRules(KeyRing(keys), "nobody", Rates(3, lambda: now[0]))
    client = TestClient(an_app(store, rules), "http://localhost")
    first, second, other = (bearer(keys, owner, "read") for owner in ("alice", "alice", "bob"))
    asked = [client.get("/v1/jobs", headers=headers) for headers in (first, second, first, second, other)]
    assert [answer.status_code for answer in asked] == [200, 200, 200, 429, 200]
    refused = asked[3]
    assert refused.headers["retry-after"] == "20"
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.json()["type"] == "urn:chainfed:problem:limit-reached"
    assert "3 requests a minute, as many as CHAINFED_REQUESTS_PER_MINUTE allows" in refused.json()["error"]["message"]
    assert client.get("/healthz").status_code == 200
    now[0] = 20.0
    assert client.get("/v1/jobs", headers=second).status_code == 200


def limiting(store: JobStore, keys: KeyStore, of_tenant: int, now: list[float]) -> TestClient:
    """A client of an API with a limit for each tenant and those of keys; ``now`` has the time in seconds."""
    rates, of_keys = Rates(of_tenant, lambda: now[0]), Rates(None, lambda: now[0])
    rules = AccessRules(KeyRing(keys), "nobody", rates, key_rates=of_keys)
    return TestClient(an_app(store, rules), "http://localhost")


def test_a_key_that_asks_too_often_waits_and_its_tenants_others_do_not(store: JobStore, keys: KeyStore) -> None:
    client = limiting(store, keys, 3, [0.0])
    limited = keys.make_key("alice", ["read"], requests_per_minute=1)
    often, other = {"Authorization": f"Bearer {limited.token}"}, bearer(keys, "alice", "read")
    asked = [client.get("/v1/jobs", headers=headers) for headers in (often, often, often, other, other, other)]
    assert [answer.status_code for answer in asked] == [200, 429, 429, 200, 200, 429]
    refused = asked[1]
    assert (refused.headers["retry-after"], refused.json()["type"]) == ("60", "urn:chainfed:problem:limit-reached")
    assert refused.json()["detail"] == (
        f"the key {limited.key.id} has 1 request a minute, as many as its requests_per_minute allows; try again in 60 s"
    )
    assert "CHAINFED_REQUESTS_PER_MINUTE" in asked[5].json()["detail"], "three of the tenant's were counted"


def test_a_request_that_the_tenants_limit_refuses_is_not_counted_for_its_key(store: JobStore, keys: KeyStore) -> None:
    now = [0.0]
    client = limiting(store, keys, 60, now)
    limited = keys.make_key("alice", ["read"], requests_per_minute=1)
    rare, other = {"Authorization": f"Bearer {limited.token}"}, bearer(keys, "alice", "read")
    assert [client.get("/v1/jobs", headers=other).status_code for _ in range(60)] == [200] * 60
    refused = client.get("/v1/jobs", headers=rare)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    now[0] = 1.0
    assert client.get("/v1/jobs", headers=rare).status_code == 200
    assert client.get("/v1/jobs", headers=rare).headers["retry-after"] == "60", "this one was counted"


@pytest.mark.slow
def test_a_tenant_has_so_many_jobs_in_the_queue(store: JobStore, keys: KeyStore) -> None:
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "nobody"), most_queued=2), "http://localhost")
    alice, bob = (bearer(keys, owner, "submit") for owner in ("alice", "bob"))
    once = {**alice, "Idempotency-Key": "once"}
    first = client.post("/v1/jobs", json=JOB, headers=once).json()["id"]
    statuses = [client.post("/v1/jobs", json=JOB, headers=alice).status_code for _ in range(3)]
    assert statuses == [201, 429, 429]
    assert client.post("/v1/jobs", json=JOB, headers=once).json()["id"] == first, "it makes no job"
    refused = client.post("/v1/jobs", json=JOB, headers=alice)
    assert (refused.headers["retry-after"], refused.json()["type"]) == ("60", "urn:chainfed:problem:limit-reached")
    assert "a queue of 2 with its paused jobs, as many as CHAINFED_QUEUED_JOBS allows" in refused.json()["detail"]
    assert client.post("/v1/jobs", json=JOB, headers=bob).status_code == 201
    store.move(first, "running")
    assert client.post("/v1/jobs", json=JOB, headers=alice).status_code == 201
    assert len(store.page()) == 4


def test_a_tenant_whose_jobs_fill_its_bytes_gets_no_more_until_one_is_deleted(
    storage: Storage, store: JobStore, keys: KeyStore
) -> None:
    uploads = UploadStore(storage)
    app = an_app(store, AccessRules(KeyRing(keys), "nobody"), uploads=uploads, stored_bytes=1000)
    client = TestClient(app, "http://localhost")
    alice, bob = (bearer(keys, owner, "submit") for owner in ("alice", "bob"))
    job = client.post("/v1/jobs", json=JOB, headers=alice).json()["id"]
    store.kept_bytes.note(job, 1000)
    upload = {"name": "a.csv", "bytes": 1, "sha256": 64 * "0"}
    paused = {"job": job, "retried": store.seen_by("alice", everything=False).submit(SPEC).id}
    store.move(paused["job"], "paused")
    store.move(paused["retried"], "cancelled")
    asked = (f"/v1/jobs/{paused['job']}/resume", {}), (f"/v1/jobs/{paused['retried']}/retry", {})
    for path, body in (("/v1/jobs", JOB), (f"/v1/jobs/{job}/clone", {}), ("/v1/uploads", upload), *asked):
        refused = client.post(path, json=body, headers=alice)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60"), path
        assert "1000B of jobs" in refused.json()["detail"]
        assert "as many as CHAINFED_STORED_BYTES allows" in refused.json()["detail"]
    assert [store.get(job).status for job in paused.values()] == ["paused", "cancelled"]
    assert client.post("/v1/jobs", json=JOB, headers=bob).status_code == 201
    store.move(job, "cancelling")
    store.move(job, "cancelled")
    assert client.delete(f"/v1/jobs/{job}", headers=alice).status_code == 204
    assert client.post(asked[1][0], headers=alice).status_code == 202
    assert client.post("/v1/uploads", json=upload, headers=alice).status_code == 201
    assert client.post("/v1/jobs", json=JOB, headers=alice).status_code == 201
    uploads.close()


def test_many_who_ask_at_once_are_counted_one_by_one(storage: Storage, store: JobStore, keys: KeyStore) -> None:
    """Each process of the API counts by itself, as the documents say: the two let twice as many pass as one."""
    first, second, other = (bearer(keys, owner, "read") for owner in ("alice", "alice", "bob"))
    limited = {"Authorization": f"Bearer {keys.make_key('alice', ['read'], requests_per_minute=5).token}"}
    senders = [first, second, limited, limited, other] * 12

    def a_process() -> FastAPI:
        rates = Rates(15, lambda: 0.0), Rates(None, lambda: 0.0)
        return an_app(store, AccessRules(KeyRing(keys), "nobody", rates[0], key_rates=rates[1]))

    with (
        served(a_process()) as one,
        served(a_process()) as two,
        httpx.Client(timeout=60) as client,
        ThreadPoolExecutor(20) as threads,
    ):
        asked = [(address, who) for who in senders for address in (one, two)]
        statuses = threads.map(lambda ask: client.get(f"{ask[0]}/v1/jobs", headers=ask[1]).status_code, asked)
        answers = [(who["Authorization"], status) for (_, who), status in zip(asked, statuses, strict=True)]
    passed = Counter(key for key, status in answers if status == 200)
    assert {status for _, status in answers} == {200, 429}
    assert passed[other["Authorization"]] == 2 * 12
    assert passed.total() - 2 * 12 == 2 * 15, "of alice's keys together"
    assert passed[limited["Authorization"]] <= 2 * 5


def test_bytes_that_are_full_by_the_end_of_a_check_let_no_job_in(
    store: JobStore, keys: KeyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks take seconds, and others of the tenant's jobs end meanwhile."""
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "nobody"), stored_bytes=1000), "http://localhost")
    alice = bearer(keys, "alice", "submit")
    once = {**alice, "Idempotency-Key": "once"}
    first = client.post("/v1/jobs", json=JOB, headers=once).json()["id"]
    check = KeptBytes.check

    def and_fill(self: KeptBytes, tenant: str, most: int | None) -> None:
        check(self, tenant, most)
        self.note(first, 1000)

    monkeypatch.setattr(KeptBytes, "check", and_fill)
    for path, body in (("/v1/jobs", JOB), (f"/v1/jobs/{first}/clone", {})):
        store.kept_bytes.note(first, 0)
        refused = client.post(path, json=body, headers=alice)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
        assert "1000B of jobs, as many as CHAINFED_STORED_BYTES allows" in refused.json()["detail"]
    assert [job.id for job in store.page()] == [first]
    store.kept_bytes.note(first, 0)
    assert client.post("/v1/jobs", json=JOB, headers=once).json()["id"] == first, "it makes no job"


def test_a_tenant_has_so_many_aliases(store: JobStore, keys: KeyStore) -> None:
    client = TestClient(an_app(store, AccessRules(KeyRing(keys), "nobody"), most_aliases=1), "http://localhost")
    alice, bob = (bearer(keys, owner, "submit") for owner in ("alice", "bob"))
    for owner in ("alice", "bob"):
        job = store.seen_by(owner, everything=False).submit(SPEC).id
        store.move(job, "running")
        store.move(job, "succeeded", result={"classes": ["a"], "accuracy": 0.5})

    def put(headers: dict[str, str], alias: str, target: str = "minilm") -> httpx.Response:
        return client.put(f"/v1/aliases/{alias}", json={"targets": {target: 1}}, headers=headers)

    refused = [put(alice, alias) for alias in ("one", "two")][1]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert refused.json()["type"] == "urn:chainfed:problem:limit-reached"
    assert "alice has 1 alias, as many as CHAINFED_ALIASES allows" in refused.json()["detail"]
    assert put(alice, "one", "minilm:tiny").status_code == 200, "it is no new one"
    assert put(bob, "two").status_code == 200
    assert client.delete("/v1/aliases/one", headers=alice).status_code == 204
    assert put(alice, "two").status_code == 200


def test_a_tenant_has_so_many_uploads(storage: Storage, store: JobStore, keys: KeyStore) -> None:
    uploads = UploadStore(storage)
    app = an_app(store, AccessRules(KeyRing(keys), "nobody"), uploads=uploads, most_uploads=1)
    client = TestClient(app, "http://localhost")
    alice, bob = (bearer(keys, owner, "submit") for owner in ("alice", "bob"))
    bodies = [{"name": name, "bytes": 1, "sha256": 64 * "0"} for name in ("a.csv", "a.csv", "b.csv")]
    answers = [client.post("/v1/uploads", json=body, headers=alice) for body in bodies]
    assert [answer.status_code for answer in answers] == [201, 201, 429]
    assert (answers[2].headers["retry-after"], answers[2].json()["type"]) == (
        "60",
        "urn:chainfed:problem:limit-reached",
    )
    assert "1 upload, as many as CHAINFED_UPLOADS allows" in answers[2].json()["detail"]
    assert client.post("/v1/uploads", json=bodies[2], headers=bob).status_code == 201
    uploads.close()


@pytest.mark.slow
def test_bytes_that_are_full_are_those_of_the_jobs_tenant_and_matter_where_it_goes_on(
    store: JobStore, keys: KeyStore
) -> None:
    app = an_app(store, AccessRules(KeyRing(keys), "nobody"), stored_bytes=1000)
    client, alice = TestClient(app, "http://localhost"), store.seen_by("alice", everything=False)
    own, operator = bearer(keys, "alice", "submit"), bearer(keys, "ops", "submit", "admin")
    full = alice.submit(SPEC).id
    store.kept_bytes.note(full, 1000)

    def asked(what: str, headers: dict[str, str], *states: Status) -> int:
        """The answer to who asks it of a new job of alice's that was in these states."""
        job = alice.submit(SPEC).id
        for state in states:
            assert store.move(job, state)
        return client.post(f"/v1/jobs/{job}/{what}", headers=headers).status_code

    for headers in (own, operator):
        assert asked("resume", headers, "paused") == 429
        assert asked("retry", headers, "cancelled") == 429
    assert asked("resume", own) == asked("resume", own, "running") == 202, "it goes on already"
    assert asked("resume", own, "running", "pausing") == 202, "it has not stopped yet"
    assert asked("retry", own) == 202
    assert asked("retry", own, "running", "succeeded") == asked("resume", own, "cancelled") == 409
    store.move(full, "cancelled")
    delete(store, full)
    store.kept_bytes.note(store.seen_by("ops", everything=False).submit(SPEC).id, 1000)
    assert asked("resume", operator, "paused") == asked("retry", operator, "cancelled") == 202, "alice has room"
