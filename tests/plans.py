"""Hypothesis strategies for the planner: memory profiles of base models, jobs' requirements and clients' resources."""

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st

from chainfed_ray.budget.demand import NOTHING, BytePolynomial, MemoryProfile, PartMemory, StepMemory
from chainfed_ray.budget.footprint import SavedActivations, TurnRequirements, WeightPlacement
from chainfed_ray.budget.planner import ClientResources, shortfall
from chainfed_ray.chain import Window

LAYERS, HIDDEN, ITEMSIZE = 6, 16, 4
ROW = HIDDEN * ITEMSIZE
WAYS: tuple[tuple[WeightPlacement, SavedActivations], ...] = (
    ("resident", "kept"),
    ("streamed", "kept"),
    ("resident", "recomputed"),
    ("streamed", "recomputed"),
    ("streamed", "offloaded"),
)


def demand(saved: int, constant: int, forward: int, backward: int, squares: int) -> PartMemory:
    """The memory of a part of a turn. It saves ``saved`` bytes a token for the backward pass.

    Beside its input and output it holds ``forward`` and ``backward`` more bytes a token while it runs. ``constant`` is its
    own bytes, and ``squares`` are bytes for each pair of tokens.
    """

    def terms(*, per_token: int, own: int, per_pair: int) -> BytePolynomial:
        return BytePolynomial(((own, 0, 0), (0, per_token, per_pair)))

    return PartMemory(
        saved=terms(per_token=saved, own=constant, per_pair=squares),
        forward=(
            terms(per_token=2 * ROW + saved + forward, own=constant, per_pair=squares),
            terms(per_token=2 * ROW + saved, own=constant, per_pair=2 * squares),
        ),
        backward=(terms(per_token=2 * ROW + saved + backward, own=constant, per_pair=squares),),
    )


def on_disk(part: PartMemory) -> PartMemory:
    """The same part with its activations offloaded to disk. The backward pass reads at most half of them at a time."""
    per_token = 2 * ROW + part.saved.terms[1][1] // 2
    return replace(part, saved=NOTHING, backward=(BytePolynomial(((0, 0, 0), (0, per_token, part.saved.terms[1][2]))),))


def few(most: int) -> st.SearchStrategy[int]:
    """Whole numbers from 0 to ``most``."""
    return st.integers(0, most)


demands = st.builds(demand, few(12 * ROW), few(200), few(4 * ROW), few(4 * ROW), few(16))


@st.composite
def all_costs(draw: st.DrawFn) -> MemoryProfile:
    """Memory profiles of base models that are large or small beside their activations and the buffers of streamed weights."""
    layer = draw(st.integers(1, 10**7))
    kept = StepMemory(draw(demands), draw(demands), draw(demands), draw(demands))
    return MemoryProfile(
        layers=LAYERS,
        hidden=HIDDEN,
        itemsize=draw(st.sampled_from([2, ITEMSIZE])),
        layer=layer,
        unstreamed=draw(few(layer)),
        slices=draw(few(10**6)),
        conversion=draw(few(10**5)),
        skeleton=draw(few(10**5)),
        call=BytePolynomial(((0, draw(few(64)), 0), (0, 0, draw(few(4))))),
        adapter=draw(st.integers(1, 10**6)),
        head=draw(few(10**4)),
        head_layers=draw(st.integers(1, LAYERS)),
        streamed_head=draw(st.booleans()),
        inside=draw(st.booleans()),
        kept=kept,
        activations_offloaded=StepMemory(*map(on_disk, (kept.adapter, kept.layer, kept.head, kept.emulator))),
        advance=replace(kept.layer, saved=NOTHING, backward=()),
        advance_adapter=replace(kept.adapter, saved=NOTHING, backward=()),
    )


@st.composite
def all_tasks(draw: st.DrawFn) -> tuple[TurnRequirements, Window]:
    """The requirements of a job, and the window of one of its stages."""
    start = draw(st.integers(0, LAYERS - 1))
    bottom = draw(st.integers(start, LAYERS - 1))
    global_branch = draw(st.booleans())
    task = TurnRequirements(
        start=start,
        batch_size=draw(st.integers(1, 32)),
        epochs=draw(st.integers(1, 3)),
        global_branch=global_branch,
        trains_above=global_branch and draw(st.booleans()),
        profiles=draw(st.sampled_from([0, 8, 64])),
        exact=draw(st.booleans()),
    )
    return task, Window(bottom, draw(st.integers(bottom, LAYERS - 1)))


all_means = st.builds(
    ClientResources,
    memory=st.integers(2**22, 2**26),
    longest=st.integers(1, 512),
    cached=st.booleans(),
    offload_disk=st.none() | st.integers(0, 2**24),
    batch=st.integers(1, 32),
    one_step=st.booleans(),
)
planned = settings(deadline=None, max_examples=100)


def needed(costs: MemoryProfile, task: TurnRequirements, stage: Window, means: ClientResources) -> int:
    """The least memory, in bytes, with which there is a plan."""
    return shortfall(costs, task, stage, replace(means, memory=0))
