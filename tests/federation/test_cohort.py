"""Promises of an unreliable fleet: who does not answer, or is late, costs its own turn, and the job goes on."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Profile, Profiling, Training
from chainfed_ray.client.pool import Failure, LocalPool
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation.cohort import Cohort, Sampler
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.planning import duration
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.planning.pace import EvaluationPace, Pace
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.seeds import derive
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, assert_same, run, run_some, story
from tests.pools import Foreseeing, Heard


@pytest.fixture
def unreliable(document: dict[str, Any]) -> dict[str, Any]:
    """A job whose clients answer every other time: rounds 1 and 4 have no quorum."""
    document["fleet"]["clients"][0]["availability"] = 0.5
    document["rounds"] |= {"total": 6, "clients": 4, "quorum": 2}
    return document


def answers(index: int, client: int, seed: int = 3) -> bool:
    """What becomes of a client in a round, from the seed alone."""
    return np.random.default_rng(derive(seed, "available", index, f"phone-{client}")).random() < 0.5


@pytest.mark.slow
def test_who_does_not_answer_is_lost_and_the_job_goes_on(unreliable: dict[str, Any], tmp_path: Path) -> None:
    job, log = a_job(unreliable, tmp_path), CommitLog(tmp_path / "log")
    pool = Heard(LocalPool(job.base))
    records = list(Coordinator(job, pool, log).rounds())
    for record in records:
        there = [f"phone-{client}" for client in range(4) if answers(record.index, client)]
        assert [turn.client for turn in record.turns] == there == pool.asked[record.index]
        assert [lost.client for lost in record.failed_turns] == [
            f"phone-{i}" for i in range(4) if f"phone-{i}" not in there
        ]
        assert {lost.reason for lost in record.failed_turns} <= {"the client did not answer: its availability is 0.5"}
        assert not any(lost.over_budget for lost in record.failed_turns), "it is asked again"
    assert [record.counted for record in records] == [False, True, True, False, True, True]
    assert [record.accuracy is not None for record in records] == [record.counted for record in records]
    assert log.rounds() == records


@pytest.mark.slow
def test_resumed_is_never_interrupted(unreliable: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted after a round without a quorum, and before one."""
    _, expected = run(a_job(unreliable, tmp_path / "a"), tmp_path / "a" / "log")
    log = tmp_path / "b" / "log"
    for process, rounds in (("b", 1), ("c", 2)):
        run_some(a_job(unreliable, tmp_path / process), log, rounds)
    _, resumed = run(a_job(unreliable, tmp_path / "d"), log)
    assert_same(resumed, expected)
    assert story(log) == story(tmp_path / "a" / "log")


@pytest.mark.slow
def test_a_fleet_that_never_answers_ends_the_job(unreliable: dict[str, Any], tmp_path: Path) -> None:
    unreliable["fleet"]["clients"][0]["availability"] = 1e-9
    job = a_job(unreliable, tmp_path)
    log = CommitLog(tmp_path / "log")
    with pytest.raises(
        QuorumLost, match=r"rounds 1 to 3: .*phone-2: the client did not answer: its availability is 1e-09"
    ):
        list(Coordinator(job, LocalPool(job.base), log).rounds())
    assert [len(record.failed_turns) for record in log.rounds()] == [4, 4, 4]


@pytest.fixture
def job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    return a_job(document, tmp_path)


def cohorts(job: PlannedJob, candidates: list[Candidate], rounds: int = 400) -> Iterator[Cohort]:
    sampler = Sampler.of(job.spec, job.spec.seed)
    for index in range(rounds):
        yield Cohort.of(sampler, job.planner, candidates, index, Window(1, 2), [])


@pytest.mark.slow
def test_clients_answer_as_often_as_is_said_and_independently(job: PlannedJob) -> None:
    fleet = [candidate for candidate, _ in job.admitted]
    always = list(cohorts(job, fleet))
    half = list(cohorts(job, [replace(candidate, availability=0.5) for candidate in fleet]))
    mixed = list(
        cohorts(job, [replace(fleet[0], availability=0.1), *(replace(c, availability=0.5) for c in fleet[1:])])
    )
    assert not any(cohort.absent for cohort in always)
    share = sum(len(cohort.clients) for cohort in half) / (3 * 400)
    assert share == pytest.approx(0.5, abs=0.05)
    for first, second, third in zip(always, half, mixed, strict=True):
        assert first.sampled == tuple(replace(candidate, availability=1.0) for candidate in second.sampled)
        absent = {client.name for client, _ in second.absent}
        assert absent.isdisjoint(client.name for client in second.clients)
        assert absent | {client.name for client in second.clients} == {candidate.name for candidate in first.sampled}
        others = {client.name for client, _ in third.absent} - {fleet[0].name}
        assert others == absent - {fleet[0].name}, "nobody else's availability changes whether a client answers"
    least = sum(fleet[0].name in {client.name for client in cohort.clients} for cohort in mixed)
    assert least < 0.2 * sum(fleet[0].name in {one.name for one in cohort.sampled} for cohort in mixed)


@pytest.mark.parametrize(("key", "value"), [("availability", 0), ("availability", 1.1), ("speed", 0), ("speed", 2)])
def test_what_cannot_be_simulated_is_refused(document: dict[str, Any], key: str, value: float) -> None:
    document["fleet"]["clients"][0][key] = value
    with pytest.raises(InvalidJob, match=rf"fleet\.clients\[0\]\.{key} is {value}; expected (greater|less) than "):
        parse_job(document)


