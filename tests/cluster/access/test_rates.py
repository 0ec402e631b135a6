"""Promises of the rates: so many requests a minute pass, whatever their times, and a tenant's are its own affair."""

from hypothesis import example, given
from hypothesis import strategies as st

from chainfed_ray.cluster.access.rates import Rates


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@example(1, [0.99, 0.99, 0.0])  # parts of a token that sum to a little less than one
@given(st.integers(1, 50), st.lists(st.floats(0, 30), max_size=200))
def test_no_minute_has_more_than_twice_the_limit_and_who_waits_as_told_passes(limit: int, pauses: list[float]) -> None:
    """Twice, because a tenant that has rested has a minute's requests in store."""
    clock = Clock()
    rates, passed = Rates(limit, clock), list[float]()
    for pause in pauses:
        clock.now += pause
        wait = rates.wait_seconds("a")
        if wait:
            clock.now += wait
            assert rates.wait_seconds("a") == 0
        passed.append(clock.now)
    for first in passed:
        assert len([at for at in passed if first <= at < first + 60]) <= 2 * limit + 1


def test_a_tenant_waits_for_itself_alone() -> None:
    clock = Clock()
    rates = Rates(2, clock)
    assert [rates.wait_seconds(tenant) for tenant in ("a", "a", "a", "b", "b", "b")] == [0, 0, 30, 0, 0, 30]
    clock.now = 29.0
    assert rates.wait_seconds("a") == 1
    clock.now = 30.0
    assert rates.wait_seconds("a") == 0
    assert rates.wait_seconds("a") == 30


def test_who_has_another_limit_waits_by_that() -> None:
    rates = Rates(None, Clock())
    assert [rates.wait_seconds(key, most) for key, most in (("a", 1), ("a", 1), ("b", 3), ("b", 3), ("c", None))] == [
        0, 60, 0, 0, 0,
    ]  # fmt: skip


def test_without_a_limit_all_pass() -> None:
    rates = Rates(None)
    assert not any(rates.wait_seconds("a") for _ in range(1000))
