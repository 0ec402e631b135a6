"""The planner: it never plans beyond what a client has, and says exactly what a client lacks."""

import ast
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chainfed_ray.budget.demand import NOTHING, BytePolynomial, MemoryProfile, PartMemory, StepMemory
from chainfed_ray.budget.footprint import TurnRequirements, WeightPlacement, footprint
from chainfed_ray.budget.planner import ClientResources, fallback_plan, plan, shortfall
from chainfed_ray.chain import Window
from tests.plans import HIDDEN, ITEMSIZE, LAYERS, ROW, WAYS, all_costs, all_means, all_tasks, demand, needed, planned
from tests.project import ROOT


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means)
@planned
def test_a_plan_fits(costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources) -> None:
    task, stage = job
    found = plan(costs, task, stage, means)
    assume(found)
    assert found is not None
    assert found.planned_bytes <= means.memory
    assert found.prefix.planned_bytes <= found.planned_bytes
    assert found.prefix.profile_bytes <= means.memory
    assert found.prefix.cached == means.cached
    assert means.offload_disk is None or found.offload_bytes <= means.offload_disk
    assert (found.offload_bytes > 0) <= (found.activations == "offloaded")
    assert 1 <= found.micro_batch <= means.batch
    assert found.window.top == stage.top
    assert found.window.bottom >= stage.bottom
    assert found.footprint.total == sum(found.footprint.parts().values())
    assert all(size >= 0 for size in found.footprint.parts().values()), found.footprint


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means)
@planned
def test_what_is_lacking_is_exact(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources
) -> None:
    """With that many bytes more there is a plan, and with one byte less than that there is none."""
    task, stage = job
    short = shortfall(costs, task, stage, means)
    assert (short == 0) == (plan(costs, task, stage, means) is not None)
    assume(short)
    assert short > 0
    assert plan(costs, task, stage, replace(means, memory=means.memory + short))
    assert not plan(costs, task, stage, replace(means, memory=means.memory + short - 1))


