"""From a ``JobSpec`` to what a coordinator needs; every impossible job is refused here, before anything starts."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from chainfed_ray.base_model import resolve, tokenizer
from chainfed_ray.blocks import Blocks
from chainfed_ray.client import BaseModel, Client
from chainfed_ray.config import JobSpec
from chainfed_ray.data import load
from chainfed_ray.errors import InvalidJob, UnsupportedModel
from chainfed_ray.memory import Shape, lacking, plan
from chainfed_ray.partition import dirichlet, iid
from chainfed_ray.prefix import MICRO_BATCH
from chainfed_ray.quantities import format_bytes
from chainfed_ray.records import LeftOut
from chainfed_ray.seeds import derive
from chainfed_ray.start_layer import FEWEST
from chainfed_ray.tokens import Examples, tokenize


@dataclass(frozen=True)
class Job:
    """A job that can run: its admitted clients with their examples and plans, and the server's held-out examples."""

    spec: JobSpec
    base: BaseModel
    layers: int
    layers_path: str
    hidden: int
    classes: tuple[str, ...]
    clients: tuple[Client, ...]
    left_out: tuple[LeftOut, ...]
    validation: Examples
    test: Examples


def prepare(spec: JobSpec, scratch: Path) -> Job:
    """Read the data, deal it to the clients and plan their turns; ``scratch`` is for their prefix caches.

    Raises:
        InvalidJob: the job cannot run; each problem names the field, its value and what would do.
    """
    folder = resolve(spec.model.base)
    base = BaseModel(folder, getattr(torch, spec.model.dtype), scratch)
    words = tokenizer(spec.model.base, folder)
    corpus = load(spec.data, derive(spec.seed, "split"))
    number = {name: place for place, name in enumerate(corpus.classes)}
    train, validation, test = (
        tokenize(words, split.texts, [number[label] for label in split.labels], spec.data.max_length)
        for split in (corpus.train, corpus.validation, corpus.test)
    )
    try:
        blocks = Blocks(folder, base.dtype)
    except UnsupportedModel as error:
        raise InvalidJob.at("model.base", spec.model.base, f"a model that can be streamed ({error.reason})") from None
    try:
        _check_texts(spec, blocks, (train, validation, test))
    finally:
        blocks.close()
    _check_chain(spec, blocks.num_layers)
    clients, left_out = _fleet(spec, blocks, train, len(corpus.classes))
    if spec.quorum > len(clients):
        largest = max(left_out, key=lambda client: client.budget_bytes)
        needed = format_bytes(largest.budget_bytes + largest.lacking_bytes)
        raise InvalidJob.at(
            "fleet.clients",
            [f"{group.name}: {format_bytes(group.memory)}" for group in spec.fleet.clients],
            f"{spec.quorum} clients (the quorum) with {needed} or more, since {len(clients) or 'none'} of them can hold a "
            f"window of {spec.chain.window} at data.max_length {spec.data.max_length}",
        )
    if spec.chain.start == "auto" and max(len(client.examples) for client in clients) < FEWEST:
        raise InvalidJob.at(
            "chain.start", "auto", f"the index of a layer, since no client has the {FEWEST} rows of a profile"
        )
    return Job(
        spec=spec,
        base=base,
        layers=blocks.num_layers,
        layers_path=blocks.layers_path,
        hidden=blocks.hidden_size,
        classes=corpus.classes,
        clients=clients,
        left_out=left_out,
        validation=validation,
        test=test,
    )


def _check_texts(spec: JobSpec, blocks: Blocks, splits: tuple[Examples, ...]) -> None:
    """Every token has an embedding, and the longest text can be embedded: not every model has a table of positions."""
    for examples in splits:
        if (highest := int(examples.ids.max())) >= blocks.vocabulary:
            expected = (
                f"a tokenizer made for the model, which has {blocks.vocabulary} token ids; this one gives {highest}"
            )
            raise InvalidJob.at("model.base", spec.model.base, expected)
        longest = int(examples.lengths.argmax())
        batch = examples.batch(np.array([longest]))
        try:
            blocks.embed(batch.ids, batch.mask)
        except (IndexError, RuntimeError):
            expected = (
                f"fewer: a text has {examples.lengths[longest]} tokens, and the model has no positions for so many"
            )
            raise InvalidJob.at("data.max_length", spec.data.max_length, expected) from None


def _check_chain(spec: JobSpec, layers: int) -> None:
    if spec.chain.window > layers:
        raise InvalidJob.at("chain.window", spec.chain.window, f"at most {layers}, the model's layers")
    if isinstance(spec.chain.start, int) and spec.chain.start > layers - spec.chain.window:
        raise InvalidJob.at(
            "chain.start", spec.chain.start, f"at most {layers - spec.chain.window}, where a window fits"
        )


def _fleet(
    spec: JobSpec, blocks: Blocks, train: Examples, classes: int
) -> tuple[tuple[Client, ...], tuple[LeftOut, ...]]:
    count = sum(group.count for group in spec.fleet.clients)
    seed = derive(spec.seed, "partition")
    if spec.fleet.partition.scheme == "dirichlet":
        shares = dirichlet(train.labels, count, spec.fleet.partition.alpha, seed)
    else:
        shares = iid(train.labels, count, seed)
    first = spec.chain.start if isinstance(spec.chain.start, int) else 0
    admitted: list[Client] = []
    left_out: list[LeftOut] = []
    groups = [(group, index) for group in spec.fleet.clients for index in range(group.count)]
    for (group, index), share in zip(groups, shares, strict=True):
        examples = train.take(share)
        shape = Shape(
            layer_bytes=blocks.layer_bytes,
            hidden=blocks.hidden_size,
            widest=blocks.widest,
            itemsize=blocks.dtype.itemsize,
            window=spec.chain.window,
            adapters=blocks.num_layers - first,
            bottleneck=spec.chain.adapter.bottleneck,
            classes=classes,
            tokens=int(examples.lengths.max()),
            prefix_batch=MICRO_BATCH,
        )
        name = f"{group.name}-{index}"
        planned = plan(shape, spec.rounds.batch_size, group.memory)
        if planned:
            admitted.append(
                Client(name, group.name, examples, group.memory, planned.planned_bytes, planned.micro_batch)
            )
        else:
            missing = lacking(shape, group.memory)
            reason = f"its budget of {format_bytes(group.memory)} lacks {format_bytes(missing)} for any window"
            left_out.append(
                LeftOut(
                    client=name,
                    client_class=group.name,
                    budget_bytes=group.memory,
                    lacking_bytes=missing,
                    reason=reason,
                )
            )
    return tuple(admitted), tuple(left_out)
