"""What is asked about a job before it is accepted, each time in a process of its own: its checks, and its dry run."""

from pathlib import Path
from typing import Any

import ray

from chainfed_ray.cluster.resources import of_controller
from chainfed_ray.errors import InvalidJob, Problem
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.job import JobSpec


@ray.remote(max_retries=1)
def _problems(spec: JobSpec) -> list[Problem]:
    from chainfed_ray.federation.prepare import (
        prepare_job,  # torch and transformers: whoever asks for the check need not load them
    )

    try:
        prepare_job(spec, Path())  # nothing is written before the first turn
    except InvalidJob as error:
        return _plain(error)
    return []


@ray.remote(max_retries=1, max_calls=1)  # a process that has taken turns is no good for anything else
def _forecast(spec: JobSpec, client_slots: int) -> Forecast | list[Problem]:
    from chainfed_ray.forecast.dry_run import dry_run

    cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    try:
        return dry_run(spec, max(min(client_slots, cores), 1))  # a turn takes one core
    except InvalidJob as error:
        return _plain(error)


def _plain(error: InvalidJob) -> list[Problem]:
    """The problems with values that any process can read."""
    return [Problem.from_document(problem.document()) for problem in error.problems]


async def check(spec: JobSpec) -> None:
    """Prepare a job in a process of its own, and let go of it: what is wrong with it shows before it is accepted.

    Raises:
        InvalidJob: the job cannot run.
    """
    task: Any = _problems
    if problems := await task.options(**of_controller()).remote(spec):
        raise InvalidJob(tuple(problems))


async def plan(spec: JobSpec, client_slots: int) -> Forecast:
    """The dry run of a job, of which at most ``client_slots`` clients train at a time.

    Raises:
        InvalidJob: the job cannot run with any clients.
    """
    task: Any = _forecast
    answer: Forecast | list[Problem] = await task.options(**of_controller()).remote(spec, client_slots)
    if isinstance(answer, list):
        raise InvalidJob(tuple(answer))
    return answer
