"""Promises of the routes that tell a job what to do."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from chainfed_ray.activity import Activity
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.control import pause, resume
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from tests.apps import an_app
from tests.builders import MIB, SPEC, a_start, fits


@pytest.fixture
def client(store: JobStore) -> Iterator[TestClient]:
    with TestClient(an_app(store), "http://localhost", raise_server_exceptions=False) as made:
        yield made


def test_a_job_pauses_goes_on_and_is_cancelled(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id

    def ask(what: str) -> tuple[int, str]:
        answer = client.post(f"/v1/jobs/{job}/{what}")
        return answer.status_code, answer.json()["status"]

    assert ask("pause") == (202, "paused")
    assert ask("resume") == (202, "queued")
    store.move(job, "running")
    store.publish(job, "started", "started", a_start().model_dump(mode="json"))
    assert ask("pause") == (202, "pausing")
    assert ask("resume") == (202, "running")
    assert ask("cancel") == (202, "cancelling")
    refused = client.post(f"/v1/jobs/{job}/pause")
    assert refused.status_code == 409
    assert refused.json()["type"] == "urn:chainfed:problem:job-conflict"
    assert refused.json()["detail"] == f"job {job} is cancelling; it cannot be paused"
    assert client.post("/v1/jobs/none/pause").status_code == 404


def test_what_is_asked_of_a_job_as_it_was_is_refused_once_it_is_another(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id
    path = f"/v1/jobs/{job}"
    seen = client.get(path).headers["etag"]

    def ask(what: str, tag: str) -> int:
        headers = {"If-Match": tag}
        done = (
            client.delete(path, headers=headers) if what == "delete" else client.post(f"{path}/{what}", headers=headers)
        )
        return done.status_code

    assert ask("pause", f'"other", {seen}') == 202
    before = store.events(job)
    for what in ("pause", "resume", "cancel", "retry", "clone", "delete"):
        assert ask(what, seen) == 412, "it is paused by now"
        assert ask(what, f"W/{client.get(path).headers['etag']}") == 412, "a weak tag says too little"
    assert (store.events(job), len(store.page())) == (before, 1)
    refused = client.post(f"{path}/resume", headers={"If-Match": seen})
    assert refused.json()["type"] == "urn:chainfed:problem:precondition-failed"
    assert ask("resume", client.get(path).headers["etag"]) == 202
    lines = [("If-Match", client.get(path).headers["etag"]), ("If-Match", '"other"')]
    assert client.post(f"{path}/pause", headers=lines).status_code == 202
    assert client.post(f"{path}/resume", headers=[lines[1], ("If-Match", client.get(path).headers["etag"])]).is_success
    assert ask("cancel", "*") == 202
    assert ask("delete", client.get(path).headers["etag"]) == 204
    assert ask("delete", "*") == 404
    assert ask("pause", seen) == 404


def test_progress_is_no_change_for_whoever_tells_a_job_something(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id
    path = f"/v1/jobs/{job}"
    store.move(job, "running")
    store.publish(job, "started", "started", a_start().model_dump(mode="json"))
    seen = client.get(path).headers["etag"]
    store.note_activity(job, Activity(what="training a round"))
    store.publish(job, "waiting-1", "waiting", {"message": "no memory"})
    changed = client.get(path, headers={"If-None-Match": seen})
    assert (changed.status_code, changed.json()["activity"]["what"]) == (200, "training a round")
    assert changed.headers["etag"] != seen
    assert client.get(path, headers={"If-None-Match": changed.headers["etag"]}).status_code == 304
    wrong = (f"W/{seen}", seen.strip('"'), seen.partition("-")[0] + '"', f'"{16 * "0"}{seen[17:]}')
    assert [client.post(f"{path}/pause", headers={"If-Match": tag}).status_code for tag in wrong] == 4 * [412]
    assert client.post(f"{path}/pause", headers={"If-Match": seen}).status_code == 202
    assert client.post(f"{path}/pause", headers={"If-Match": seen}).status_code == 412, "also what would change nothing"


def test_the_tag_of_another_job_is_never_a_jobs(client: TestClient, store: JobStore) -> None:
    one, other = (store.submit(SPEC).id for _ in range(2))
    tag = {"If-Match": client.get(f"/v1/jobs/{one}").headers["etag"]}
    assert client.post(f"/v1/jobs/{other}/cancel", headers=tag).status_code == 412
    assert client.post(f"/v1/jobs/{one}/cancel", headers=tag).status_code == 202


def test_of_two_who_hold_one_tag_one_acts(client: TestClient, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = store.submit(SPEC).id
    path = f"/v1/jobs/{job}"
    tag = client.get(path).headers["etag"]
    move, others = JobStore.move, [lambda: pause(store, job), lambda: resume(store, job, fits)]

    def after_another(self: JobStore, *given: Any, **named: Any) -> bool:
        first, others[:] = others[:], []
        for ask in first:
            ask()
        return move(self, *given, **named)

    monkeypatch.setattr(JobStore, "move", after_another)
    refused = client.post(f"{path}/cancel", headers={"If-Match": tag})
    assert (refused.status_code, refused.json()["type"]) == (412, "urn:chainfed:problem:precondition-failed")
    assert store.get(job).status == "queued"
    assert client.post(f"{path}/cancel").status_code == 202


def test_a_job_is_tried_again_and_deleted(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id
    assert client.delete(f"/v1/jobs/{job}").status_code == 409
    store.move(job, "running")
    store.move(job, "failed", error={"type": "ValueError", "message": "no"})
    again = client.post(f"/v1/jobs/{job}/retry")
    assert (again.status_code, again.json()["status"], again.json()["error"]) == (202, "queued", None)
    events = client.get(f"/v1/jobs/{job}/events").json()
    assert [event["kind"] for event in events["events"]] == ["queued", "running", "failed", "queued"]
    assert not events["finished"], "it goes on"
    part = client.get(f"/v1/jobs/{job}/events?limit=3").json()
    assert (part["last"], part["finished"]) == (3, False), "an end that was not the last"
    store.move(job, "cancelled")
    assert client.get(f"/v1/jobs/{job}/events").json()["finished"]
    gone = client.delete(f"/v1/jobs/{job}")
    assert (gone.status_code, gone.content, gone.headers.get("content-type")) == (204, b"", None)
    assert client.get(f"/v1/jobs/{job}").status_code == 404
    assert client.delete(f"/v1/jobs/{job}").status_code == 404


def test_a_job_is_cloned_with_changes(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id

    def clone(patch: object, media_type: str = "application/merge-patch+json", **headers: str) -> httpx.Response:
        given = {"Content-Type": media_type, **headers}
        return client.post(f"/v1/jobs/{job}/clone", content=json.dumps(patch), headers=given)

    same = client.post(f"/v1/jobs/{job}/clone")
    assert (same.status_code, same.json()["spec"]) == (201, SPEC.document())
    assert same.headers["location"] == f"/v1/jobs/{same.json()['id']}"
    assert same.json()["id"] != job

    changed = clone({"name": "other", "rounds": {"total": 7, "learning_rate": None}, "seed": 5}).json()
    spec = SPEC.document()
    assert changed["spec"] == {
        **spec,
        "name": "other",
        "seed": 5,
        "rounds": {**spec["rounds"], "total": 7},
    }
    assert changed["model"] == "minilm:other"

    keyed = [clone({"seed": 9}, "application/json", **{"Idempotency-Key": "k"}).json()["id"] for _ in range(2)]
    assert keyed[0] == keyed[1]
    refused = clone({"rounds": {"total": 0}, "nonsense": 1})
    assert refused.status_code == 422
    assert {found["field"] for found in refused.json()["errors"]} == {"rounds.total", "nonsense"}
    assert clone([1]).status_code == 422
    assert clone({}, "text/plain").status_code == 415
    wrong = client.post(f"/v1/jobs/{job}/clone", content=b"{", headers={"Content-Type": "application/json"})
    assert wrong.status_code == 400
    assert client.post("/v1/jobs/none/clone").status_code == 404


@pytest.mark.parametrize("depth", [10, 400, 900, 960, 990, 5000, 100_000])
def test_a_patch_of_any_depth_is_refused_in_words(client: TestClient, store: JobStore, depth: int) -> None:
    job = store.submit(SPEC).id
    patch = '{"chain":' * depth + "1" + "}" * depth
    answer = client.post(f"/v1/jobs/{job}/clone", content=patch, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413, 422), answer.text
    assert len(answer.text) < 10_000


def test_a_number_in_a_patch_with_more_digits_than_python_reads_is_no_text(client: TestClient, store: JobStore) -> None:
    job, patch = store.submit(SPEC).id, f'{{"data": {{"label": {"7" * 4001}}}}}'
    refused = client.post(f"/v1/jobs/{job}/clone", content=patch, headers={"Content-Type": "application/json"})
    assert refused.status_code == 422
    (found,) = refused.json()["errors"]
    assert (found["field"], found["value"][:3], found["expected"]) == ("data.label", "777", "a string")


def test_what_was_done_to_a_deleted_job_stays_in_the_audit_log(storage: Storage, store: JobStore) -> None:
    keys, log = KeyStore(storage.database), AuditLog(storage.database)
    token = keys.make_key("alice", ["submit"]).token
    job = store.seen_by("alice", everything=False).submit(SPEC).id
    access = AccessRules(KeyRing(keys), "nobody", audit=log)
    headers = {"Authorization": f"Bearer {token}"}
    with TestClient(an_app(store, access), "http://localhost", headers=headers) as client:
        assert client.post(f"/v1/jobs/{job}/cancel").status_code == 202
        assert client.delete(f"/v1/jobs/{job}").status_code == 204
    store.deletions.purge(job)
    done = [(entry.action, entry.target, entry.tenant, entry.outcome) for entry in log.page(9)]
    assert done == [
        ("DELETE /v1/jobs/{job}", f"/v1/jobs/{job}", "alice", "204"),
        ("POST /v1/jobs/{job}/cancel", f"/v1/jobs/{job}/cancel", "alice", "202"),
    ]
    keys.close()
    log.close()


def test_a_job_whose_clients_never_fit_is_refused_with_the_limit(storage: Storage, store: JobStore) -> None:
    keys = KeyStore(storage.database)
    app, access = an_app(store), AccessRules(KeyRing(keys), "nobody")
    with_keys = an_app(store, access)
    for one in (app, with_keys):
        one.state.service = replace(one.state.service, client_memory=100 * MIB, client_slots=2)
    fleet: dict[str, Any] = {"clients": [{"name": "a", "memory": "60MiB", "count": 2}]}
    document = SPEC.document() | {"fleet": fleet, "rounds": {"clients": 2}}
    with TestClient(app, "http://localhost") as client:
        assert client.post("/v1/jobs", json=document).status_code == 201, "without a key there is no limit"
    headers = {"Authorization": f"Bearer {keys.make_key('alice', ['submit']).token}"}
    with TestClient(with_keys, "http://localhost", headers=headers) as client:
        refused = client.post("/v1/jobs", json=document)
        assert refused.status_code == 422
        assert "CHAINFED_CLIENT_MEMORY" in refused.json()["detail"]
        fleet["clients"][0]["memory"] = "50MiB"
        job = client.post("/v1/jobs", json=document).json()["id"]
        assert client.post(f"/v1/jobs/{job}/pause").status_code == 202
        # An operator lowers the limit.
        with_keys.state.service = replace(with_keys.state.service, client_memory=10 * MIB)
        assert client.post(f"/v1/jobs/{job}/resume").status_code == 422
        assert store.get(job).status == "paused", "nothing is lost: it goes on under a higher limit"
        tag = {"If-Match": '"other"'}
        assert client.post(f"/v1/jobs/{job}/resume", headers=tag).status_code == 412, (
            "it is another, whether it fits or not"
        )
        assert client.post(f"/v1/jobs/{job}/retry").status_code == 409
        store.move(job, "queued")
        assert client.post(f"/v1/jobs/{job}/resume").status_code == 202, "it goes on already"
        store.move(job, "cancelled")
        assert client.post(f"/v1/jobs/{job}/resume").status_code == 409, "it is over, whether it fits or not"
        assert client.post(f"/v1/jobs/{job}/retry").status_code == 422
        assert store.get(job).status == "cancelled"
    keys.close()
