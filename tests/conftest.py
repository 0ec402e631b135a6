"""Small real jobs for every test that needs one."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from chainfed_ray import dry_run, job
from chainfed_ray.base_model import resolve
from chainfed_ray.blocks import Blocks
from chainfed_ray.config import JobSpec
from chainfed_ray.costs import costs_of
from chainfed_ray.demand import Costs
from chainfed_ray.job import Job, prepare
from tests.models import tiny

torch.set_num_threads(1)

_WORDS = {
    "sea": ("wave", "salt", "ship", "tide"),
    "sky": ("cloud", "star", "wind", "bird"),
    "soil": ("root", "worm", "seed", "clay"),
}


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """A measured turn begins with a garbage collection: it need not look at every library each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def models_are_rehearsed_once() -> Iterator[None]:
    """A job begins with seconds of arithmetic on its model; what comes of them is the same for the same model."""
    known = dict[tuple[object, ...], Costs]()

    def costs_once(blocks: Blocks, bottleneck: int, classes: int | None, reads: int) -> Costs:
        model = (Path(blocks._name) / "config.json").read_bytes()
        key = (blocks._name, model, blocks.dtype, bottleneck, classes, reads)
        if key not in known:
            known[key] = costs_of(blocks, bottleneck, classes, reads)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (job, dry_run):
            patch.setattr(module, "costs_of", costs_once)
        yield


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random four-layer BERT with a real tokenizer."""
    folder = tiny("bert", tmp_path_factory.mktemp("model") / "tiny", vocabulary=30522)
    AutoTokenizer.from_pretrained(resolve("builtin:minilm")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows of three classes that differ by their words."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"text": " ".join(words[(row + place) % 4] for place in range(3 + row % 4)), "label": label}
        for row in range(40)
        for label, words in _WORDS.items()
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture
def document(tiny_model_folder: Path, tiny_data: Path) -> dict[str, Any]:
    """A job that takes seconds; a test changes what it is about."""
    return a_document(tiny_model_folder, tiny_data)


def a_document(model: Path, data: Path) -> dict[str, Any]:
    """The job of the fixture ``document``, for fixtures that many tests share."""
    return {
        "name": "tiny",
        "model": {"base": f"path:{model}"},
        "data": {"train": f"path:{data}", "max_length": 16},
        "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
        "chain": {"window": 2, "start": 1, "head": "zero", "adapter": {"bottleneck": 8}},
        "rounds": {"total": 4, "clients": 3, "batch_size": 8, "learning_rate": 0.01, "convergence": {"span": 1}},
        "seed": 3,
    }


def a_job(document: dict[str, Any], folder: Path) -> Job:
    """The prepared job of ``document``."""
    return prepare(JobSpec.parse(document), folder / "scratch")
