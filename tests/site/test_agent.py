"""The process at a site takes orders, and leaves."""

from collections.abc import Callable, Collection
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from chainfed_ray.site import agent
from chainfed_ray.site.agent import Agent, Offer
from chainfed_ray.site.policy import Policy
from chainfed_ray.wire.envelope import NextOrder


class Silent:
    """A connection to a service that has no order, and may not answer. ``asked`` is called with the jobs of each question."""

    def __init__(self, asked: Callable[[Collection[str]], NextOrder]) -> None:
        self._asked = asked

    def next(self, wait: float, running: Collection[str], jobs: Collection[str]) -> NextOrder:
        return self._asked(jobs)

    def leave(self) -> None:
        return


@pytest.fixture
def offer(tmp_path: Path) -> Offer:
    (tmp_path / "slots-1" / "0" / "job-1").mkdir(parents=True)  # of a process that takes this one's place
    (tmp_path / "told").mkdir()
    for name in ("job-1.0123456789abcdef", "job-2.0123456789abcdef", ".nfs000000.1", ".DS_Store"):
        (tmp_path / "told" / name).write_text("digest")
    return Offer(tmp_path, tmp_path, parts=1, slots=1, tells_classes=True, policy=Policy())


def left(offer: Offer, asked: Callable[[Collection[str], Event], NextOrder]) -> None:
    stop = Event()
    connection: Any = Silent(lambda jobs: asked(jobs, stop))
    Agent(connection, offer, stop, lambda words: None).run()


def test_jobs_that_ended_while_the_site_was_away_are_forgotten_and_a_site_that_leaves_keeps_no_caches(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "token_hex", lambda count: "own")

    def asked(jobs: Collection[str], stop: Event) -> NextOrder:
        assert set(jobs) == {"job-1", "job-2"}
        (offer.scratch / "slots-own" / "0" / "job-1").mkdir(parents=True)
        stop.set()
        return NextOrder(over=("job-2",))

    left(offer, asked)
    left_over = {file.name for file in (offer.scratch / "told").iterdir()}
    assert left_over == {"job-1.0123456789abcdef", ".nfs000000.1", ".DS_Store"}
    assert [folder.name for folder in offer.scratch.glob("slots-*")] == ["slots-1"]


def test_a_service_that_does_not_answer_holds_up_no_site_that_leaves(
    offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "_LEAVE_SECONDS", 0.01)
    answers = Event()

    def asked(jobs: Collection[str], stop: Event) -> NextOrder:
        stop.set()
        answers.wait(30)
        return NextOrder()

    left(offer, asked)
    assert not answers.is_set()
    answers.set()
