"""Promises of `GET /v1/jobs/{job}`: conditions, progress, an estimate, and an answer that is sent again only if it changed."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.records.fleet import LateSite
from tests.apps import an_app
from tests.builders import SPEC, a_round, a_start


@pytest.fixture
def client(store: JobStore) -> Iterator[TestClient]:
    with TestClient(an_app(store), "http://localhost", raise_server_exceptions=False) as made:
        yield made


def publish_rounds(store: JobStore, job: str, count: int) -> None:
    started = a_start()
    store.publish(job, "started", "started", started.model_dump(mode="json"))
    for index in range(count):
        record = a_round(index, started, seconds=10.0 * (index + 1))
        store.publish(job, f"round-{index}", "round", record.model_dump(mode="json"))


@pytest.mark.slow
def test_an_answer_is_sent_again_only_if_the_job_has_changed(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id
    path = f"/v1/jobs/{job}"

    def changed(tag: str) -> str | None:
        """The tag of the job, if it is another."""
        answer = client.get(path, headers={"If-None-Match": f'"other", W/{tag}'})
        if answer.status_code == 304:
            assert (answer.content, answer.headers["etag"]) == (b"", tag)
            return None
        assert answer.status_code == 200
        return answer.headers["etag"]

    first = client.get(path)
    tag = first.headers["etag"]
    assert first.json()["id"] == job
    assert changed(tag) is None
    for change in (
        lambda: store.move(job, "validating"),
        lambda: store.move(job, "running"),
        lambda: store.note_activity(job, Activity(what="training")),
        lambda: publish_rounds(store, job, 1),
        lambda: publish_rounds(store, job, 2),
        lambda: store.move(job, "failed", error={"type": "ValueError", "message": "no"}),
    ):
        change()
        new = changed(tag)
        assert new
        assert new != tag
        assert changed(new) is None
        tag = new
    assert client.get(path, headers={"If-None-Match": "*"}).status_code == 304
    assert client.get(path, headers=[("If-None-Match", '"other"'), ("If-None-Match", tag)]).status_code == 304


@pytest.mark.slow
def test_progress_and_an_estimate_of_the_end(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id

    def shown() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/v1/jobs/{job}").json()
        return found

    assert (shown()["progress"], shown()["estimated_finish"]) == (None, None)
    store.move(job, "running")
    publish_rounds(store, job, 0)
    assert (shown()["progress"]["fraction"], shown()["estimated_finish"]) == (0.0, None)
    there, group = shown()["progress"]["clients"], a_start().admitted[0]
    late = LateSite(client_class=group.client_class, site="far", admitted=(group,))
    store.publish(job, "late-far", "late_site", late.model_dump(mode="json"))
    assert shown()["progress"]["clients"] == there + group.clients, "those of a site that came take part"
    publish_rounds(store, job, 3)
    total = a_start().total_rounds
    assert shown()["progress"]["fraction"] == pytest.approx(3 / total)
    newest = store.newest(job, "round")
    assert newest
    ends = datetime.fromisoformat(shown()["estimated_finish"])
    assert ends == datetime.fromisoformat(newest.at) + timedelta(seconds=20 * (total - 3)), (
        "the mean of 10, 20 and 30 s"
    )
    store.move(job, "pausing")
    assert shown()["estimated_finish"] is None
    store.move(job, "paused")
    store.move(job, "queued")
    store.move(job, "running")
    resumed = store.newest(job, "running")
    assert resumed
    ends = datetime.fromisoformat(shown()["estimated_finish"])
    assert ends == datetime.fromisoformat(resumed.at) + timedelta(seconds=20 * (total - 3)), "from when it went on"
    slow = a_round(3, a_start(), seconds=1e12)
    store.publish(job, "round-3", "round", slow.model_dump(mode="json"))
    assert shown()["estimated_finish"] is None, "in no year that a date can have"
    store.move(job, "succeeded", result={"accuracy": 0.5})
    assert (shown()["progress"]["fraction"], shown()["estimated_finish"]) == (1.0, None)


def test_a_job_from_before_records_had_this_version_is_shown_without_progress(
    store: JobStore, storage: Storage
) -> None:
    job = store.submit(SPEC).id
    store.move(job, "running")
    store.publish(job, "started", "started", {"version": 1, "classes": ["a"], "admitted": [{"client": "phone-0"}]})
    record = a_round(0, a_start()).model_dump(mode="json")
    store.publish(job, "round-0", "round", record | {"version": 1})
    store.publish(job, "finished", "finished", {"version": 1, "accuracy": 0.5, "served": "last", "rounds": 1})
    store.move(job, "succeeded", result={"accuracy": 0.5})
    (storage.job(job) / "model").mkdir(parents=True)
    (storage.job(job) / "model" / "README.md").write_text("a model")
    app = an_app(store, folder_of=storage.job)
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as client:
        shown = client.get(f"/v1/jobs/{job}").json()
        assert (shown["status"], shown["progress"], shown["result"]) == ("succeeded", None, {"accuracy": 0.5})
        for part in ("events", "clients", "artifacts", "logs"):
            assert client.get(f"/v1/jobs/{job}/{part}").status_code == 200, part
        assert [one["name"] for one in client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]] == [
            "last/README.md", "model/README.md",
        ]  # fmt: skip
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/jobs").json()["jobs"][0]["accuracy"] == 0.5
        assert client.post(f"/v1/jobs/{job}/clone").status_code == 201


def test_conditions_of_a_job(client: TestClient, store: JobStore) -> None:
    job = store.submit(SPEC).id
    store.move(job, "validating")
    found = client.get(f"/v1/jobs/{job}").json()
    assert {one["type"]: (one["status"], one["reason"]) for one in found["conditions"]} == {
        "Validated": ("Unknown", "Validating"),
        "Running": ("False", "Validating"),
        "Paused": ("False", "Validating"),
        "Finished": ("False", "Validating"),
    }
    assert found["conditions"][1]["since"] == found["submitted_at"]


@pytest.mark.slow
def test_lists_by_state_and_label_and_in_pages(client: TestClient) -> None:
    document = SPEC.document()
    labels = ({"team": "search"}, {"team": "search", "kind": "a=b"}, {"team": "ads"}, {})
    jobs = [client.post("/v1/jobs", json={**document, "labels": given, "priority": 7}).json()["id"] for given in labels]
    client.post(f"/v1/jobs/{jobs[0]}/cancel")

    def listed(**params: Any) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=params).json()["jobs"]]

    assert listed(label="team=search") == [jobs[1], jobs[0]]
    assert listed(label=["team=search", "kind=a=b"]) == [jobs[1]]
    assert listed(label="team=search", state="cancelled") == [jobs[0]]
    assert listed(state=["cancelled", "queued"]) == jobs[::-1]
    assert listed(status="cancelled") == [jobs[0]]
    shown = client.get(f"/v1/jobs/{jobs[1]}").json()
    assert (shown["labels"], shown["priority"]) == ({"team": "search", "kind": "a=b"}, 7)

    pages, cursor = list[str](), None
    while cursor is not None or not pages:
        page = client.get(
            "/v1/jobs", params={"limit": 1, "state": "queued"} | ({"cursor": cursor} if cursor else {})
        ).json()
        pages += [job["id"] for job in page["jobs"]]
        cursor = page["next"]
    assert pages == [jobs[3], jobs[2], jobs[1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"labels": {"Team": "x"}},
        {"labels": {"team": 5}},
        {"labels": {"team": "x" * 64}},
        {"labels": {f"label-{number}": "" for number in range(33)}},
        {"labels": ["team"]},
        {"priority": 101},
        {"priority": 1.5},
    ],
)
def test_labels_and_priorities_are_bounded(client: TestClient, wrong: dict[str, Any]) -> None:
    answer = client.post("/v1/jobs", json=SPEC.document() | wrong)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"].startswith(next(iter(wrong)))
