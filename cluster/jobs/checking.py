"""A process that checks jobs, one after the other: it has loaded its libraries before a job comes, and knows models by then."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from chainfed_ray.cluster.resources import IDLE_BYTES, PREFLIGHT_BYTES, check_options
from chainfed_ray.cluster.tracing import asked_by, begin_tracing, carried, flush, span
from chainfed_ray.device.memory_limit import memory_limit
from chainfed_ray.device.peak import status
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import Problem
from chainfed_ray.reading import ReadingRules, reading_by
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.units import format_bytes

_CHECKS = 200  # of one process: whatever may be left of each does not add up for ever


class Checkers:
    """Processes that check jobs, for one event loop. One that is idle is kept, and the next check begins at once.

    ``where`` are options of Ray that say where they may run.
    """

    def __init__(self, where: Mapping[str, Any]) -> None:
        self._where = where
        self._idle: Any = None

    def prepare(self) -> None:
        """Start a process for the next check, if there is none."""
        if self._idle is None:
            self._idle = self._start()

    async def check(self, most_bytes: int, rules: ReadingRules, spec: JobSpec, seconds: float) -> list[Problem]:
        """What is wrong with a job, by a process that may take ``most_bytes`` above an idle one. It ends with its caller.

        Raises:
            TimeoutError: it took longer than ``seconds``.
            RayError: its process ended.
        """
        kept, self._idle = self._idle, None
        try:
            return await self._ask(kept or self._start(), most_bytes, rules, spec, seconds)
        except RayActorError:
            if kept is None:
                raise
        return await self._ask(self._start(), most_bytes, rules, spec, seconds)  # that process had ended since

    def _start(self) -> Any:
        return _Checker.options(**check_options(), **self._where).remote()  # type: ignore[attr-defined]

    async def _ask(
        self, checker: Any, most_bytes: int, rules: ReadingRules, spec: JobSpec, seconds: float
    ) -> list[Problem]:
        try:
            async with asyncio.timeout(seconds):
                problems, goes_on = await checker.check.remote(most_bytes, rules, spec, carried())
        except BaseException:
            _end(checker)
            raise
        if goes_on and self._idle is None:
            self._idle = checker
        else:
            _end(checker)
        return list(problems)


def _end(checker: Any) -> None:
    with suppress(Exception):  # it has ended
        ray.kill(checker)


@ray.remote(max_restarts=0)
class _Checker:
    """See ``Checkers``."""

    def __init__(self) -> None:
        # They import torch and transformers, which the caller's process need not load.
        from chainfed_ray.device.lean_imports import load_models

        load_models()
        import_module("chainfed_ray.planning.prepare")
        begin_tracing()
        self._left = _CHECKS

    def check(
        self, most_bytes: int, rules: ReadingRules, spec: JobSpec, parent: Mapping[str, str]
    ) -> tuple[list[Problem], bool]:
        """What is wrong with a job, and whether this process is fit for further checks."""
        with asked_by(parent), span("prepare", parent):
            problems = _problems(most_bytes, rules, spec)
        self._left -= 1
        goes_on = self._left > 0 and status("VmRSS") <= IDLE_BYTES + PREFLIGHT_BYTES
        if goes_on:
            flush(0.0)  # while the answer goes back
        else:
            flush()  # now: this process is ended without a word
        return problems, goes_on


def _problems(most_bytes: int, rules: ReadingRules, spec: JobSpec) -> list[Problem]:
    from chainfed_ray.cluster.pool.placement import check_memories
    from chainfed_ray.planning.prepare import prepare_job

    try:
        check_memories([group.memory for group in spec.fleet.clients])
        with memory_limit(most_bytes), reading_by(rules):
            prepare_job(spec, Path())  # preparing writes nothing into the scratch folder
    except InvalidJob as error:
        return plain(error)
    except MemoryError:
        return [too_large(spec, most_bytes)]
    return []


def too_large(spec: JobSpec, most_bytes: int) -> Problem:
    """What is wrong with a job that needs more than ``most_bytes`` to be checked."""
    return Problem("(job)", spec.name, f"a job whose rows and model can be checked with {format_bytes(most_bytes)}")


def plain(error: InvalidJob) -> list[Problem]:
    """The problems of ``error``, with values as text: the original values may not unpickle in another process."""
    return [Problem.from_document(problem.document()) for problem in error.problems]
