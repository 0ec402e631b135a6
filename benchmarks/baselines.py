"""The baselines of the accuracy benchmark, in plain PyTorch: class means and heads on the frozen model, and LoRA on the whole.

Each baseline is federated over the same cohorts as a job, with the same batches, the same head and the same mean.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Protocol

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm
from transformers import AutoModel

from benchmarks.accuracy_protocols import Spent
from benchmarks.metering import Meter
from chainfed_ray.aggregation.discriminant import fitted
from chainfed_ray.aggregation.mean import RunningMean
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import ClassSums
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.federation.cohort import Cohort, Sampler
from chainfed_ray.model.adapters import Head, Tensors
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import append_pooled, no_features
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.seeds import derive

_BATCH = 32  # examples of a batch in evaluation, and where features are computed
_RANK = 8  # of LoRA


@dataclass(frozen=True)
class Steps:
    """A client's work in a round: ``count`` optimizer steps of ``batch_size`` examples, at this round's learning rates."""

    count: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    seed: int


class Model(Protocol):
    """A model that is trained by FedAvg."""

    def tensors(self) -> Tensors:
        """Copies of the trained tensors, by name."""
        ...

    def load(self, tensors: Tensors) -> None:
        """Set the trained tensors to these values."""
        ...

    def train(self, client: str, examples: Examples, steps: Steps) -> None:
        """Take a client's turn, starting from the present tensors."""
        ...

    def accuracy(self, examples: Examples) -> float:
        """The share of examples, in [0, 1], that are classified right."""
        ...


def federated(job: PlannedJob, model: Model, meter: Meter) -> Iterator[int]:
    """Train ``model`` by FedAvg for the rounds of the job, and give the index of each round when it is over."""
    spec = job.spec
    rounds, window = spec.rounds, Window(job.planner.requirements.start, job.layers - 1)
    assert rounds.local_steps is not None
    candidates, sampler = [candidate for candidate, _ in job.admitted], Sampler.of(spec, spec.seed)
    current = model.tensors()
    for index in range(rounds.total):
        decay = 0.5 * (1 + np.cos(np.pi * index / rounds.total))
        seed = derive(spec.seed, "round", index)
        rates = (rounds.learning_rate * decay, rounds.head_learning_rate * decay)
        cohort = Cohort.of(sampler, job.planner, candidates, index, window, ())
        mean = RunningMean(current, cohort.examples)
        for place, candidate in enumerate(cohort.sampled):
            started, cpu = perf_counter(), process_time()
            model.load(current)
            model.train(candidate.name, candidate.examples, Steps(rounds.local_steps, rounds.batch_size, *rates, seed))
            sent = model.tensors()
            meter.seconds += perf_counter() - started
            size = sum(tensor.nbytes for tensor in sent.values())
            meter.turns.append(Spent(candidate.name, 0, rounds.local_steps, process_time() - cpu, size))
            mean.add(place, sent, len(candidate.examples))
        current = mean.result()
        model.load(current)
        yield index


class Lora:
    """LoRA (Hu et al., 2022) by the peft library, on the projections that it chooses in the whole model, and a ``Head``.

    The rank is 8 and α is 16. There is no dropout, as in a job.
    """

    def __init__(self, folder: Path, classes: int, seed: int) -> None:
        base = AutoModel.from_pretrained(folder, dtype=torch.float32)
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "lora"))
            tuned = inject_adapter_in_model(LoraConfig(r=_RANK, lora_alpha=2 * _RANK, lora_dropout=0.0), base)
        self._module = nn.ModuleDict({"base": tuned, "head": Head(base.config.hidden_size, classes)}).eval()
        self._trained = {name: each for name, each in self._module.named_parameters() if each.requires_grad}

    def tensors(self) -> Tensors:
        """See ``Model``."""
        return _copies(self._trained)

    def load(self, tensors: Tensors) -> None:
        """See ``Model``."""
        _load(self._trained, tensors)

    def train(self, client: str, examples: Examples, steps: Steps) -> None:
        """See ``Model``."""
        head = set(self._module["head"].parameters())
        base = [parameter for parameter in self._trained.values() if parameter not in head]
        optimizer = _adamw((base, steps.learning_rate), (list(head), steps.head_learning_rate))
        for indices in batches(len(examples), steps):
            batch = examples.batch(indices)
            cross_entropy(self._logits(batch.ids, batch.mask), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, examples: Examples) -> float:
        """See ``Model``."""
        right = 0
        for indices in examples.by_length(_BATCH):
            batch = examples.batch(indices)
            right += int((self._logits(batch.ids, batch.mask).argmax(-1) == batch.labels).sum())
        return right / len(examples)

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self._module["base"](input_ids=ids, attention_mask=mask).last_hidden_state
        logits: Tensor = self._module["head"](hidden, mask)
        return logits


