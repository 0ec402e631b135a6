"""Builds, runs and compares small real jobs and their records, for more than one file of tests.

``models.py`` has the models, ``causal.py`` the language models, and ``pools.py`` the pools that alter what clients send.
"""

import io
import json
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.chain import Window
from chainfed_ray.client.pool import ClientPool, LocalPool
from chainfed_ray.client.privacy import Noise
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import AdmittedClients, ExcludedClients, names_hash
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round, Turn
from chainfed_ray.spec.parse import parse_job

MIB = 2**20

# --- jobs ----------------------------------------------------------------------------------------------------------------


def a_document(model: Path, data: Path) -> dict[str, Any]:
    """The document of a job that takes seconds. The fixture ``document`` is the same; this one is for wider fixtures."""
    return {
        "name": "tiny",
        "model": {"base": f"path:{model}"},
        "data": {"train": f"path:{data}", "max_length": 16},
        "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
        "chain": {"window": 2, "start": 1, "head": "zero", "adapter": {"bottleneck": 8}},
        "rounds": {"total": 4, "clients": 3, "batch_size": 8, "learning_rate": 0.01, "convergence": {"span": 1}},
        "seed": 3,
    }


# A job for tests that submit it, and never run it.
SPEC = parse_job(
    {
        "name": "tiny",
        "model": {"base": "builtin:minilm"},
        "data": {"train": "builtin:docstrings"},
        "fleet": {"clients": [{"name": "phone", "count": 8, "memory": "64MiB"}]},
    }
)


def fits(document: Mapping[str, object]) -> None:
    """No limit keeps the job of a document from ever beginning."""


PRIVACY = {"clip": 0.5, "noise_multiplier": 0.8}


def a_job(document: dict[str, Any], folder: Path) -> PlannedJob:
    """The job of ``document``, planned and checked."""
    return prepare_job(parse_job(document), folder / "scratch")


def like(job: PlannedJob, folder: Path, **sections: Any) -> PlannedJob:
    """A copy of ``job`` with other keys in some sections, and with its own scratch folder in ``folder``.

    The rows and the plans are kept, so the keys must be ones that do not change them.
    """
    document = job.spec.document()
    for section, keys in sections.items():
        document[section] = {**(document[section] or {}), **keys}
    return replace(job, spec=parse_job(document), base=replace(job.base, scratch=folder / "scratch"))


def smallest_budget(document: dict[str, Any], folder: Path, width: int) -> int:
    """The fewest bytes with which every client of a job has a plan for a window of ``width``."""
    job = a_job(document, folder)
    start = job.planner.requirements.start

    def holds(memory: int) -> bool:
        candidates = (replace(candidate, memory=memory) for candidate, _ in job.admitted)
        plans = [job.planner.plan(candidate, Window(start, start + 2)) for candidate in candidates]
        return all(plan and len(plan.window) >= width for plan in plans)

    return bisect_left(range(2**30), True, key=holds)


def with_secret(secret: bytes, folder: Path) -> Path:
    """A folder for the commit log of a private job with the given secret, so that two runs add the same noise."""
    folder.mkdir(parents=True)
    (folder / "privacy.key").write_bytes(secret)
    return folder


def noise_of(noise: Noise, name: str, shape: torch.Size) -> Tensor:
    """The noise that is added to the tensor called ``name``, in float64."""
    drawn = torch.zeros(shape, dtype=torch.float64)
    noise.add_to(name, drawn)
    return drawn


ROWS = [{"text": f'sentence, "{index}"\nof «{"ab"[index % 2]}»', "label": "ab"[index % 2]} for index in range(40)]


def rows_in(folder: Path, form: str) -> str:
    """Write ``ROWS`` to ``folder``, and give their source as in a job.

    ``form`` is the format of the file or, for ``hub``, a data set with named classes that `datasets` can load.
    """
    frame, path = pd.DataFrame(ROWS), folder / f"rows.{form}"
    if form == "csv":
        frame.to_csv(path, index=False)
    elif form == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS))
    elif form == "parquet":
        frame.to_parquet(path)
    else:
        from datasets import ClassLabel, Dataset, Features, Value

        features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
        (folder / "hub").mkdir()
        Dataset.from_list([{**row, "label": int(row["label"] == "b")} for row in ROWS], features=features).to_parquet(
            folder / "hub" / "train.parquet"
        )
        return f"hf:{folder / 'hub'}"
    return f"path:{path}"


# --- runs ----------------------------------------------------------------------------------------------------------------


def run(job: PlannedJob, folder: Path, pool: ClientPool | None = None) -> tuple[Coordinator, Tensors]:
    """Run a job to its end, and give its coordinator and the tensors of its stack."""
    coordinator = Coordinator(job, pool or LocalPool(job.base), CommitLog(folder))
    list(coordinator.rounds())
    coordinator.finish()
    return coordinator, coordinator.stack().tensors()


