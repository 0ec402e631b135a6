"""How long a run is under each protocol: arithmetic, checked against what it promises."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy_protocols import Costs, Spent, costs, points, rounds_for, rounds_for_steps

amounts = st.floats(0.01, 1e6)


@pytest.mark.slow
@given(target=amounts, fixed=amounts, a_round=amounts, stages=st.integers(1, 12), usual=st.integers(1, 500))
def test_a_run_spends_what_its_protocol_says(
    target: float, fixed: float, a_round: float, stages: int, usual: int
) -> None:
    rounds = rounds_for(target, fixed, a_round, stages, usual)
    most = max(25 * usual, stages)
    assert stages <= rounds <= most
    off = fixed + rounds * a_round - target
    if stages < rounds < most:
        assert abs(off) <= a_round * 0.501
    elif rounds == most > stages:
        assert off <= a_round * 0.501
    else:
        assert off >= -a_round * 0.501


def test_what_costs_nothing_is_not_run_for_ever() -> None:
    assert rounds_for(100, 1, 0, stages=1, usual=40) == 1000
    assert rounds_for(1, 100, 0, stages=3, usual=40) == 3


@given(client_steps=st.integers(1, 100_000), steps_a_round=st.integers(1, 300))
def test_equal_steps(client_steps: int, steps_a_round: int) -> None:
    rounds = rounds_for_steps(client_steps, steps_a_round)
    assert rounds == 1 or abs(rounds * steps_a_round - client_steps) <= steps_a_round / 2


@pytest.mark.slow
@given(
    step=st.floats(0.01, 10),
    advances=st.lists(st.floats(0, 100), min_size=1, max_size=5),
    profile=st.floats(0, 10),
    clients=st.integers(2, 20),
    rounds=st.integers(2, 6),
)
def test_what_is_paid_once_is_told_from_what_is_paid_for_each_step(
    step: float, advances: list[float], profile: float, clients: int, rounds: int
) -> None:
    names = [f"client-{index}" for index in range(clients)]
    turns = [Spent(name, None, 0, profile, 8) for name in names]
    for stage, advance in enumerate(advances):
        for index in range(rounds):
            turns += [Spent(name, stage, 3, 3 * step + advance * (index == 0), 100) for name in names]
    found = costs(turns, clients, rounds * len(advances))
    assert found == Costs(
        fixed_cpu_seconds=pytest.approx(clients * (profile + sum(advances)), abs=1e-6),
        step_cpu_seconds=pytest.approx(step, rel=1e-6),
        fixed_bytes=8 * clients,
        bytes_per_round=100 * clients,
    )


def test_clients_that_had_no_turn_yet_have_their_advance_to_pay() -> None:
    turns = [Spent("a", 0, 3, 10, 0), Spent("a", 0, 3, 4, 0), Spent("a", 0, 3, 2, 0)]
    assert costs(turns, clients=20, rounds=3)[:2] == (20 * 7, pytest.approx((16 - 7) / 9))


@given(rounds=st.integers(1, 1000))
def test_a_run_is_evaluated_some_twelve_times_and_at_its_end(rounds: int) -> None:
    due = points(rounds)
    assert max(due) == rounds
    assert min(due) >= 1
    assert len(due) == min(rounds, 12)