@pytest.fixture
def with_a_snail(document: dict[str, Any]) -> dict[str, Any]:
    """Two clients of this machine's speed, and one that is ten million times slower."""
    document["fleet"]["clients"] = [
        {"name": "phone", "count": 2, "memory": "64MiB"},
        {"name": "snail", "memory": "64MiB", "speed": 1e-7},
    ]
    document["rounds"] |= {"total": 3, "clients": 3, "quorum": 2, "deadline": "1h"}
    return document


@pytest.mark.slow
def test_who_is_too_slow_misses_the_deadline(with_a_snail: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(with_a_snail, tmp_path)
    records = list(Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).rounds())
    for record in records:
        assert record.counted
        assert [turn.client for turn in record.turns] == ["phone-0", "phone-1"]
        assert [(lost.client, lost.reason) for lost in record.failed_turns] == [
            ("snail-0", "missed the deadline of 3600 s")
        ]


@pytest.mark.slow
def test_slowness_changes_seconds_and_nothing_else(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"deadline": "10h"}
    quick, expected = run(a_job(document, tmp_path / "a"), tmp_path / "a" / "log")
    document["fleet"]["clients"][0]["speed"] = 0.01
    _, found = run(a_job(document, tmp_path / "b"), tmp_path / "b" / "log")
    assert_same(found, expected)
    seconds, slower = (
        sum(turn.seconds for record in CommitLog(tmp_path / name / "log").rounds() for turn in record.turns)
        for name in ("a", "b")
    )
    assert slower > 10 * seconds
    assert quick.open().partition_hash == CommitLog(tmp_path / "b" / "log").job_started().partition_hash


@pytest.mark.slow
def test_a_profile_may_come_too_late_as_well(with_a_snail: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(with_a_snail, tmp_path)
    *phones, snail = LocalPool(job.base).run(job.clients, Profiling(8, 0), 3600.0)
    assert all(isinstance(outcome.result, Profile) for outcome in phones)
    assert snail.result == Failure("missed the deadline of 3600 s")


@pytest.mark.slow
def test_the_dry_run_waits_for_the_slow(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clients in four take ten times as long: with both sampled at once, five rounds in six wait for one of them."""
    document["fleet"]["clients"] = [
        {"name": "phone", "count": 2, "memory": "64MiB"},
        {"name": "snail", "count": 2, "memory": "64MiB", "speed": 0.1},
    ]
    document["rounds"] |= {"total": 6, "clients": 2, "deadline": "20s"}
    monkeypatch.setattr(duration, "evaluation_pace", lambda *_: EvaluationPace(0, 0, 0, 0))
    for turn, slow in ((1.0, 10.0), (3.0, 20.0)):  # where 30 s would be too late
        pace = Pace(turn=turn, step=0, layer=0, load=0)
        monkeypatch.setattr(duration, "pace_of", lambda *_, found=pace: found)
        told = duration.duration(a_job(document, tmp_path), at_once=2)
        assert told.seconds == pytest.approx(6 * (5 / 6 * slow + 1 / 6 * turn))
        alone = duration.duration(a_job(document, tmp_path), at_once=1)
        assert alone.seconds == pytest.approx(6 * (turn + slow))
    monkeypatch.setattr(duration, "pace_of", lambda *_: Pace(turn=0, step=1, layer=0, load=0))
    steps = duration.duration(a_job(document, tmp_path), at_once=2).micro_steps
    assert steps["snail"] == pytest.approx(10 * steps["phone"])


@pytest.mark.slow
def test_a_pool_hears_what_a_round_and_the_next_one_need_before_they_begin(
    document: dict[str, Any], tmp_path: Path
) -> None:
    document["fleet"] = {
        "clients": [{"name": name, "count": 3, "memory": "64MiB"} for name in ("phone", "laptop", "server")]
    }
    document["rounds"] |= {"clients": 2, "quorum": 2}
    job = a_job(document, tmp_path)
    pool = Foreseeing(LocalPool(job.base))
    run(job, tmp_path / "log", pool)
    asked = [classes for order, classes in pool.calls if isinstance(order, Training)]
    assert len(asked) == 4
    assert len({tuple(sorted(classes.items())) for classes in asked}) > 1, (
        "rounds that need the same would show nothing"
    )
    nothing = Counter[str]()
    after = [*asked[1:], nothing]
    before_and_after = [each for now, then in zip(asked, after, strict=True) for each in (now | then, then)]
    assert pool.expected == [*before_and_after, nothing]


@pytest.mark.slow
def test_a_stage_that_begins_with_a_fitted_head_is_expected_to_need_everyone(
    document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"] |= {"head": "fitted"}
    document["rounds"] |= {"clients": 2, "quorum": 2}
    job = a_job(document, tmp_path)
    pool = Foreseeing(LocalPool(job.base))
    coordinator, _ = run(job, tmp_path / "log", pool)
    stages = [record.stage for record in CommitLog(tmp_path / "log").rounds()]
    assert coordinator.open().stages == len(set(stages)) == 2
    last = stages.index(1) - 1
    assert pool.expected[2 * last + 1] == {"phone": 4}
    assert pool.expected[1] == ({"phone": 4} if last == 0 else {"phone": 2})
