"""Makes one run of the accuracy benchmark: ``python -m benchmarks.accuracy_cell RUN-AS-JSON FOLDER``.

Each run has its own process. It prints one JSON object: the accuracies, and the steps, CPU seconds and bytes of the clients.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy_cells import Run
from benchmarks.accuracy_protocols import Point, costs, points
from benchmarks.baselines import (
    Features,
    Lora,
    Model,
    Probe,
    Steps,
    class_means,
    discriminant_head,
    federated,
    whole_model_bytes,
)
from benchmarks.metering import Meter, MeteredPool
from chainfed_ray.chain import Window
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.turn import warm_up
from chainfed_ray.data.tokens import Examples
from chainfed_ray.evaluation.early_exit import predict_early_exit
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.planning.admission import Admission
from chainfed_ray.planning.prepare import PlannedJob, plan_job, prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """Make a run, and give the fields of its row. The clients' caches and the commits are written to ``folder``."""
    torch.set_num_threads(1)
    job = _job(run, folder / "cache")
    warm_up(job.base)
    weighed = _whole_model_bytes(job) if run.weighed else None
    meter = Meter()
    found = _chain(run, job, folder / "log", meter) if run.kind == "chain" else _baseline(run, job, meter)
    spent = costs(meter.turns, len(job.admitted), found["rounds"])
    return {
        **found,
        "client_steps": meter.steps,
        "client_cpu_seconds": meter.cpu_seconds,
        "bytes_sent": meter.sent_bytes,
        "seconds": meter.seconds,
        **spent._asdict(),
        "whole_model_bytes": weighed,
    }


def _job(run: Run, scratch: Path) -> PlannedJob:
    spec = parse_job(run.document)
    if run.able is None:
        return prepare_job(spec, scratch)
    job = plan_job(spec, scratch)
    admitted = tuple(pair for pair in job.admitted if pair[0].client_class == run.able)
    return replace(job, admission=Admission(admitted, (), job.admission.width))


def _chain(run: Run, job: PlannedJob, log: Path, meter: Meter) -> dict[str, Any]:
    """Run a job of the chain, and evaluate it about a dozen times: each stack as the early exit of the window just trained."""
    pool = MeteredPool(LocalPool(job.base), meter)
    coordinator = Coordinator(job, pool, CommitLog(log))
    job_started = coordinator.open()
    due, curve = points(job.spec.rounds.total), list[Point]()
    for record in coordinator.rounds():
        if record.index + 1 in due:
            window = Window(record.bottom, record.top)
            cache = job.base.scratch / "(validation)"
            accuracy = record.kept_accuracy  # the job itself has evaluated the stack if its stage ended with this round
            if accuracy is None:
                predictions = predict_early_exit(job.validation, job.base, cache, coordinator.stack(), window)
                accuracy = Score.of(predictions).accuracy
            curve.append(meter.point(accuracy))
    return {
        "accuracy": coordinator.finish().accuracy if run.tested else None,
        "validation_accuracy": curve[-1][4],
        "rounds": record.index + 1,
        "start_layer": job_started.start_layer,
        "stages": job_started.stages,
        "narrowest_window": pool.narrowest_window,
        "excluded": job_started.left_out,
        "curve": curve,
    }


def _baseline(run: Run, job: PlannedJob, meter: Meter) -> dict[str, Any]:
    if run.kind == "lora":
        return _trained(run, job, Lora(job.base.folder, len(job.classes), job.spec.seed), meter)
    blocks = Blocks(job.base.folder, job.base.dtype)
    try:
        features = Features(blocks, job.head_layers)
        if run.kind == "probe":
            return _trained(run, job, Probe(features, len(job.classes)), meter)
        accuracy = (class_means if run.kind == "none" else discriminant_head)(job, features, meter)
        return _evaluated(run, job, accuracy, 0, [meter.point(accuracy(job.validation))])
    finally:
        blocks.close()


def _trained(run: Run, job: PlannedJob, model: Model, meter: Meter) -> dict[str, Any]:
    due, curve = points(job.spec.rounds.total), list[Point]()
    for index in federated(job, model, meter):
        if index + 1 in due:
            curve.append(meter.point(model.accuracy(job.validation)))
    return _evaluated(run, job, model.accuracy, index + 1, curve)


def _evaluated(
    run: Run, job: PlannedJob, accuracy: Callable[[Examples], float], rounds: int, curve: list[Point]
) -> dict[str, Any]:
    """The fields of a baseline's row; ``accuracy`` evaluates the trained model on examples."""
    tested = accuracy(job.test) if run.tested else None
    return {"accuracy": tested, "validation_accuracy": curve[-1][4], "rounds": rounds, "curve": curve}


def _whole_model_bytes(job: PlannedJob) -> int | None:
    rounds = job.spec.rounds
    client = max((candidate for candidate, _ in job.admitted), key=lambda candidate: candidate.examples.lengths.max())
    assert rounds.local_steps
    steps = Steps(rounds.local_steps, rounds.batch_size, rounds.learning_rate, rounds.head_learning_rate, seed=0)
    return whole_model_bytes(job.base.folder, client.examples, len(job.classes), steps)


if __name__ == "__main__":
    print(json.dumps(measure(Run(**json.loads(sys.argv[1])), Path(sys.argv[2]))))
