"""The checks before a job is accepted, in a process of their own."""

from pathlib import Path
from typing import Any

import ray

from chainfed_ray.config import JobSpec
from chainfed_ray.errors import InvalidJob, Problem
from cluster.resources import of_controller


@ray.remote(max_retries=1)
def _problems(spec: JobSpec) -> list[Problem]:
    from chainfed_ray.job import prepare  # torch and transformers: whoever asks for the check need not load them

    try:
        prepare(spec, Path())  # nothing is written before the first turn
    except InvalidJob as error:
        return [Problem.from_document(problem.document()) for problem in error.problems]
    return []


async def check(spec: JobSpec) -> None:
    """Prepare a job in a process of its own, and let go of it: what is wrong with it shows before it is accepted.

    Raises:
        InvalidJob: the job cannot run.
    """
    task: Any = _problems
    if problems := await task.options(**of_controller()).remote(spec):
        raise InvalidJob(tuple(problems))
