"""Promises of the first pass: an example goes once through the model for all that comes before the first round."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from chainfed_ray.chain import Window, start_below
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.messages import Client, Fitting, HeadSums, Profile, Profiling, Training, TurnOrder, TurnResult
from chainfed_ray.client.turn import take_turn
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob
from tests.builders import a_job

READS = 2
START = 1  # of the chain, whose windows have two of the model's four layers
NEVER, ALWAYS = -2.0, 2.0  # thresholds that no CKA is below, and that each is


@pytest.fixture
def job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    document["chain"] |= {"head": "fitted", "head_layers": READS}
    return a_job(document, tmp_path)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many examples were run through each layer; the layer is told by its weights."""
    counted, known, load, run = Counter[int](), dict[int, int](), Blocks.load_layer, Blocks.run

    def loaded(blocks: Blocks, index: int, *rest: Any) -> nn.Module:
        layer = load(blocks, index, *rest)
        known[id(layer)] = index
        return layer

    def counted_run(blocks: Blocks, layer: nn.Module, hidden: Tensor, call: Any) -> Tensor:
        counted[known[id(layer)]] += len(hidden)
        return run(blocks, layer, hidden, call)

    monkeypatch.setattr(Blocks, "load_layer", loaded)
    monkeypatch.setattr(Blocks, "run", counted_run)
    return counted


def profiling(threshold: float) -> Profiling:
    return Profiling(16, seed=0, guess=StartGuess(threshold, window=2, head_layers=READS))


