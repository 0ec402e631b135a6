"""Promises of the route of logs, and of its client: pages, and a job that is followed to its end."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chainfed_ray.api.jobs import logs
from chainfed_ray.api.sdk import exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.access import waiting
from chainfed_ray.cluster.files.job_log import JobLog
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import JobNotFound
from chainfed_ray.records.log_line import LogLine
from tests.apps import an_app, served
from tests.builders import SPEC, a_round, a_start
from tests.watching import wait_for


@pytest.fixture
def app(store: JobStore, storage: Storage) -> FastAPI:
    return an_app(store, folder_of=storage.job)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, "http://localhost") as made:
        yield made


def test_pages_from_the_first_line_to_the_end_of_the_job(client: TestClient, store: JobStore, storage: Storage) -> None:
    job = store.submit(SPEC).id
    path = f"/v1/jobs/{job}/logs"
    assert client.get(path).json() == {"lines": [], "next": 0, "finished": False}
    with JobLog(storage.job(job)) as log:
        log.note("warning", "phone-1", "its turn failed", a_round(1, a_start()))
    page = client.get(path, params={"limit": 1}).json()
    assert ([line["source"] for line in page["lines"]], page["finished"]) == (["coordinator"], False)
    rest = client.get(path, params={"after": page["next"]}).json()
    (line,) = rest["lines"]
    assert (line["level"], line["source"], line["round"], line["message"]) == (
        "warning",
        "phone-1",
        2,
        "its turn failed",
    )
    store.move(job, "cancelled")
    assert client.get(path, params={"after": rest["next"], "wait": 25}).json()["finished"]
    assert client.get(path, params={"after": 10**9}).json()["lines"] == []
    assert client.get(path, params={"wait": 26}).status_code == 422
    assert client.get("/v1/jobs/none/logs").status_code == 404


@pytest.mark.parametrize("limit", ["MOST_WAITING", "MOST_OF_TENANT"])
def test_so_many_wait_and_no_more(
    app: FastAPI, store: JobStore, storage: Storage, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(waiting, limit, 2)
    job = store.submit(SPEC).id
    path, looks, known = f"/v1/jobs/{job}/logs", Counter[int](), logs.page_of

    def looked(file: Path, after: int, lines: int) -> tuple[list[LogLine], int]:
        looks[lines] += 1
        return known(file, after, lines)

    monkeypatch.setattr(logs, "page_of", looked)
    with served(app) as address, httpx.Client(base_url=address, timeout=60) as client, ThreadPoolExecutor(2) as threads:
        asked = [{"wait": 25, "limit": number} for number in (1, 2)]
        both = [threads.submit(client.get, path, params=one) for one in asked]
        wait_for(lambda: looks[1] > 1 and looks[2] > 1, "second look of both")
        refused = client.get(path, params={"wait": 25})
        free = client.get(path)
        with JobLog(storage.job(job)) as log:
            log.note("info", "phone-0", "a line")
        assert all(one.result(60).json()["lines"] for one in both)
        assert client.get(path, params={"wait": 0.1, "after": 2**40}).status_code == 200, "there is room again"
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "10")
    assert refused.json()["type"] == "urn:chainfed:problem:service-busy"
    assert free.status_code == 200, "it does not wait"


def test_a_job_is_followed_until_it_is_over(app: FastAPI, store: JobStore, storage: Storage) -> None:
    job = store.submit(SPEC).id
    with served(app) as address:
        client = Client(address)
        with JobLog(storage.job(job)) as log:
            following = client.stream(exchanges.logs(job, follow=True))
            assert next(following).source == "coordinator"
            later = Thread(target=log.note, args=("info", "phone-0", "later"))
            later.start()
            assert next(following).message == "later"
            later.join()
            store.move(job, "cancelled")
            assert list(following) == []
        assert [line.source for line in client.stream(exchanges.logs(job))] == ["coordinator", "phone-0"]
        with pytest.raises(JobNotFound):
            next(client.stream(exchanges.logs("none")))
        client.close()


def test_the_last_lines_are_told_where_each_commit_has_a_folder_of_its_own(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an object store: a job ends while its log is waited for, and its last lines are in a new folder."""
    monkeypatch.setattr(logs, "LOOK_SECONDS", 0.01)
    job, commits = store.submit(SPEC).id, [tmp_path / "1"]
    (tmp_path / "2").mkdir()
    looks, known = list[Path](), logs.page_of

    def and_end(file: Path, after: int, lines: int) -> tuple[list[LogLine], int]:
        """Look, and let the job end before the next look: so no look comes between its last line and its end."""
        looks.append(file)
        found = known(file, after, lines)
        if len(looks) == 2:  # of which the first is before it waits
            JobLog(tmp_path / "2").note("info", "coordinator", "the last line")
            commits.append(tmp_path / "2")
            store.move(job, "cancelled")
        return found

    monkeypatch.setattr(logs, "page_of", and_end)
    with TestClient(an_app(store, folder_of=lambda _: commits[-1]), "http://localhost") as client:
        page = client.get(f"/v1/jobs/{job}/logs", params={"wait": 25}).json()
    assert len(looks) > 2
    assert ([line["message"] for line in page["lines"]], page["finished"]) == (["the last line"], True)
