"""Promises of the feed: each watcher hears each event once and in order, and one poll of the database serves them all."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from chainfed_ray.activity import Activity
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.feed import MOST_OF_TENANT, MOST_WATCHERS, Busy, EventFeed
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import Event
from chainfed_ray.errors import ServiceBusy
from tests.builders import SPEC


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield made
    made.close()


async def heard(feed: EventFeed, job: str, after: int = 0) -> list[int | str]:
    """The numbers of the events that a watcher hears until the job is over, and what it hears that the job is doing."""
    found: list[int | str] = []
    async with aclosing(feed.watch(job, after)) as happenings:
        async for happening in happenings:
            if isinstance(happening, Event):
                found.append(happening.seq)
            elif isinstance(happening, Busy):
                found.append(happening.activity["what"])
    return found


@pytest.mark.slow
def test_everyone_hears_everything_once(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainfed_ray.cluster.jobs.feed.POLL_SECONDS", 0.01)
    job, other = store.submit(SPEC).id, store.submit(SPEC).id
    polls, latest = [0], store.latest

    def counted(jobs: list[str]) -> object:
        polls[0] += 1
        return latest(jobs)

    monkeypatch.setattr(store, "latest", counted)

    async def story() -> list[list[int | str]]:
        feed = EventFeed(store)
        watchers = [asyncio.create_task(heard(feed, job, after)) for after in (0, 0, 1, 150)]
        watchers.append(asyncio.create_task(heard(feed, other)))
        store.move(job, "running")
        for index in range(250):
            store.publish(job, f"round-{index}", "round", {})
            if index % 20 == 0:
                await asyncio.sleep(0.02)
        late = asyncio.create_task(heard(feed, job))
        store.note_activity(job, Activity(what="resting"))
        before = polls[0]
        while polls[0] < before + 3:
            await asyncio.sleep(0.01)
        store.move(job, "failed")
        store.move(other, "cancelled")
        found = list(await asyncio.gather(*watchers, late))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}, "it polls while somebody watches, and no longer"
        return found

    *watchers, of_other, late = asyncio.run(story())
    for after, found in zip((0, 0, 1, 150, 0), (*watchers, late), strict=True):
        assert [each for each in found if isinstance(each, int)] == list(range(after + 1, 254))
        assert [each for each in found if isinstance(each, str)] == ["resting"]
    assert of_other == [1, 2]


@pytest.mark.slow
def test_no_more_watch_than_there_is_room_for(store: JobStore) -> None:
    job = store.submit(SPEC).id

    async def story() -> None:
        feed = EventFeed(store)
        watchers = [feed.watch(job, 0, "alice") for _ in range(MOST_OF_TENANT)]
        for watcher in watchers:
            await anext(watcher)
        with pytest.raises(ServiceBusy, match="watchers of jobs of one tenant"):
            feed.check_room("alice")
        others = [f"tenant {number}" for number in range(MOST_WATCHERS - MOST_OF_TENANT)]
        for other in others:
            feed.check_room(other)
            watchers.append(feed.watch(job, 0, other))
            await anext(watchers[-1])
        with pytest.raises(ServiceBusy, match="watchers of jobs at once"):
            feed.check_room("bob")
        await watchers[0].aclose()
        feed.check_room("bob")
        feed.check_room("alice")
        for watcher in watchers:
            await watcher.aclose()

    asyncio.run(story())


def test_a_watcher_of_a_job_that_was_tried_again_hears_its_new_end(store: JobStore) -> None:
    job = store.submit(SPEC).id
    for state in ("running", "failed", "queued", "running", "succeeded"):
        assert store.move(job, state)

    async def story() -> list[int | str]:
        return await heard(EventFeed(store), job)

    assert asyncio.run(story()) == [1, 2, 3, 4, 5, 6]


def test_a_job_that_is_deleted_ends_its_watchers_and_no_others(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainfed_ray.cluster.jobs.feed.POLL_SECONDS", 0.01)
    job, other, third = (store.submit(SPEC).id for _ in range(3))
    store.move(third, "running")
    latest = store.latest

    def deleted_since(jobs: list[str]) -> object:
        """What is new, of a job that is deleted as soon as it was looked at."""
        found = latest(jobs)
        if third in found and store.move(third, "failed"):
            found = latest(jobs)
            delete(store, third)
        return found

    async def story() -> list[list[int | str]]:
        feed = EventFeed(store)
        watcher, others = feed.watch(job, 0), asyncio.create_task(heard(feed, other))
        begun = await anext(watcher)
        store.move(job, "cancelled")
        delete(store, job)  # before anybody has looked
        monkeypatch.setattr(store, "latest", deleted_since)
        later = await asyncio.wait_for(heard(feed, third), 20)
        first = [begun.seq] if isinstance(begun, Event) else []
        first += [event.seq async for event in watcher if isinstance(event, Event)]
        store.move(other, "cancelled")
        return [first, later, await asyncio.wait_for(others, 20)]

    first, later, of_other = asyncio.run(story())
    assert first == [1]
    assert later in ([], [1], [1, 2])
    assert of_other == [1, 2]


def test_whoever_watches_is_sent_away_once_the_service_drains(
    store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chainfed_ray.cluster.jobs.feed.POLL_SECONDS", 0.01)
    job, drain = store.submit(SPEC).id, Drain(tmp_path)

    async def story() -> list[int | str]:
        feed = EventFeed(store, drain.has_begun)
        found: list[int | str] = []
        async with aclosing(feed.watch(job, 0)) as happenings:
            async for happening in happenings:
                assert isinstance(happening, Event)
                found.append(happening.seq)
                drain.begin()
        return found

    assert asyncio.run(story()) == [1]
    drain.end()
    assert not drain.has_begun()
