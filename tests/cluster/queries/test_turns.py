"""Promises about whose turn it is: no tenant starves, whatever others do, and priority orders the jobs of one."""

from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chainfed_ray.cluster.jobs.control import delete
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.turns import next_tenant
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC

TENANTS = "abcd"


@pytest.fixture
def store(database: str) -> Iterator[JobStore]:
    made = JobStore(database)
    yield made
    made.close()


@pytest.mark.slow
@given(places=st.integers(1, 4), acts=st.lists(st.sampled_from([*TENANTS, "end first", "end last"]), max_size=200))
def test_no_tenant_starves(places: int, acts: list[str]) -> None:
    """Whoever waits with nothing at work sees every other tenant begin one job at most before it begins its own.

    A tenant submits jobs as it likes; jobs end as they like. A free place is given away at once.
    """
    waiting, at_work, turns = Counter[str](), deque[str](), dict[str, int]()
    passed: dict[str, Counter[str]] = {}
    for act in acts:
        if act.startswith("end"):
            if at_work:
                at_work.popleft() if act == "end first" else at_work.pop()
        else:
            waiting[act] += 1
        while len(at_work) < places and (those := [tenant for tenant in TENANTS if waiting[tenant]]):
            counts = Counter(at_work)
            chosen = next_tenant(those, counts, turns)
            assert counts[chosen] == min(counts[tenant] for tenant in those), "who has fewer at work goes first"
            turns[chosen] = max(turns.values(), default=0) + 1
            waiting[chosen] -= 1
            at_work.append(chosen)
            passed.pop(chosen, None)
            for tenant in those:
                if tenant != chosen and not counts[tenant]:
                    seen = passed.setdefault(tenant, Counter())
                    seen[chosen] += 1
                    assert seen[chosen] == 1, f"{chosen} began twice while {tenant} waited with nothing at work"


@pytest.mark.slow
@settings(deadline=None, max_examples=25)
@given(jobs=st.lists(st.tuples(st.sampled_from("ab"), st.integers(-100, 100)), max_size=12))
def test_priority_orders_the_jobs_of_a_tenant_and_no_others(
    tmp_path_factory: pytest.TempPathFactory, jobs: list[tuple[str, int]]
) -> None:
    store = JobStore(f"sqlite:///{tmp_path_factory.mktemp('turns') / 'jobs.db'}")
    submitted: dict[str, list[tuple[int, int, str]]] = {"a": [], "b": []}
    for number, (tenant, priority) in enumerate(jobs):
        spec = parse_job({**SPEC.document(), "priority": priority})
        job = store.seen_by(tenant, everything=False).submit(spec).id
        submitted[tenant].append((-priority, number, job))
    begun: list[tuple[str, str]] = []
    while found := store.turns.next({}, most=None):
        begun.append(found)
        assert store.move(found[0], "validating")
        store.turns.take(found[1])
    for tenant in "ab":
        assert [job for job, of in begun if of == tenant] == [job for *_, job in sorted(submitted[tenant])]
    both = 2 * min(map(len, submitted.values()))
    assert [tenant for _, tenant in begun[:both]] == ["a", "b"] * (both // 2), "by turns, while both have jobs"
    store.close()


@pytest.mark.slow
def test_turns_outlive_the_jobs_that_they_were_of(store: JobStore) -> None:
    """A tenant that deletes its jobs does not look as if it had had no turn."""
    first, second = (store.seen_by(tenant, everything=False) for tenant in ("first", "second"))
    gone = first.submit(SPEC).id
    assert store.turns.next({}, None) == (gone, "first")
    store.move(gone, "cancelled")
    store.turns.take("first")
    delete(first, gone)
    store.deletions.purge(gone)
    job, other = first.submit(SPEC).id, second.submit(SPEC).id
    assert store.turns.next({}, None) == (other, "second")
    assert store.turns.next({"second": 1}, None) == (job, "first"), "who has fewer at work"
    assert store.turns.next({"first": 1}, None, besides=[other]) == (job, "first")
    assert store.turns.next({"first": 1}, most=1, besides=[other]) is None
