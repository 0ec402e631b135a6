"""A client's profiling turn: it computes the CKA between each layer's output and the embeddings (FOAT, paper section 3.4).

Linear CKA is the similarity of a layer's output to the embeddings (Kornblith et al., 2019). The Hilbert-Schmidt independence
criterion is estimated without bias (Song et al., 2012). The usual, biased estimator tends to 1 as the examples get fewer, so
clients with few examples would move the start of the chain.
"""

from collections.abc import Iterator
from pathlib import Path
from time import process_time

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.client.entrance import matrix_reader, prefix_runner
from chainfed_ray.client.first_pass import FirstPass, StartGuess
from chainfed_ray.client.messages import Client, Profile, Profiling
from chainfed_ray.client.progress import begin
from chainfed_ray.client.training import shuffled
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.model.prefix import PrefixCache, PrefixRunner

FEWEST_FOR_CKA = 4  # the fewest examples for which the unbiased estimator is defined


@torch.no_grad()
def profile(client: Client, blocks: Blocks, scratch: Path, order: Profiling) -> Profile:
    """Run examples through all layers, one layer in memory at a time, and compute the CKA of each layer.

    CKA compares at most ``order.examples`` of the client's examples, chosen at random. With ``order.guess`` all examples run,
    and the pass is the client's first pass (first_pass.py); otherwise only the compared examples run.
    """
    started = process_time()
    compared = np.sort(shuffled(len(client.examples), order.seed)[: order.examples])
    examples = client.examples.take(compared)
    with matrix_reader(blocks, client.plan) as matrices:
        runner = prefix_runner(blocks, client.plan, matrices)
        embedded = _embedded(runner, examples)
        if order.guess:
            first_pass = FirstPass(PrefixCache(scratch, runner, client.examples), order.guess.head_layers)
            cka = _profile_in_first_pass(first_pass, embedded, compared, order.guess, blocks.num_layers)
        else:
            cache = PrefixCache(scratch / "profile", runner, examples)
            try:
                cka = _profile_alone(FirstPass(cache, head_layers=1), embedded, blocks.num_layers)
            finally:
                cache.clear()
    return Profile(cka, len(compared), process_time() - started)


def _profile_in_first_pass(
    first_pass: FirstPass, embedded: Tensor, compared: np.ndarray, guess: StartGuess, layers: int
) -> tuple[float, ...]:
    """The CKA of each layer, while all examples run. Keeps the activations at the guessed start of the chain."""
    cka: tuple[float, ...] = ()
    for layer in _counted(first_pass, layers):
        cka += (debiased_cka(embedded, first_pass.features.at(layer, compared)),)
        first_pass.keep(*guess.kept(cka, layers))
    return cka


def _profile_alone(first_pass: FirstPass, embedded: Tensor, layers: int) -> tuple[float, ...]:
    """The CKA of each layer, while only the compared examples run. Keeps nothing."""
    every = np.arange(len(embedded))
    cka: tuple[float, ...] = ()
    for layer in _counted(first_pass, layers):
        cka += (debiased_cka(embedded, first_pass.features.at(layer, every)),)
        first_pass.features.forget(layer)  # no head will be fitted to these examples
    return cka


def _counted(first_pass: FirstPass, layers: int) -> Iterator[int]:
    """Each of the model's ``layers`` as soon as its pooled features are there."""
    return begin("profiling the layers").each(first_pass.up_to(layers - 1), layers, "layers")


def _embedded(runner: PrefixRunner, examples: Examples) -> Tensor:
    """The mean of each example's embeddings over its tokens, [n, D]."""
    means = torch.empty(len(examples), runner.blocks.hidden_size, dtype=torch.float64)
    for indices in examples.by_length(runner.batch):
        batch = examples.batch(indices)
        hidden, _ = runner.blocks.embed(batch.ids, batch.mask)
        means[torch.from_numpy(indices)] = mean_over_tokens(hidden.double(), batch.mask)
    return means


def debiased_cka(first: Tensor, second: Tensor) -> float:
    """Linear CKA of two representations [n, D1] and [n, D2] of the same n examples, at most 1.

    Raises:
        ValueError: there are fewer than ``FEWEST_FOR_CKA`` examples.
    """
    if len(first) < FEWEST_FOR_CKA:
        raise ValueError(f"CKA needs {FEWEST_FOR_CKA} examples or more, not {len(first)}")
    gram_first, gram_second = _gram(first), _gram(second)
    scale = (_hsic(gram_first, gram_first) * _hsic(gram_second, gram_second)).clamp(min=0).sqrt()
    # If a representation is constant, CKA is not defined; it then counts as dissimilar.
    return float(_hsic(gram_first, gram_second) / scale) if scale > 0 else 0.0


def _gram(representation: Tensor) -> Tensor:
    centred = representation.double() - representation.double().mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def _hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the paper's letters
    """The unbiased estimator (Song et al., 2012, equation 5) without its constant factor, which cancels in CKA.

    ``k`` and ``l`` are Gram matrices [n, n] with a zero diagonal.
    """
    n = len(k)
    return (k * l).sum() + k.sum() * l.sum() / ((n - 1) * (n - 2)) - 2 * (k.sum(0) @ l.sum(0)) / (n - 2)
