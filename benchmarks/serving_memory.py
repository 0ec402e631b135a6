"""``python -m benchmarks serving-memory``: the resident memory of a process that answers, after ever more requests.

The requests are classifications, embeddings and texts, of small random models: how memory grows does not depend on the values.
There is room for a third of the stacks, so they come and go. Some are early exits; some are saved anew, as while a job trains.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from benchmarks.cell_process import Row
from benchmarks.random_stacks import RandomStacks
from chainfed_ray.data.docstrings import rows
from chainfed_ray.device.lean_imports import load_models
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.blocks import weight_bytes
from chainfed_ray.model.saved_stack import SavedStack, save_stack, stored_bytes
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.messages import ModelKey, Piece, Question, Sampling

_CLASSES, _BOTTLENECK, _LAYERS, _EXIT = 8, 256, 3, 1
_ZIPF, _SEED = 1.1, 0
_ENCODED = 16  # of so many requests one is an embedding
_SAVED, _EXITS = 20, 7  # of so many requests one follows a new version of its stack; of so many stacks one is an exit
_TOKENS, _PATIENCE = 6, 120.0
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": _LAYERS, "num_attention_heads": 4}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--requests", type=int, default=10_000, help="how many requests")
    parser.add_argument("--stacks", type=int, default=100, help="how many stacks; a fifth of them write")
    parser.add_argument("--steps", type=int, default=10, help="how often memory is measured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, and print a line for each step as it comes."""
    load_models()  # as a process of the service does
    torch.set_num_threads(1)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="chainfed-") as folder:
        for row in _rows(Path(folder), options.requests, options.stacks, options.steps):
            found.append(row)
            resident, held, most = (row[name] / 2**20 for name in ("resident_bytes", "held_bytes", "most_bytes"))
            print(
                f"{row['requests']:>7,} requests: {resident:.1f} MiB resident; models and stacks of {held:.1f} MiB, of at most "
                f"{most:.1f}; {row['loads']:,} were loaded",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    half = found[len(found) // 2]
    growth = (found[-1]["resident_bytes"] - half["resident_bytes"]) / 2**20
    print(f"From request {half['requests']:,} to {found[-1]['requests']:,} the process grew by {growth:.1f} MiB.")
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread; {date.today()}")


def _rows(folder: Path, requests: int, stacks: int, steps: int) -> Iterator[Row]:
    bases = [_base(folder / kind, kind) for kind in ("bert", "llama")]
    made = [RandomStacks(base, _BOTTLENECK) for base in bases]
    keys, saved = list[ModelKey](), list[SavedStack]()
    for place in range(stacks):
        writes = _writes(place)
        stack = made[writes].stack(place, None if writes else _CLASSES)
        layers = _EXIT if place % _EXITS == 1 else None
        if layers:
            stack = replace(stack, stack=stack.stack.up_to(layers - 1), run_layers=layers)
        save_stack(stack, folder / f"job-{place}")
        keys.append(ModelKey(bases[writes], "float32", f"job-{place}", layers=layers))
        saved.append(stack)
    models = sum(weight_bytes(resolve(base), torch.float32) for base in bases)
    most = (models + sum(stored_bytes(folder / f"job-{place}") for place in range(stacks)) // 3) * 8 // 7
    engine, process = Engine(lambda model: folder / str(model.job), most), psutil.Process()
    random, texts = np.random.default_rng(_SEED), [text for text, _ in rows()]
    weights = 1 / np.arange(1, stacks + 1) ** _ZIPF
    for done in range(1, requests + 1):
        place = int(random.choice(stacks, p=weights / weights.sum()))
        if done % _SAVED == 0:
            save_stack(saved[place], folder / f"job-{place}")
        _ask(engine, keys[place], texts[done % len(texts)], done, _writes(place))
        if done % (requests // steps) == 0:
            yield {
                "requests": done,
                "resident_bytes": process.memory_info().rss,
                "held_bytes": engine.held_bytes,
                "most_bytes": most,
                "loads": engine.loads,
            }


def _ask(engine: Engine, key: ModelKey, text: str, number: int, writes: bool) -> None:
    if writes:
        ended, told = Event(), list[Piece | Exception]()

        def emit(piece: Piece | Exception) -> None:
            told.append(piece)
            if isinstance(piece, Exception) or piece.finish_reason:
                ended.set()

        engine.begin(key, text[:100], Sampling(_TOKENS, seed=number), emit, lambda: False)
        assert ended.wait(_PATIENCE)
        assert isinstance(told[-1], Piece), told[-1]
        return
    work = engine.embed if number % _ENCODED == 0 else engine.classify
    (answer,) = work([Question(key, [text])])  # type: ignore[operator]
    assert not isinstance(answer, Exception), answer


def _writes(place: int) -> bool:
    return place % 5 == 4


def _base(folder: Path, kind: str) -> str:
    """A small random model with the tokenizer of one that comes with the project."""
    name = "builtin:minilm" if kind == "bert" else "builtin:smollm2"
    words = tokenizer(name, resolve(name))
    maker: Any = AutoModel if kind == "bert" else AutoModelForCausalLM
    config = AutoConfig.for_model(kind, vocab_size=len(words), **_SIZES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = maker.from_config(config)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return f"path:{folder}"