def tensors_of(job: PlannedJob, trained: bool = False, start: int = START) -> dict[str, Tensor]:
    stack = AdapterStack.new(range(start, 4), job.hidden, bottleneck=8, classes=3, seed=0, head_layers=READS)
    if trained:
        nn.init.normal_(stack.adapter(start).up.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return stack.tensors()


def training(tensors: dict[str, Tensor]) -> Training:
    return Training(
        tensors, Window(START, START + 1), START + 1, epochs=1, batch_size=8, learning_rate=0, head_learning_rate=0,
        global_weight=0, global_trains="window", seed=0, steps=1,
    )  # fmt: skip


def done(client: Client, base: ModelSource, order: TurnOrder) -> TurnResult:
    return take_turn(client, base, lambda: order, capped=False)


def sums(client: Client, base: ModelSource, order: TurnOrder) -> dict[str, Tensor]:
    result = done(client, base, order)
    assert isinstance(result, HeadSums)
    return result.tensors


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_profile_sums_and_prefix_cache_are_made_in_one_pass(job: PlannedJob, passes: Counter[int]) -> None:
    client = job.clients[0]
    every = len(client.examples)
    fitting = Fitting(tensors_of(job), Window(START, START + 1), START + 1)
    profile = done(client, job.base, profiling(NEVER))
    assert isinstance(profile, Profile)
    assert profile.examples == 16
    assert passes == dict.fromkeys(range(4), every)
    done(client, job.base, replace(fitting, window=Window(2, 3), tensors=tensors_of(job, start=2)))
    done(client, job.base, fitting)
    assert passes == dict.fromkeys(range(4), every), "the features of the profile's pass are enough for any window"


@pytest.mark.parametrize(
    ("threshold", "start", "again"),
    [
        (NEVER, 2, {}),  # the guess is the highest layer where a window fits, and so is the start
        (NEVER, 1, {}),  # the layer below the guess is kept as well
        (ALWAYS, 0, {}),
        (ALWAYS, 2, {1, 2}),  # all others guess higher than this client: it goes on from what it kept
    ],
)
def test_training_goes_on_from_the_activations_where_the_client_guessed(
    threshold: float, start: int, again: set[int], job: PlannedJob, passes: Counter[int]
) -> None:
    client = job.clients[0]
    window = Window(start, start + 1)
    client = replace(client, plan=replace(client.plan, window=window))
    done(client, job.base, profiling(threshold))
    passes.clear()
    order = replace(training(tensors_of(job, start=start)), window=window)
    done(client, job.base, order)
    below = {layer for layer in passes if passes[layer] >= len(client.examples)}
    assert below == set(again)
    assert passes[window.top] <= 8, "and the step runs its own batch through the window"


def test_without_a_search_for_the_start_the_sums_are_the_first_pass(job: PlannedJob, passes: Counter[int]) -> None:
    client = job.clients[0]
    tensors = tensors_of(job)
    done(client, job.base, Fitting(tensors, Window(START, START + 1), START + 1))
    assert passes == dict.fromkeys(range(START + 2), len(client.examples))
    passes.clear()
    done(client, job.base, training(tensors))
    assert set(passes) == {START + 1}, "what enters the window is there"


def test_the_sums_are_those_of_the_window_itself(job: PlannedJob) -> None:
    """A stack whose adapters do next to nothing has to run through the window: a plain computation of the same sums."""
    client, window = job.clients[0], Window(START, START + 1)
    new = tensors_of(job)
    moved = {name: tensor + 1e-30 if name.endswith("up.bias") else tensor for name, tensor in new.items()}
    assert AdapterStack.from_tensors(new).is_new(window.top)
    assert not AdapterStack.from_tensors(moved).is_new(window.top)
    first, through = (sums(client, job.base, Fitting(tensors, window, window.top)) for tensors in (new, moved))
    for name in first:
        torch.testing.assert_close(first[name], through[name], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_was_lost_is_made_again_bit_for_bit(job: PlannedJob) -> None:
    client, fitting = job.clients[0], Fitting(tensors_of(job), Window(START, START + 1), START + 1)
    done(client, job.base, profiling(NEVER))
    kept = sums(client, job.base, fitting)
    folder = job.base.scratch / client.name

    shutil.rmtree(folder)  # another machine
    assert same(kept, sums(client, job.base, fitting))

    for path in folder.glob("0002-*.features"):  # killed as it wrote a layer's
        path.rename(path.with_name(f"{path.name}.1.partial"))
    assert same(kept, sums(client, job.base, fitting))

    for path in folder.glob("*.activations"):
        path.unlink()
    for path in folder.glob("0001-*.features"):
        path.unlink()
    assert same(kept, sums(client, job.base, fitting))


@pytest.mark.slow
def test_features_that_nobody_will_read_are_given_back(job: PlannedJob) -> None:
    client = job.clients[0]
    folder = job.base.scratch / client.name
    done(client, job.base, profiling(NEVER))
    made = {path.name for path in folder.glob("*.features")}
    assert len(made) == 4
    other = replace(client, plan=replace(client.plan, prefix=replace(client.plan.prefix, batch=2)))
    done(other, job.base, profiling(NEVER))
    assert len(list(folder.glob("*.features"))) == 4
    assert not made & {path.name for path in folder.glob("*.features")}, "those of another way to run the layers"

    done(job.clients[1], job.base, Profiling(16, seed=0))
    left = [path for path in (job.base.scratch / job.clients[1].name).rglob("*") if path.is_file()]
    assert left == [], "no head is fitted after a profile of some examples"


@pytest.mark.slow
def test_a_trained_window_and_a_client_without_a_disk_run_through_the_window(
    job: PlannedJob, passes: Counter[int]
) -> None:
    client, window = job.clients[0], Window(START, START + 1)
    done(client, job.base, profiling(NEVER))
    passes.clear()
    done(client, job.base, Fitting(tensors_of(job, trained=True), window, window.top))
    assert passes[START + 1] == len(client.examples)

    passes.clear()
    plan = replace(client.plan, prefix=replace(client.plan.prefix, batch=1, cached=False))
    bare = sums(replace(client, plan=plan), job.base, Fitting(tensors_of(job), window, window.top))
    assert passes[START + 1] == len(client.examples)
    for name, tensor in sums(client, job.base, Fitting(tensors_of(job), window, window.top)).items():
        torch.testing.assert_close(tensor, bare[name], rtol=1e-4, atol=1e-4)


@given(profile=st.lists(st.floats(0, 1), min_size=6, max_size=6), threshold=st.floats(0, 1))
def test_the_guess_and_the_layer_below_it_are_kept_and_no_other(profile: list[float], threshold: float) -> None:
    guess, cka = StartGuess(threshold, window=2, head_layers=1), tuple(profile)
    kept = [guess.kept(cka[: count + 1], 6) for count in range(6)]
    start = start_below(cka, threshold, 2)
    assert all(layers == (max(start - 1, 0), start) for layers in kept[start:])
    assert all(layers == (layer,) for layer, layers in enumerate(kept[:start]))
