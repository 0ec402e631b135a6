"""Small jobs whose stacks were saved: what is moved or renamed must leave every bit of them as it was.

``python -m tests.saved_stacks`` saves them anew, where a change of the method is meant to change them.
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from chainfed_ray.model.adapters import Tensors
from tests.builders import PRIVACY, a_document, a_job, run, with_secret
from tests.causal import causal_folder
from tests.models import tiny

SAVED = Path(__file__).parent / "saved"
WORDS = {"sea": "wave salt ship tide", "sky": "cloud star wind bird", "soil": "root worm seed clay"}


def encoder(folder: Path) -> dict[str, Any]:
    """The default method: the start that profiles give, a fitted head, a global loss."""
    document = _classes(folder)
    document["chain"] |= {"start": "auto", "head": "fitted", "profile_examples": 16, "global_weight": 0.3}
    document["rounds"]["total"] = 6
    return document


def cyclic(folder: Path) -> dict[str, Any]:
    """The paper's schedule, with momentum on the server and clients that are held back."""
    document = _classes(folder)
    document["chain"] |= {"schedule": "cyclic"}
    document["aggregation"] = {"optimizer": "adam", "proximal": 0.1}
    return document


def robust(folder: Path) -> dict[str, Any]:
    """A rule that needs all updates of a round at once."""
    return _classes(folder) | {"aggregation": {"rule": "median"}, "seed": 4}


def private(folder: Path) -> dict[str, Any]:
    """Noise that each client adds, from a secret that is known."""
    return _classes(folder) | {"privacy": PRIVACY | {"where": "client"}}


def decoder(folder: Path) -> dict[str, Any]:
    """A language model of questions and answers."""
    base = causal_folder("llama", folder / "llama")
    rows = folder / "questions.jsonl"
    asked = [{"q": f"{word}?", "a": f"{name}."} for name, words in WORDS.items() for word in words.split()]
    rows.write_text("\n".join(json.dumps(row) for row in asked * 4))
    return {
        "name": "words",
        "model": {"base": f"path:{base}", "task": "causal-lm"},
        "data": {"train": f"path:{rows}", "prompt": "q", "response": "a", "max_length": 32},
        "fleet": {"clients": [{"name": "phone", "count": 3, "memory": "64MiB"}]},
        "chain": {"window": 2, "start": 0, "head": "model", "adapter": {"bottleneck": 8}},
        "rounds": {"total": 3, "clients": 2, "batch_size": 4, "learning_rate": 0.01},
        "seed": 5,
    }


JOBS: dict[str, Callable[[Path], dict[str, Any]]] = {
    job.__name__: job for job in (encoder, cyclic, robust, private, decoder)
}


def stack_of(name: str, folder: Path) -> Tensors:
    """The stack that the job ``name`` comes to, with its files in ``folder``."""
    job = a_job(JOBS[name](folder), folder)
    return run(job, with_secret(bytes(range(32)), folder / "log"))[1]


def saved(name: str) -> tuple[Tensors, str]:
    """The stack that was saved, and what it was computed on."""
    with safe_open(SAVED / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["machine"]  # noqa: SIM118


def machine() -> str:
    """What the bits of float arithmetic depend on."""
    about = Path("/proc/cpuinfo")
    processor = (
        next((line for line in about.read_text().splitlines() if "model name" in line), "") if about.exists() else ""
    )
    return f"{platform.machine()} {processor.partition(': ')[2]}, torch {torch.__version__.split('+')[0]}"


def _classes(folder: Path) -> dict[str, Any]:
    """Sentences of three classes, for a BERT that has its tokenizer from the package of MiniLM."""
    from transformers import AutoTokenizer

    from chainfed_ray.hub import resolve

    base = tiny("bert", folder / "bert", vocabulary=30522)
    AutoTokenizer.from_pretrained(resolve("builtin:minilm")).save_pretrained(base)
    rows = folder / "rows.jsonl"
    texts = [
        {"text": " ".join(words.split()[(row + place) % 4] for place in range(3 + row % 4)), "label": label}
        for row in range(40)
        for label, words in WORDS.items()
    ]
    rows.write_text("\n".join(json.dumps(row) for row in texts))
    return a_document(base, rows)


def _save() -> None:
    SAVED.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for name in JOBS:
        with TemporaryDirectory() as folder:
            stack = {key: tensor.contiguous() for key, tensor in stack_of(name, Path(folder)).items()}
            save_file(stack, SAVED / f"{name}.safetensors", {"machine": machine()})


if __name__ == "__main__":
    _save()