def run_some(job: PlannedJob, folder: Path, rounds: int) -> None:
    """Run the first ``rounds`` of a job, and then stop its coordinator."""
    records = Coordinator(job, LocalPool(job.base), log := CommitLog(folder)).rounds()
    for _ in range(rounds):
        assert next(records) == log.rounds()[-1], "durable before it is reported"
    records.close()


def assert_same(first: Tensors, second: Tensors) -> None:
    """Assert that both have the same tensors, bit for bit."""
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_mean(found: Tensor, mean: Tensor, record: Round) -> None:
    """Assert that ``found`` is the float64 ``mean``, but for what the round's sum of whole numbers and float32 round off."""
    assert record.fraction_bits is not None
    last_place = torch.from_numpy(np.spacing(found.abs().numpy())).double()
    most = last_place / 2 + 2.0 ** -(record.fraction_bits + 1) + 2.0**-43
    assert ((found.double() - mean).abs() <= most).all()


def story(folder: Path) -> list[dict[str, Any]]:
    """The committed rounds as plain data, without the seconds and bytes that differ from run to run."""
    rounds = [record.model_dump(exclude={"seconds"}) for record in CommitLog(folder).rounds()]
    for record in rounds:
        record["turns"] = [
            {**turn, "seconds": None, "cpu_seconds": None, "peak_bytes": None} for turn in record["turns"]
        ]
        if record["evaluation"]:
            record["evaluation"] |= {
                "seconds": None,
                "forward_seconds": None,
                "peak_bytes": None,
                "process_bytes": None,
            }
        if record["early_exit"]:
            record["early_exit"] |= {"seconds": None, "peak_bytes": None}
    return rounds


# --- records -------------------------------------------------------------------------------------------------------------

FLEET = (("watch", 24, 2), ("phone", 64, 8), ("laptop", 256, 3), ("silo", 1024, 1))
FINISHED = JobFinished(accuracy=0.728, loss=0.8, rounds=3, peak_bytes={"phone": 25 * MIB})


def a_start(layers: int = 6, start: int = 2, fleet: tuple[tuple[str, int, int], ...] = FLEET) -> JobStarted:
    """The start of a job in which every client with 32 MiB or more takes part."""
    admitted = tuple(
        AdmittedClients(
            client_class=name, clients=count, examples=100 * count, budget_bytes=memory * MIB, planned_bytes=30 * MIB,
            disk_bytes=3 * MIB, window=2, batch=16, micro_batch=16, weights="resident", activations_offloaded=False,
            cached=True,
        )
        for name, memory, count in fleet if memory >= 32
    )  # fmt: skip
    return JobStarted(
        admitted=admitted,
        excluded=tuple(
            ExcludedClients(
                client_class=name, clients=count, budget_bytes=memory * MIB, shortfall_bytes=8 * MIB, reason="too small"
            )
            for name, memory, count in fleet if memory < 32
        ),
        clients_hash=names_hash(name for name, _ in clients_of(admitted)),
        layers=layers, start_layer=start, window=2, cka=tuple(1 - 0.12 * layer for layer in range(layers)), failed_turns=(),
        stages=layers - start - 1, total_rounds=20, partition_hash="0" * 64,
    )  # fmt: skip


def clients_of(admitted: tuple[AdmittedClients, ...]) -> list[tuple[str, AdmittedClients]]:
    """The names of the clients that take part, each with its class and plan."""
    return [(f"{group.client_class}-{index}", group) for group in admitted for index in range(group.clients)]


def a_round(index: int, job_started: JobStarted, **changes: Any) -> Round:
    """A round in which the first three clients took part: of the first stage, unless ``changes`` say otherwise."""
    bottom = changes.get("bottom", 2)
    turns = tuple(
        Turn(
            client=name, client_class=client.client_class, examples=100, loss=1.0, steps=7, seconds=2.0,
            cpu_seconds=1.5, bottom=bottom, micro_batch=client.micro_batch, weights=client.weights,
            activations_offloaded=client.activations_offloaded, budget_bytes=client.budget_bytes,
            planned_bytes=client.planned_bytes, peak_bytes=25 * MIB, sent_bytes=1000,
        )
        for name, client in clients_of(job_started.admitted)[:3]
    )  # fmt: skip
    fields: dict[str, Any] = {
        "index": index, "stage": 0, "bottom": 2, "top": 3, "turns": turns, "failed_turns": (), "counted": True,
        "train_loss": 1.0, "held_out_loss": 1.0, "accuracy": 0.5 + index / 100, "movement": None, "ended": None,
        "seconds": 4.0,
    }  # fmt: skip
    return Round(**fields | changes)


def a_console(terminal: bool = False) -> Console:
    """A console of 80 columns that records its text."""
    return Console(width=80, markup=False, force_terminal=terminal, record=True, file=io.StringIO(), highlight=False)


def told(progress: ProgressDisplay, job_started: JobStarted, rounds: list[Round]) -> None:
    """Show that a job started, and then its rounds."""
    progress.job_started(job_started)
    for record in rounds:
        progress.round(record)
