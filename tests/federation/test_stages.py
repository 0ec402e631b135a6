"""The course of rounds follows from the rounds so far: every window has its turn, and no round is lost or too many."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.chain import Chain, Direction
from chainfed_ray.federation.stages import RoundSpec, StageSchedule
from chainfed_ray.records.rounds import Round
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC, a_round, a_start

LAYERS, WIDTH = 6, 2
OPENING = a_start()


def a_course(start: int, total: int, **rounds: Any) -> StageSchedule:
    document = SPEC.document()
    document["chain"] |= {"start": start, "schedule": rounds.pop("schedule", "staged")}
    document["rounds"] |= {"total": total, **rounds}
    spec = parse_job(document)
    return StageSchedule(spec.rounds, spec.chain.schedule, Chain(LAYERS, start, WIDTH), total)


def ran(upcoming: RoundSpec, ended: str | None, counted: bool = True) -> Round:
    window = upcoming.window
    return a_round(
        upcoming.round_index,
        OPENING,
        stage=upcoming.stage,
        bottom=window.bottom,
        top=window.top,
        ended=ended,
        counted=counted,
    )


@pytest.mark.slow
@given(st.integers(0, 4), st.integers(1, 30), st.sets(st.integers(0, 29)))
def test_each_window_has_its_stage_and_all_rounds_are_used(start: int, total: int, converges: set[int]) -> None:
    """Whichever stages converge early, before the last: what they did not need is the last one's."""
    course = a_course(start, total)
    history = list[Round]()
    opened = list[int]()
    while (upcoming := course.next(history)) is not None:
        if course.starts_head(upcoming, history):
            opened.append(upcoming.window.top)
        last = upcoming.window.top == LAYERS - 1
        early = "converged" if len(history) in converges and not last else None
        history.append(ran(upcoming, early or course.ended(upcoming, 0, [], None)))
    stages = min(total, LAYERS - WIDTH - start + 1)
    assert len(history) == total
    assert opened == list(range(LAYERS - stages, LAYERS))
    assert sum(record.ended is not None for record in history) == stages
    assert history[-1].ended == "round limit"


@pytest.mark.slow
@given(st.integers(0, 4), st.integers(1, 30))
def test_windows_that_take_turns_begin_once_and_end_at_the_top(start: int, total: int) -> None:
    course = a_course(start, total, schedule="cyclic")
    history = list[Round]()
    opened = 0
    while (upcoming := course.next(history)) is not None:
        opened += course.starts_head(upcoming, history)
        history.append(ran(upcoming, course.ended(upcoming, 99, [1.0] * 99, 0.0)))
    assert (len(history), opened) == (total, 1)
    assert history[-1].top == LAYERS - 1
    assert [record.ended for record in history] == [None] * (total - 1) + ["round limit"]
    assert not course.restores_best


@pytest.mark.parametrize("lost", [0, 1])
def test_a_span_counts_the_rounds_that_had_a_quorum(lost: int) -> None:
    course = a_course(4, 20, convergence={"rule": "movement", "span": 3})
    history = list[Round]()
    opens = list[bool]()
    for index in range(7):
        upcoming = course.next(history)
        assert upcoming is not None
        opens.append(course.starts_span(upcoming, history))
        history.append(ran(upcoming, None, counted=index >= lost))
    assert opens == [index == 0 or (index - lost) % 3 == 0 for index in range(7)]


@given(start=st.integers(0, LAYERS - WIDTH), total=st.integers(1, 40), direction=st.sampled_from(["up", "down"]))
def test_the_rounds_of_a_cyclic_schedule_are_foretold(start: int, total: int, direction: Direction) -> None:
    chain = Chain(LAYERS, start, WIDTH, direction=direction, look_ahead="exact")
    visits = [chain.cyclic(index, total) for index in range(total)]
    found = {stage.window: stage.rounds for stage in chain.cycled(total)}
    assert found == {window: visits.count(window) for window in chain.windows if window in visits}