def test_a_client_that_is_asked_for_a_profile_can_make_it() -> None:
    """The means of an example's tokens are float64 numbers: of a long text they take more than a step with a small model."""
    costs = replace(COSTS, itemsize=2, layer=1, unstreamed=0, slices=0, adapter=1, call=NOTHING)
    task, stage, longest = TurnRequirements(0, 8, 1, False, False, profiles=8), Window(0, 0), 4000
    means = ClientResources(memory=0, longest=longest, cached=True, offload_disk=None, batch=1, one_step=False)
    least = needed(costs, task, stage, means)
    assert least > needed(costs, replace(task, profiles=0), stage, means)
    assert plan(costs, task, stage, replace(means, memory=least))
    assert not plan(costs, task, stage, replace(means, memory=least - 1))


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means, st.integers(1, 2**26))
@planned
def test_more_memory_never_trains_less(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources, more: int
) -> None:
    task, stage = job
    less, richer = (plan(costs, task, stage, it) for it in (means, replace(means, memory=means.memory + more)))
    assume(less)
    assert less is not None
    assert richer is not None
    assert len(richer.window) >= len(less.window)


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means, st.integers(1, 64))
@planned
def test_longer_texts_never_need_less(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources, more: int
) -> None:
    task, stage = job
    assert needed(costs, task, stage, replace(means, longest=means.longest + more)) >= needed(costs, task, stage, means)


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means, st.sampled_from(["resident", "streamed"]))
@planned
def test_a_step_with_more_in_it_never_needs_less(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources, weights: WeightPlacement
) -> None:
    """A wider window, another example, a longer chain, a global branch, and one that is trained."""
    task, stage = job
    task = replace(task, global_branch=False, trains_above=False)

    def total(task: TurnRequirements = task, window: Window = stage, batch: int = 2) -> int:
        return footprint(costs, task, window, batch, means.longest, weights, "kept").total

    assert total(batch=3) >= total()
    ahead = replace(task, global_branch=True)
    assert total(ahead) >= total()
    if stage.bottom > task.start:
        assert total(window=Window(stage.bottom - 1, stage.top)) >= total()
    if task.start:
        assert total(replace(task, start=task.start - 1)) >= total() + costs.adapter


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means)
@planned
def test_a_leaner_plan_needs_two_thirds(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources
) -> None:
    task, stage = job
    best = plan(costs, task, stage, means)
    assume(best)
    assert best is not None
    found = fallback_plan(costs, task, stage, means, best)
    possible = needed(costs, task, stage, means) <= best.planned_bytes * 2 // 3
    assert (found is not None) == possible
    if found:
        assert 3 * found.planned_bytes <= 2 * best.planned_bytes
        assert found.window.top == best.window.top


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means, st.data())
@planned
def test_nothing_better_fits(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources, data: st.DataObject
) -> None:
    """The widest window first, then the fastest way, then the largest micro-batch; at a budget that some plan just fits."""
    task, stage = job
    means = replace(means, cached=True, one_step=False, offload_disk=None)
    sizes = [means.batch >> halvings for halvings in range(means.batch.bit_length())]
    choices = [(Window(low, stage.top), way, size) for low in stage for way in WAYS for size in sizes]
    parts = [footprint(costs, task, window, size, means.longest, *way) for window, way, size in choices]
    totals = [part.total for part in parts]
    budget = max(data.draw(st.sampled_from(totals)), needed(costs, task, stage, means))
    found = plan(costs, task, stage, replace(means, memory=budget))
    assert found is not None
    if found.prefix.weights == "streamed":  # its buffers stay for the steps
        totals = [part.total - part.buffers + costs.slices for part in parts]
    first = next(choice for choice, total in zip(choices, totals, strict=True) if total <= budget)
    assert (found.window, (found.weights, found.activations), found.micro_batch) == first


@pytest.mark.slow
@given(all_costs(), all_tasks(), all_means)
@planned
def test_a_prefix_made_for_each_step_is_made_beside_what_the_turn_keeps(
    costs: MemoryProfile, job: tuple[TurnRequirements, Window], means: ClientResources
) -> None:
    task, stage = job
    found = plan(costs, task, stage, replace(means, cached=False, one_step=False))
    assume(found)
    assert found is not None
    parts = found.footprint
    activations = parts.cache_pages + parts.saved_activations + parts.transients
    stack = (LAYERS - task.start) * costs.adapter + costs.head
    assert found.prefix.planned_bytes - stack - parts.runtime <= activations


def flat(saved: int, forward: int, backward: int) -> PartMemory:
    """Of so many bytes, whatever the shape."""
    return PartMemory(BytePolynomial(((saved,),)), (BytePolynomial(((forward,),)),), (BytePolynomial(((backward,),)),))


# A window of two adapters, three stand-ins above: adapter, layer, adapter, head, 3 stand-ins, head.
@pytest.mark.parametrize(
    ("changed", "peak", "saved"),
    [
        ({}, 10 + 900, 10 + 100),  # the layer's backward pass
        ({"adapter": flat(10, 2000, 300)}, 10 + 100 + 2000, 120),  # the second adapter's forward pass
        ({"head": flat(5, 1500, 160)}, 128 + ROW + 1500, 133),  # the global head's, while the window's output waits
        ({"head": flat(5, 150, 1700)}, 120 + ROW + 1700, 125),  # the local head's, while the other gradient waits
        ({"emulator": flat(1, 130, 1800)}, 127 + 1800, 128),  # the last stand-in's
    ],
)
def test_the_highest_moment_of_a_step(changed: dict[str, PartMemory], peak: int, saved: int) -> None:
    parts = {"adapter": flat(10, 200, 300), "layer": flat(100, 400, 900), "head": flat(5, 150, 160)}
    kept = StepMemory(**{**parts, "emulator": flat(1, 130, 140), **changed})
    costs = replace(COSTS, kept=kept, call=NOTHING)
    found = footprint(
        costs,
        TurnRequirements(1, 8, 1, True, False, False),
        Window(1, 2),
        1,
        1,
        "resident",
        "kept",
    )
    assert found.cache_pages + found.saved_activations + found.transients == peak
    assert found.cache_pages + found.saved_activations == saved


