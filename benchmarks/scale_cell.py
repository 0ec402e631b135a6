"""One cell of ``python -m benchmarks scale`` in a process of its own: a job with many clients, some of whom are asked."""

import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch

from benchmarks.cell_process import Row
from benchmarks.plan import word_tokenizer
from benchmarks.scale_pool import MeteredPool, ModelledPool
from benchmarks.shapes import Shape, written
from chainfed_ray.activity import Note
from chainfed_ray.client.pool import ClientPool
from chainfed_ray.cluster.pool.local import on_local_ray
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.device.peak import status
from chainfed_ray.federation.run import run_job
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.rounds import JobStarted, Round
from chainfed_ray.spec.parse import parse_job

# A stack of it trains 33 thousand numbers in a window of two layers, 132 KB: as many as a window of MiniLM with R = 16.
MODEL = Shape(
    "scale", "bert", {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 4,
    "vocab_size": 1002, "max_position_embeddings": 64, "type_vocab_size": 1}, "float32", 8, 8, False,
)  # fmt: skip
_CLASS = 100_000  # the most clients of a class
_HELD_OUT, _WORDS, _CLASSES = 32, 1000, 4
_SMALL = 10  # one class in so many clients is too small to take part


def main(registered: int, asked: int, rounds: int, rows: int, slots: int | None) -> Row:
    """Run the job, and give what the coordinator's process took. ``slots`` actors train; without them, clients are modelled.

    ``rows`` are those of a client.
    """
    torch.set_num_threads(1)
    with ExitStack() as until_done:
        base = until_done.enter_context(written(MODEL, Path(tempfile.gettempdir())))
        assert isinstance(base, Path), base
        word_tokenizer().save_pretrained(base)
        spec = parse_job(_document(base, registered, asked, rounds, rows))
        settings = Settings(Storage.at(base), client_slots=slots or 1)
        make_pool = until_done.enter_context(on_local_ray(settings)) if slots else _modelled
        idle, began = status("VmRSS"), process_time()
        prepared = planned = 0.0
        metered = MeteredPool(ModelledPool(), _stored_bytes if slots else None)
        started, newest = None, None

        def make(source: ModelSource, note: Note) -> MeteredPool:
            nonlocal prepared, planned
            prepared, planned = process_time() - began, status("VmHWM")
            metered.pool = make_pool(source, note)
            return metered

        for record in run_job(spec, base / "job", pool=make, scratch=base / "scratch"):
            match record:
                case JobStarted():
                    started, opened = record, process_time() - began - prepared
                case Round():
                    newest = record
        metered.end_round()
    assert started is not None
    assert newest is not None
    seen = metered.rounds[1:] or metered.rounds  # the first one makes actors, and imports what is imported late
    return {
        "prepare_cpu_seconds": prepared,
        "start_cpu_seconds": opened,
        "started_bytes": len(started.model_dump_json()),
        "turn_cpu_seconds": median(round.cpu_seconds / round.turns for round in seen),
        "round_cpu_seconds": median(round.cpu_seconds for round in seen),
        "seconds_to_next_order": median(round.to_next_order for round in seen[:-1] or seen),
        "turn_stored_bytes": median(round.stored_bytes / round.turns for round in seen) if slots else None,
        "round_stored_bytes": median(round.stored_bytes for round in seen) if slots else None,
        "round_record_bytes": len(newest.model_dump_json()),
        "idle_bytes": idle,
        "planned_peak_bytes": planned,
        "peak_bytes": max(planned, *(round.peak_bytes for round in metered.rounds)),
        "peak_bytes_by_round": [round.peak_bytes for round in metered.rounds],
    }


def _stored_bytes() -> int:
    from benchmarks.store_bytes import stored_bytes  # imports Ray, which must not be imported before it is started

    return stored_bytes()


def _modelled(source: ModelSource, note: Note) -> ClientPool:
    return ModelledPool()


def _document(base: Path, registered: int, asked: int, rounds: int, rows: int) -> dict[str, Any]:
    small = registered // _SMALL
    able = registered - small
    classes = [
        {"name": f"phone{place}", "count": min(_CLASS, able - first), "memory": "64MiB"}
        for place, first in enumerate(range(0, able, _CLASS))
    ]
    write_rows(base / "train.jsonl", rows * registered)
    write_rows(base / "held-out.jsonl", _HELD_OUT)
    return {
        "name": "scale",
        "model": {"base": f"path:{base}"},
        "data": {
            "train": f"path:{base / 'train.jsonl'}",
            "validation": f"path:{base / 'held-out.jsonl'}",
            "test": f"path:{base / 'held-out.jsonl'}",
            "max_length": MODEL.tokens,
        },
        "fleet": {
            "partition": {"scheme": "iid"},
            "clients": [*classes, {"name": "watch", "count": small, "memory": "1MiB"}],
        },
        "chain": {"window": 2, "start": 2, "head": "zero"},
        "evaluation": {"every": "stage"},  # what it takes depends on the model and the held-out rows, not on the fleet
        "rounds": {"total": rounds, "clients": asked, "convergence": {"rule": "none"}},
    }


def write_rows(path: Path, rows: int) -> None:
    """Write rows of eight words, in which the first one tells the class."""
    with path.open("w") as file:
        for row in range(rows):
            words = " ".join(f"w{(row * 7 + place * 131) % _WORDS}" for place in range(MODEL.tokens - 1))
            file.write(json.dumps({"text": f"w{row % _CLASSES} {words}", "label": f"class {row % _CLASSES}"}) + "\n")


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
