"""Who of a fleet takes part, and what the planner knows of a client."""

from dataclasses import replace

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import TurnRequirements, footprint
from chainfed_ray.budget.planner import ClientResources, plan
from chainfed_ray.chain import Window
from chainfed_ray.data.tokens import Examples
from chainfed_ray.planning.admission import Planner, admit
from chainfed_ray.planning.candidates import Candidate
from tests.plans import HIDDEN, LAYERS, WAYS, all_costs, all_tasks, needed, planned

PLENTY = 2**50


def a_candidate(name: str, memory: int, disk: int | None = None, lengths: tuple[int, ...] = (3, 9, 5)) -> Candidate:
    ids, offsets = np.ones(sum(lengths), dtype=np.int32), np.concatenate([[0], np.cumsum(lengths)])
    return Candidate(name, "phone", Examples(ids, offsets, np.zeros(len(lengths), dtype=np.int64)), memory, disk)


@given(all_costs(), all_tasks(), st.lists(st.integers(2**22, 2**24), max_size=4), st.data())
@planned
def test_who_is_admitted(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], memories: list[int], data: st.DataObject
) -> None:
    """Q is as many adapters as the client with the most memory can train together; who is left out can train none."""
    task, _ = job
    width = data.draw(st.integers(1, LAYERS - task.start))
    just = Window(task.start, task.start + data.draw(st.integers(1, width)) - 1)
    planner = Planner(costs, task)
    means = planner.resources(a_candidate("rich", 0))
    widest = min(footprint(costs, task, just, 1, means.longest, *way).total for way in WAYS)
    memories = [*memories, max(widest, needed(costs, task, just, means))]
    candidates = [a_candidate(str(place), size) for place, size in enumerate(memories)]
    found = admit(planner, candidates, width)
    assert {it.name for it, _ in (*found.admitted, *found.excluded)} == {it.name for it in candidates}

    richest = max(candidates, key=lambda candidate: candidate.memory)
    chances = [planner.plan(richest, Window(task.start, task.start + count - 1)) for count in range(1, width + 1)]
    possible = [count for count, best in enumerate(chances, start=1) if best and len(best.window) == count]
    assert found.width == max(possible, default=1)

    stage = Window(task.start, task.start + found.width - 1)
    for candidate, best in found.admitted:
        assert best == plan(costs, task, stage, planner.resources(candidate))
    for candidate, short in found.excluded:
        assert planner.plan(candidate, stage) is None
        enough = replace(candidate, memory=candidate.memory + short)
        assert planner.plan(enough, stage)
        assert not planner.plan(replace(enough, memory=enough.memory - 1), stage)


@given(all_costs(), all_tasks())
@planned
def test_clients_that_are_alike_have_the_same_plan(costs: MemoryProfile, job: tuple[TurnRequirements, Window]) -> None:
    """It is made once; other texts of the same number and greatest length change nothing."""
    task, stage = job
    planner = Planner(costs, task)
    one, other = a_candidate("one", PLENTY), a_candidate("other", PLENTY, lengths=(9, 1, 1))
    assert planner.plan(one, stage) is planner.plan(other, stage) is not None
    assert planner.plan(a_candidate("third", PLENTY, lengths=(9, 1, 10)), stage) is not planner.plan(one, stage)


@given(all_costs(), all_tasks(), st.integers(0, 10**5))
@planned
def test_what_the_planner_knows_of_a_client(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], disk: int
) -> None:
    """Its disk holds the cache first: the layer at hand, the next, and the stage's lowest; what is left is for spilling."""
    planner = Planner(costs, job[0])
    candidate = a_candidate("one", 2**24, disk)
    examples = len(candidate.examples)
    cache = 4 * HIDDEN * (17 * costs.itemsize + examples * (costs.head_layers - 1) * 4)
    expected = ClientResources(
        memory=2**24,
        longest=9,
        cached=cache <= disk,
        offload_disk=disk - cache if cache <= disk else disk,
        batch=min(3, planner.requirements.batch_size),
        one_step=planner.requirements.batch_size >= 3 and planner.requirements.epochs == 1,
    )
    assert planner.resources(candidate) == expected
    assert planner.resources(replace(candidate, disk=None)) == replace(expected, cached=True, offload_disk=None)
    best = planner.plan(candidate, job[1])
    assume(best)
    assert best is not None
    assert planner.disk_bytes(candidate, best) == (cache if best.prefix.cached else 0) + best.offload_bytes <= disk