COSTS = MemoryProfile(
    layers=LAYERS,
    hidden=HIDDEN,
    itemsize=ITEMSIZE,
    layer=50_000,
    unstreamed=700,
    slices=9_000,
    conversion=0,
    skeleton=30,
    call=BytePolynomial(((0, 0, 0), (0, 0, 3))),
    adapter=1000,
    head=80,
    head_layers=1,
    streamed_head=False,
    inside=False,
    kept=StepMemory(*[demand(0, 0, 0, 0, 0)] * 4),
    activations_offloaded=StepMemory(*[demand(0, 0, 0, 0, 0)] * 4),
    advance=demand(0, 0, 0, 0, 0),
    advance_adapter=demand(0, 0, 0, 0, 0),
)


def test_the_parts_of_a_step() -> None:
    """Two adapters of a chain of five are trained, with the head, or with the three above; or the head is streamed."""
    task, window = TurnRequirements(1, 8, 1, False, False, False), Window(1, 2)

    def parts(costs: MemoryProfile = COSTS, task: TurnRequirements = task, **way: Any) -> dict[str, int]:
        found = footprint(costs, task, window, 2, 10, **{"weights": "resident", "activations": "kept", **way}).parts()
        assert all(size >= 0 for size in found.values())
        return found

    plain = parts()
    assert plain == {
        "layer_weights": 50_000,
        "buffers": 0,
        "adapters": 5000 + 2000,
        "head": 2 * 80,
        "gradients": 2080,
        "optimizer": 2 * 2080,
        "cache_pages": 20 * ROW,
        "saved_activations": 0,
        "transients": plain["transients"],
        "runtime": plain["runtime"],
    }
    assert parts(weights="streamed") == {**plain, "layer_weights": 700, "buffers": 9000}
    above = parts(task=replace(task, global_branch=True, trains_above=True))
    assert (above["adapters"], above["gradients"], above["optimizer"]) == (10_000, 5080, 2 * 5080)
    language = parts(replace(COSTS, head=0, streamed_head=True))
    assert (language["head"], language["gradients"], language["buffers"]) == (0, 2000, 9000)
    offloaded = parts(weights="streamed", activations="offloaded")
    assert offloaded["cache_pages"] == 0


def test_no_part_is_negative_when_the_first_moment_is_the_highest() -> None:
    kept = replace(COSTS.kept, adapter=flat(0, 500, 3 * ROW))
    found = footprint(
        replace(COSTS, kept=kept),
        TurnRequirements(5, 8, 1, False, False, False),
        Window(5, 5),
        1,
        1,
        "resident",
        "kept",
    )
    assert (found.cache_pages, found.saved_activations) == (ROW, 0)
    assert found.cache_pages + found.transients == 500 + 3


@pytest.mark.parametrize(
    ("module", "imports"),
    [
        ("planner", {"chainfed_ray.chain", "chainfed_ray.budget.demand", "chainfed_ray.budget.footprint"}),
        ("footprint", {"chainfed_ray.chain", "chainfed_ray.budget.demand"}),
        ("demand", set()),
    ],
)
def test_the_planner_knows_no_tensors(module: str, imports: set[str]) -> None:
    """Of what is not Python's own, it imports the window and what its parts take, which needs nothing itself."""
    tree = ast.parse((ROOT / "chainfed_ray" / "budget" / f"{module}.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module for module in modules if module.partition(".")[0] not in sys.stdlib_module_names} == imports
