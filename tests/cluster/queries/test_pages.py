"""Promises of pages: together they have every job once, whatever is submitted or deleted in between."""

from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text

from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.pages import Place
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


def labelled(store: JobStore, **labels: str) -> str:
    return store.submit(parse_job({**SPEC.document(), "labels": labels})).id


@pytest.mark.slow
def test_labels_and_states_narrow_a_list(store: JobStore) -> None:
    one = labelled(store, team="search", kind="trial")
    two = labelled(store, team="search")
    three = labelled(store, team="ads", kind="trial")
    store.move(two, "cancelled")

    def found(*labels: tuple[str, str], **options: object) -> list[str]:
        return [job.id for job in store.page(labels=labels, **options)]  # type: ignore[arg-type]

    assert found() == [three, two, one]
    assert found(("team", "search")) == [two, one]
    assert found(("team", "search"), ("kind", "trial")) == [one]
    assert found(("team", "search"), status="cancelled") == [two]
    assert found(status=("queued", "cancelled")) == [three, two, one]
    assert found(("kind", "search")) == []
    delete(store, two)
    assert found(("team", "search")) == [one]
    store.deletions.purge(two)
    assert found(("team", "search")) == [one]


@pytest.mark.slow
def test_pages_have_every_job_once_though_jobs_come_and_go(store: JobStore) -> None:
    jobs = [store.submit(SPEC).id for _ in range(6)]
    for job in jobs:
        store.move(job, "cancelled")
    first = store.page(2)
    cursor = Place.after(first[-1]).cursor()
    store.submit(SPEC)  # newer than all, so on no later page
    second = store.page(2, Place.parse(cursor))
    assert [job.id for job in (*first, *second)] == jobs[:1:-1]
    delete(store, jobs[0])
    place = Place.after(second[-1])
    assert [job.id for job in store.page(9, place)] == jobs[1:2]


@pytest.mark.slow
def test_a_page_goes_on_after_a_job_that_is_gone(store: JobStore) -> None:
    old = store.submit(SPEC)
    gone = store.submit(SPEC)
    while (newest := store.submit(SPEC)).submitted_at == gone.submitted_at:
        pass  # within the same millisecond
    store.move(gone.id, "cancelled")
    delete(store, gone.id)
    later = Place(newest.submitted_at, gone.id)
    assert old.id in {job.id for job in store.page(9, later)}
    assert newest.id not in {job.id for job in store.page(9, later)}


@pytest.mark.parametrize("cursor", ["", "none", "////", "bm9uZQ==", "IA==", "YQAgYg==", "é"])
def test_a_cursor_that_is_none_of_ours_is_refused(cursor: str) -> None:
    with pytest.raises(InvalidJob, match="the `next` of an earlier page"):
        Place.parse(cursor)


def test_a_cursor_tells_nothing_that_is_not_on_the_page(store: JobStore) -> None:
    job = store.submit(SPEC)
    assert Place.parse(Place.after(job).cursor()) == (job.submitted_at, job.id)


@pytest.mark.slow
def test_a_list_has_labels_and_accuracies_and_one_broken_result_is_the_trouble_of_its_own_job(
    store: JobStore, database: str
) -> None:
    one, two, three = labelled(store, team="search", kind="trial"), labelled(store), labelled(store, team="ads")
    for job, accuracy in ((one, 0.75), (two, None), (three, 0.5)):
        store.move(job, "running")
        store.move(job, "succeeded", result={"accuracy": accuracy, "classes": ["sea"]})
    if database.startswith("sqlite"):  # the other lets nobody write what is no JSON
        engine = create_engine(database)
        with engine.begin() as connection:
            connection.execute(text("update jobs set result = '{' where id = :job"), {"job": three})
        engine.dispose()
    broken = None if database.startswith("sqlite") else 0.5
    own = store.seen_by("default", everything=False)
    for lines in (store.lines(), own.lines(), store.lines(status="succeeded")):
        expected = [(three, {"team": "ads"}, broken), (two, {}, None), (one, {"kind": "trial", "team": "search"}, 0.75)]
        assert [(line.id, line.labels, line.accuracy) for line in lines] == expected
    assert [line.id for line in own.lines(2)] == [three, two]
    assert store.seen_by("other", everything=False).lines() == []
