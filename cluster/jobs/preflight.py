"""Checks and forecasts a job before it is accepted, each in a Ray process of its own."""

from pathlib import Path
from typing import Any

import ray

from chainfed_ray.cluster.resources import controller_options
from chainfed_ray.errors import InvalidJob, Problem
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.job import JobSpec


@ray.remote(max_retries=1)
def _problems(spec: JobSpec) -> list[Problem]:
    # It imports torch and transformers, which the caller's process need not load.
    from chainfed_ray.cluster.pool.placement import check_memories
    from chainfed_ray.federation.prepare import prepare_job

    try:
        check_memories([group.memory for group in spec.fleet.clients])
        prepare_job(spec, Path())  # preparing writes nothing into the scratch folder
    except InvalidJob as error:
        return _plain(error)
    return []


@ray.remote(
    max_retries=1, max_calls=1
)  # a dry run times training steps, and leaves its process changed: do not reuse it
def _forecast(spec: JobSpec, client_slots: int) -> Forecast | list[Problem]:
    from chainfed_ray.forecast.dry_run import dry_run

    cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    try:
        return dry_run(spec, max(min(client_slots, cores), 1))  # a turn takes one core
    except InvalidJob as error:
        return _plain(error)


def _plain(error: InvalidJob) -> list[Problem]:
    """The problems of ``error``, with values as text: the original values may not unpickle in another process."""
    return [Problem.from_document(problem.document()) for problem in error.problems]


async def check(spec: JobSpec) -> None:
    """Prepare a job in a process of its own and discard the result. This finds what is wrong before the job is accepted.

    Raises:
        InvalidJob: the job cannot run.
    """
    task: Any = _problems
    if problems := await task.options(**controller_options()).remote(spec):
        raise InvalidJob(tuple(problems))


async def plan(spec: JobSpec, client_slots: int) -> Forecast:
    """Forecast a job by a dry run, for a cluster where at most ``client_slots`` clients train at once.

    Raises:
        InvalidJob: the job cannot run, whichever clients join.
    """
    task: Any = _forecast
    answer: Forecast | list[Problem] = await task.options(**controller_options()).remote(spec, client_slots)
    if isinstance(answer, list):
        raise InvalidJob(tuple(answer))
    return answer