class Probe:
    """A ``Head`` trained on the frozen model. A client computes its features once, in its first turn."""

    def __init__(self, features: "Features", classes: int) -> None:
        self._features = features
        self._head = Head(features.hidden_size, classes)
        self._trained = dict(self._head.named_parameters())
        self._of_client: dict[str, Tensor] = {}
        self._evaluated: dict[int, Tensor] = {}

    def tensors(self) -> Tensors:
        """See ``Model``."""
        return _copies(self._trained)

    def load(self, tensors: Tensors) -> None:
        """See ``Model``."""
        _load(self._trained, tensors)

    def train(self, client: str, examples: Examples, steps: Steps) -> None:
        """See ``Model``."""
        if client not in self._of_client:
            self._of_client[client] = self._features.of(examples)[:, -1]
        features, labels = self._of_client[client], torch.from_numpy(examples.labels)
        optimizer = _adamw((list(self._trained.values()), steps.head_learning_rate))
        for indices in batches(len(examples), steps):
            cross_entropy(self._logits(features[indices]), labels[indices]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def accuracy(self, examples: Examples) -> float:
        """See ``Model``."""
        if id(examples) not in self._evaluated:
            self._evaluated[id(examples)] = self._features.of(examples)[:, -1]
        predicted = self._logits(self._evaluated[id(examples)]).argmax(-1)
        return float((predicted == torch.from_numpy(examples.labels)).double().mean())

    def _logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self._head(features.unsqueeze(1), torch.ones(len(features), 1))
        return logits


class Features:
    """The pooled features of the frozen model: the means over tokens of its last ``head_layers`` layers' outputs."""

    def __init__(self, blocks: Blocks, head_layers: int) -> None:
        self._blocks, self.head_layers = blocks, head_layers
        self._layers = [blocks.load_layer(index) for index in range(blocks.num_layers)]
        self.hidden_size = blocks.hidden_size

    @torch.no_grad()
    def of(self, examples: Examples) -> Tensor:
        """The features [n, r, D] of n examples, in their order, for r head layers."""
        means = torch.empty(len(examples), self.head_layers, self.hidden_size)
        for indices in examples.by_length(_BATCH):
            batch = examples.batch(indices)
            hidden, calls = self._blocks.embed(batch.ids, batch.mask)
            pooled = no_features(hidden)
            for index, layer in enumerate(self._layers):
                hidden = self._blocks.run(layer, hidden, calls[index])
                pooled = append_pooled(pooled, hidden, batch.mask, self.head_layers)
            means[torch.from_numpy(indices)] = pooled
        return means


def class_means(job: PlannedJob, features: Features, meter: Meter) -> Callable[[Examples], float]:
    """A classifier without training: an example belongs to the class with the nearest mean of the last layer's features.

    The means are over the examples of all clients. Returns the function that gives the classifier's accuracy on examples.
    """
    counts = torch.zeros(len(job.classes), dtype=torch.float64)
    sums = torch.zeros(len(job.classes), features.hidden_size, dtype=torch.float64)
    for candidate, _ in job.admitted:
        started, cpu = perf_counter(), process_time()
        labels = torch.from_numpy(candidate.examples.labels)
        count = torch.bincount(labels, minlength=len(job.classes)).float()
        of_class = torch.zeros(len(job.classes), features.hidden_size).index_add_(
            0, labels, features.of(candidate.examples)[:, -1]
        )
        meter.seconds += perf_counter() - started
        meter.turns.append(Spent(candidate.name, None, 0, process_time() - cpu, count.nbytes + of_class.nbytes))
        counts += count
        sums += of_class
    means = (sums / counts.unsqueeze(1)).float()  # NaN for a class without examples

    def accuracy(examples: Examples) -> float:
        distances = torch.cdist(features.of(examples)[:, -1], means).nan_to_num(torch.inf)
        return float((distances.argmin(1) == torch.from_numpy(examples.labels)).double().mean())

    return accuracy


def discriminant_head(job: PlannedJob, features: Features, meter: Meter) -> Callable[[Examples], float]:
    """The head in closed form, without training, from every client's sums of the frozen model's features (discriminant.py).

    Returns the function that gives the head's accuracy on examples.
    """
    shape = len(job.classes), features.head_layers * features.hidden_size
    total = ClassSums.zeros(*shape, torch.float64)

    def normed(examples: Examples) -> Tensor:
        return layer_norm(features.of(examples), (features.hidden_size,)).flatten(1)

    for candidate, _ in job.admitted:
        started, cpu = perf_counter(), process_time()
        sums = ClassSums.zeros(*shape)
        sums.count(normed(candidate.examples), torch.from_numpy(candidate.examples.labels))
        meter.seconds += perf_counter() - started
        size = sum(tensor.nbytes for tensor in sums.tensors().values())
        meter.turns.append(Spent(candidate.name, None, 0, process_time() - cpu, size))
        total.add(sums)
    found = fitted(total, normed(job.validation), torch.from_numpy(job.validation.labels))
    assert found, "sums of real examples give a classifier"
    weight, bias = found

    def accuracy(examples: Examples) -> float:
        logits = normed(examples) @ weight.T + bias
        return float((logits.argmax(1) == torch.from_numpy(examples.labels)).double().mean())

    return accuracy


def whole_model_bytes(folder: Path, examples: Examples, classes: int, steps: Steps) -> int | None:
    """The peak memory of a client's turn of LoRA, in bytes above the idle process; None where it cannot be measured.

    The model is loaded, and trained on the client's longest texts.
    """
    longest = np.argsort(examples.lengths, kind="stable")[-steps.batch_size :]
    with PeakMemory() as peak:
        Lora(folder, classes, seed=0).train("client", examples.take(longest), steps)
    return peak.bytes


def batches(count: int, steps: Steps) -> Iterator[np.ndarray]:
    """The indices of each step's examples, shuffled anew in each epoch, exactly as in a job's turn."""
    indices = np.empty(0, dtype=np.int64)
    epoch = 0
    for _ in range(steps.count):
        if not len(indices):
            indices = np.random.default_rng(derive(steps.seed, "epoch", epoch)).permutation(count)
            epoch += 1
        yield indices[: steps.batch_size]
        indices = indices[steps.batch_size :]


def _adamw(*groups: tuple[Sequence[nn.Parameter], float]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [{"params": params, "lr": rate} for params, rate in groups], weight_decay=0.0, foreach=False
    )


def _copies(trained: dict[str, nn.Parameter]) -> Tensors:
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


@torch.no_grad()
def _load(trained: dict[str, nn.Parameter], tensors: Tensors) -> None:
    for name, parameter in trained.items():
        parameter.copy_(tensors[name])
