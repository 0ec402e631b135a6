"""Small jobs whose stacks are saved, so that a test can show that code was moved or renamed without changing a bit of them.

After a change of the method that is meant to change them, ``python -m tests.saved_stacks`` saves them anew.
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
    """A job with the default method: the start layer by profiles, a fitted head, and a global loss."""
    document = _classes(folder, mistaken=5)  # else the fitted head makes no mistake, and nothing is left to train
    document["chain"] |= {"start": "auto", "head": "fitted", "profile_examples": 16, "global_weight": 0.3}
    document["rounds"]["total"] = 6
    return document


def cyclic(folder: Path) -> dict[str, Any]:
    """A job with a cyclic schedule, FedAdam on the server, and FedProx."""
    document = _classes(folder)
    document["chain"] |= {"schedule": "cyclic"}
    document["aggregation"] = {"optimizer": "adam", "proximal": 0.1}
    return document


def robust(folder: Path) -> dict[str, Any]:
    """A job with the median, a rule that needs all updates of a round at once."""
    return _classes(folder) | {"aggregation": {"rule": "median"}, "seed": 4}


def private(folder: Path) -> dict[str, Any]:
    """A job with privacy in which each client adds its noise, from a known secret."""
    return _classes(folder) | {"privacy": PRIVACY | {"where": "client"}}


def decoder(folder: Path) -> dict[str, Any]:
    """A job that tunes a language model on questions and answers."""
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
    """Run the job called ``name``, with its files in ``folder``, and give the tensors of its stack."""
    job = a_job(JOBS[name](folder), folder)
    return run(job, with_secret(bytes(range(32)), folder / "log"))[1]


def saved(name: str) -> tuple[Tensors, str]:
    """The saved stack of the job called ``name``, and the machine on which it was computed."""
    with safe_open(SAVED / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()["machine"]  # noqa: SIM118


def machine() -> str:
    """The processor and the version of torch, on which the bits of float arithmetic depend.

    A virtual machine may hide the processor's name, so its family and model count as well.
    """
    about, known = Path("/proc/cpuinfo"), dict[str, str]()
    for line in about.read_text().splitlines() if about.exists() else []:
        name, _, value = line.partition(":")
        known.setdefault(name.strip(), value.strip())  # of the first core
    processor = " ".join(f"{name}: {known[name]}" for name in ("model name", "cpu family", "model") if name in known)
    return f"{platform.machine()}, {processor}, torch {torch.__version__.split('+')[0]}"


def _classes(folder: Path, mistaken: int | None = None) -> dict[str, Any]:
    """A job on sentences of three classes, with a random BERT and MiniLM's tokenizer.

    One in ``mistaken`` rows has the label of another class.
    """
    from transformers import AutoTokenizer

    from chainfed_ray.hub import resolve

    base = tiny("bert", folder / "bert", vocabulary=30522)
    AutoTokenizer.from_pretrained(resolve("builtin:minilm")).save_pretrained(base)
    rows = folder / "rows.jsonl"
    labels = list(WORDS)
    texts = [
        {
            "text": " ".join(words.split()[(row + place) % 4] for place in range(3 + row % 4)),
            "label": labels[(own + (mistaken is not None and row % mistaken == 0)) % len(labels)],
        }
        for row in range(40)
        for own, words in enumerate(WORDS.values())
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
