"""Provides the activations that enter a client's window, cached or recomputed as the client's plan says."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client
from chainfed_ray.client.progress import begin
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.prefix import Activations, EmbeddedTexts, PrefixCache, PrefixRunner, RecomputedActivations
from chainfed_ray.streaming.matrices import SliceReader


def window_inputs(
    client: Client, blocks: Blocks, scratch: Path, stack: AdapterStack, matrices: SliceReader | None, stage: Window
) -> Activations:
    """The activations that enter the client's window, in a turn of ``stage``.

    They come from the prefix cache, which runs the layers that it lacks now. A client without the disk for a cache recomputes
    them for each step.
    """
    plan = client.plan
    below = stack.below(plan.window.bottom)
    reporter = begin(f"running the layers below layer {plan.window.bottom}")
    runner = prefix_runner(blocks, plan, matrices)
    if below < 0:
        return EmbeddedTexts(blocks, client.examples)
    if not plan.prefix.cached:
        return RecomputedActivations(below, stack, runner, client.examples)
    return PrefixCache(scratch, runner, client.examples).at(below, stack, stack.below(stage.bottom), reporter)


def prefix_runner(blocks: Blocks, plan: TurnPlan, matrices: SliceReader | None) -> PrefixRunner:
    """Runs the layers below the window in the way that ``plan`` says."""
    return PrefixRunner(blocks, plan.prefix.batch, matrices if plan.prefix.weights == "streamed" else None)


@contextmanager
def matrix_reader(blocks: Blocks, plan: TurnPlan) -> Iterator[SliceReader | None]:
    """Opens a reader of matrices if ``plan`` streams any; yields None otherwise."""
    if not plan.footprint.buffers and plan.prefix.weights == "resident":
        yield None
        return
    opened = blocks.reader()
    try:
        yield opened
    finally:
        opened.close()
