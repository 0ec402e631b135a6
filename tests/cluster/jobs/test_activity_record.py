"""Promises of a job's activity on its record: it is the newest, it is written seldom, and no job waits for it."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event

import pytest

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.jobs.activity_record import ActivityRecord
from chainfed_ray.cluster.jobs.store import JobStore
from tests.builders import SPEC
from tests.watching import wait_for


class Counting(JobStore):
    """Counts what is to be written; whoever writes waits until the database is ``back``."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.written: list[Activity] = []
        self.back = Event()
        self.back.set()

    def note_activity(self, job: str, activity: Activity) -> None:
        self.written.append(activity)
        self.back.wait()
        super().note_activity(job, activity)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Counting]:
    made = Counting(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield made
    made.close()


@pytest.fixture
def job(store: Counting) -> str:
    made = store.submit(SPEC).id
    store.move(made, "running")
    return made


def activities(count: int) -> Iterator[Activity]:
    return (Activity(what="counting", done=done, total=count, unit="rows") for done in range(1, count + 1))


def test_the_newest_is_written(store: Counting, job: str) -> None:
    def last_is_on_record() -> bool:
        found = store.latest([job])[job].activity
        return found is not None and found["done"] == 500

    with ActivityRecord(store, job, interval=0.0) as listen:
        for activity in activities(500):
            listen(activity)
        wait_for(last_is_on_record, "activity")


def test_what_comes_within_the_interval_is_not_written(store: Counting, job: str) -> None:
    with ActivityRecord(store, job, interval=3600.0) as listen:
        for activity in activities(500):
            listen(activity)
            wait_for(lambda: store.written, "write")
    assert len(store.written) == 1


def test_a_job_does_not_wait_for_its_database(store: Counting, job: str) -> None:
    store.back.clear()
    with ActivityRecord(store, job, interval=0.0) as listen:
        for activity in activities(500):
            listen(activity)
        wait_for(lambda: store.written, "write")
        store.back.set()
    assert len(store.written) < 500
