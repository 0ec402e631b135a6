"""What jobs on record have for people to ask, as models of the API: stacks, early exits, and the base models alone."""

from datetime import datetime

from chainfed_ray.api.schemas.models import ServedModel
from chainfed_ray.cluster.jobs.versions import Trained, name_of_exit
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.records.result import ExitScore


def of_round(trained: Trained) -> ServedModel:
    """The stack of a job after one of its rounds. The job may still train."""
    record, index, model = trained.record, trained.stack.index, trained.record.spec["model"]
    name, at = f"{record.model}@{index}", record.started_at or record.submitted_at
    evaluation = trained.stack.evaluation or {}
    return ServedModel(
        id=name,
        created=int(datetime.fromisoformat(at).timestamp()),
        name=name,
        kind="stack",
        job=record.id,
        round=index,
        task=model["task"],
        base=model["base"],
        classes=list(trained.classes),
        accuracy=evaluation.get("accuracy"),
        created_at=at,
    )


def exit_of(whole: ServedModel, score: ExitScore) -> ServedModel:
    """The early exit of a model with the measured ``score``."""
    name = name_of_exit(whole.name, score.layers)
    own = {"id": name, "name": name, "round": score.round, "layers": score.layers, "accuracy": score.accuracy}
    return whole.model_copy(update=own)


def of_base(record: JobRecord) -> ServedModel:
    """The base model of the job in ``record``, alone."""
    name, model = record.model.partition(":")[0], record.spec["model"]
    return ServedModel(
        id=name,
        created=int(datetime.fromisoformat(record.submitted_at).timestamp()),
        name=name,
        kind="base",
        job=None,
        task=model["task"],
        base=model["base"],
        classes=[],
        accuracy=None,
        created_at=record.submitted_at,
    )


def of_job(record: JobRecord) -> ServedModel:
    """The model of the job in ``record``, which must have succeeded."""
    result, model = record.result or {}, record.spec["model"]
    finished_at = record.finished_at or ""
    return ServedModel(
        id=record.model,
        created=int(datetime.fromisoformat(finished_at).timestamp()),
        name=record.model,
        kind="stack",
        job=record.id,
        task=model["task"],
        base=model["base"],
        classes=result["classes"],
        accuracy=result["accuracy"],
        created_at=finished_at,
    )
