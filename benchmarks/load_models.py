"""The models of ``benchmarks load``: as if two hundred jobs had finished, and one had committed rounds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.random_stacks import RandomStacks
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.hub import resolve
from chainfed_ray.model.blocks import weight_bytes
from chainfed_ray.model.saved_stack import SavedStack, save_so_far, save_stack, stored_bytes
from chainfed_ray.serving.messages import ModelKey
from chainfed_ray.spec.parse import parse_job

_ENCODER, _WRITER = "builtin:minilm", "builtin:smollm2"
_WRITERS, _CLASSES, _BOTTLENECK = 8, 8, 64
CLASSIFIERS = [f"minilm:classifier-{place}" for place in range(200)]


@dataclass(frozen=True)
class Prepared:
    """A storage with models: the name of each with its key, those that write, and one with rounds."""

    settings: Settings
    keys: dict[str, ModelKey]
    writers: list[str]
    training: str
    commit: Callable[[int], None]  # commits a round of it, by its index


def prepared(folder: Path, room: int) -> Prepared:
    """Make the storage. A process that answers has memory for both base models, and for ``room`` classifiers' stacks."""
    storage = Storage.at(folder)
    store, keys = JobStore(storage.database), dict[str, ModelKey]()
    sizes = RandomStacks(_ENCODER, _BOTTLENECK), RandomStacks(_WRITER, _BOTTLENECK)
    for place in range(len(CLASSIFIERS)):
        keys[CLASSIFIERS[place]] = _finished(
            store, storage, f"classifier-{place}", _ENCODER, sizes[0].stack(place, _CLASSES)
        )
    for place in range(_WRITERS):
        keys[f"smollm2:writer-{place}"] = _finished(
            store, storage, f"writer-{place}", _WRITER, sizes[1].stack(place, None)
        )
    trains = store.submit(parse_job(_job("trains", _ENCODER))).id
    store.move(trains, "running")
    store.publish(trains, "started", "started", {"classes": list(map(str, range(_CLASSES)))})
    result = {"classes": [], "accuracy": 0.5}
    store.move(trains, "succeeded", result=result)  # a running one would be run by the service

    def commit(index: int) -> None:
        save_so_far({"last": replace(sizes[0].stack(index, _CLASSES), round=index)}, storage.job(trains))
        store.publish(trains, f"round-{index}", "round", {"index": index})

    models = weight_bytes(resolve(_ENCODER), torch.float32) + weight_bytes(resolve(_WRITER), torch.float32)
    stacks = room * stored_bytes(storage.model(str(keys[CLASSIFIERS[0]].job)))
    stacks += _WRITERS * stored_bytes(storage.model(str(keys["smollm2:writer-0"].job)))
    most = (models + stacks) * 8 // 7  # an eighth is for texts
    writers = [name for name in keys if "writer" in name]
    return Prepared(Settings(storage, client_slots=1, serving_bytes=most), keys, writers, "minilm:trains", commit)


def _finished(store: JobStore, storage: Storage, name: str, base: str, saved: SavedStack) -> ModelKey:
    job = store.submit(parse_job(_job(name, base))).id
    store.move(job, "running")
    save_stack(saved, storage.model(job))
    store.move(job, "succeeded", result={"classes": list(saved.classes), "accuracy": 0.5})
    return ModelKey(base, "float32", job)


def _job(name: str, base: str) -> dict[str, Any]:
    task = "causal-lm" if base == _WRITER else "sequence-classification"
    return {
        "name": name,
        "model": {"base": base, "task": task},
        "data": {"train": "builtin:docstrings"},
        "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
        "chain": {"window": 1, "start": 0},
        "rounds": {"total": 1, "clients": 2},
    }
