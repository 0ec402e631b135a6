"""A client's turn of profiling: how like the embeddings each layer's output is (FOAT, paper section 3.4)."""

from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.blocks import Blocks
from chainfed_ray.cap import now
from chainfed_ray.client import Client, Profile, Profiling, prefix_runner, reader, shuffled
from chainfed_ray.first_pass import FirstPass, StartGuess
from chainfed_ray.prefix import PrefixCache, PrefixRunner
from chainfed_ray.reading import mean_over_tokens
from chainfed_ray.start_layer import debiased_cka
from chainfed_ray.tokens import Examples


@torch.no_grad()
def profile(client: Client, blocks: Blocks, scratch: Path, order: Profiling) -> Profile:
    """One pass through the layers, one in memory at a time: of the examples that are compared, or of all the client's."""
    now("profiling the layers")
    started = process_time()
    compared = np.sort(shuffled(len(client.examples), order.seed)[: order.examples])
    with reader(blocks, client.plan) as matrices:
        runner = prefix_runner(blocks, client.plan, matrices)
        if order.guess:
            cache = PrefixCache(scratch, runner, client.examples)
            similarities = _all_pass(cache, runner, client.examples, compared, order.guess)
        else:
            cache = PrefixCache(scratch / "profile", runner, client.examples.take(compared))
            try:
                similarities = _compared_pass(cache, runner, client.examples.take(compared))
            finally:
                cache.clear()
    return Profile(similarities, len(compared), process_time() - started)


def _all_pass(
    cache: PrefixCache, runner: PrefixRunner, examples: Examples, compared: np.ndarray, guess: StartGuess
) -> tuple[float, ...]:
    """The CKA of each layer; all examples pass, and the activations stay where the chain seems to start."""
    first_pass = FirstPass(cache, guess.reads)
    embedded = _embedded(runner, examples.take(compared))
    similarities: tuple[float, ...] = ()
    for layer in first_pass.up_to(runner.blocks.num_layers - 1):
        similarities += (_cka(embedded, first_pass, layer, compared),)
        first_pass.keep(*guess.kept(similarities, runner.blocks.num_layers))
    return similarities


def _compared_pass(cache: PrefixCache, runner: PrefixRunner, examples: Examples) -> tuple[float, ...]:
    """The CKA of each layer; only the examples that are compared pass."""
    first_pass, every = FirstPass(cache, reads=1), np.arange(len(examples))
    embedded = _embedded(runner, examples)
    similarities: tuple[float, ...] = ()
    for layer in first_pass.up_to(runner.blocks.num_layers - 1):
        similarities += (_cka(embedded, first_pass, layer, every),)
        first_pass.features.forget(layer)  # no head is fitted to them
    return similarities


def _cka(embedded: Tensor, first_pass: FirstPass, layer: int, indices: np.ndarray) -> float:
    return debiased_cka(embedded, first_pass.features.of([layer], indices)[:, 0])


def _embedded(runner: PrefixRunner, examples: Examples) -> Tensor:
    """The mean over the tokens of each example's embeddings, [n, D]."""
    means = torch.empty(len(examples), runner.blocks.hidden_size, dtype=torch.float64)
    for indices in examples.by_length(runner.batch):
        batch = examples.batch(indices)
        hidden, _ = runner.blocks.embed(batch.ids, batch.mask)
        means[torch.from_numpy(indices)] = mean_over_tokens(hidden.double(), batch.mask)
    return means
