"""Checks and forecasts jobs before they are accepted: a few at a time, each in a Ray process with limits.

What a caller sends decides what a check does, so it may take any time and any memory that it is given. It is given memory and
seconds. It ends when its caller goes away, with its process, unless that is one that waits for further checks.
"""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from chainfed_ray.cluster.files.upload_sources import FilesOf, no_files, rules_of_job
from chainfed_ray.cluster.jobs.checking import Checkers, plain, too_large
from chainfed_ray.cluster.resources import on_this_machine, preflight_options
from chainfed_ray.cluster.tenants import DEFAULT_TENANT
from chainfed_ray.cluster.tracing import span
from chainfed_ray.device.memory_limit import memory_limit
from chainfed_ray.errors import InvalidJob, PartUnavailable, ServiceBusy
from chainfed_ray.problem import Problem
from chainfed_ray.reading import EVERYTHING, ReadingRules, reading_by, trouble_behind, what_fails
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.job import JobSpec

_RETRY_SECONDS = 10


@dataclass(frozen=True)
class Limits:
    """What checks and dry runs may take: ``most_bytes`` counts above an idle process.

    Beyond ``at_once`` a few more wait for a place, for ``wait_seconds`` at most. A tenant has a part of both places.
    """

    at_once: int = 3
    at_once_of_tenant: int = 2
    waiting: int = 16
    waiting_of_tenant: int = 8
    wait_seconds: float = 20.0
    check_seconds: float = 120.0
    plan_seconds: float = 300.0
    most_bytes: int = 2 * 2**30


class Preflight:
    """Checks and forecasts jobs, for a cluster where at most ``client_slots`` clients train at once.

    A job reads by the ``rules``. If they say nothing about something, only a job that ``reads_anything`` may read it. It also
    reads the ``uploads`` of its tenant. If they are files of this machine alone, the processes have to be ``near``.
    """

    def __init__(
        self,
        client_slots: int,
        limits: Limits = Limits(),
        rules: ReadingRules = EVERYTHING,
        uploads: FilesOf = no_files,
        near: bool = False,
    ) -> None:
        self._client_slots, self._limits, self._rules, self._uploads = client_slots, limits, rules, uploads
        self._places = asyncio.Semaphore(limits.at_once)
        self._of_tenants = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(limits.at_once_of_tenant))
        self._waiting = Counter[str]()
        self._asking = Counter[str]()  # those that wait or have a place
        self._where = on_this_machine() if near else {}
        self._checkers = Checkers(self._where)

    def prepare(self) -> None:
        """Start a process for the next check, so that nobody waits until it has loaded its libraries."""
        self._checkers.prepare()

    async def check(self, spec: JobSpec, reads_anything: bool = True, tenant: str = DEFAULT_TENANT) -> None:
        """Prepare a job of ``tenant`` and discard the result. This finds what is wrong before the job is accepted.

        Raises:
            InvalidJob: the job cannot run.
            ServiceBusy: there are too many checks already.
            PartUnavailable: the check took too long, or its process died, or a disk that the job reads does not work.
        """
        rules = await self._rules_for(spec, reads_anything, tenant)
        most, seconds = self._limits.most_bytes, self._limits.check_seconds
        async with self._place(tenant):
            with _named("the check of the job", seconds), span("check", tenant=tenant):
                problems = await self._checkers.check(most, rules, spec, seconds)
        if problems:
            raise InvalidJob(tuple(problems))

    async def plan(self, spec: JobSpec, reads_anything: bool = True, tenant: str = DEFAULT_TENANT) -> Forecast:
        """Forecast a job of ``tenant`` by a dry run.

        Raises:
            InvalidJob: the job cannot run, whichever clients join.
            ServiceBusy: there are too many dry runs already.
            PartUnavailable: the dry run took too long, or its process died, or a disk that the job reads does not work.
        """
        rules = await self._rules_for(spec, reads_anything, tenant)
        async with self._place(tenant):
            task: Any = _forecast
            reference = task.options(**preflight_options(), **self._where).remote(
                self._limits.most_bytes, rules, spec, self._client_slots
            )
            try:
                with _named("the dry run", self._limits.plan_seconds):
                    async with asyncio.timeout(self._limits.plan_seconds):
                        answer: Forecast | list[Problem] = await reference
            finally:
                ray.cancel(reference, force=True)  # it ends the process, unless the task is done
        if isinstance(answer, list):
            raise InvalidJob(tuple(answer))
        return answer

    async def _rules_for(self, spec: JobSpec, reads_anything: bool, tenant: str) -> ReadingRules:
        # In a thread: the uploads are looked up in the database.
        document = spec.document()
        return await asyncio.to_thread(rules_of_job, self._rules, reads_anything, self._uploads, tenant, document)

    @asynccontextmanager
    async def _place(self, tenant: str) -> AsyncIterator[None]:
        """Hold one of the places of ``tenant``, and one of all. A few callers wait for one, a short time."""
        what = "checks of jobs and dry runs"
        if self._waiting.total() >= self._limits.waiting:
            raise ServiceBusy(what, _RETRY_SECONDS)
        if self._waiting[tenant] >= self._limits.waiting_of_tenant:
            raise ServiceBusy(f"{what} of one tenant", _RETRY_SECONDS)
        async with AsyncExitStack() as held:
            held.callback(self._leave, tenant)
            self._asking[tenant] += 1
            self._waiting[tenant] += 1
            try:
                async with asyncio.timeout(self._limits.wait_seconds):
                    # A tenant waits for its own first: it must not hold a place of all meanwhile.
                    await held.enter_async_context(self._of_tenants[tenant])
                    await held.enter_async_context(self._places)
            except TimeoutError:
                raise ServiceBusy(what, _RETRY_SECONDS) from None
            finally:
                self._waiting[tenant] -= 1
            yield

    def _leave(self, tenant: str) -> None:
        """Forget a tenant that asks for nothing more."""
        self._asking[tenant] -= 1
        if not self._asking[tenant]:
            for known in (self._asking, self._waiting, self._of_tenants):
                known.pop(tenant, None)


@contextmanager
def _named(what: str, seconds: float) -> Iterator[None]:
    """Raise what goes wrong with a process as an error of ours."""
    try:
        yield
    except TimeoutError:
        raise PartUnavailable(what, f"took longer than {seconds:g} s", _RETRY_SECONDS) from None
    except RayError as error:
        if isinstance(error, RayTaskError) and (trouble := trouble_behind(error.cause)):
            raise PartUnavailable(
                what_fails(trouble), f"does not answer ({trouble.strerror})", _RETRY_SECONDS
            ) from error
        raise PartUnavailable(what, f"ended ({type(error).__name__})", _RETRY_SECONDS) from error


@ray.remote(
    max_retries=0, max_calls=1
)  # a dry run times training steps, and leaves its process changed: do not reuse it
def _forecast(most_bytes: int, rules: ReadingRules, spec: JobSpec, client_slots: int) -> Forecast | list[Problem]:
    from chainfed_ray.device.lean_imports import load_models

    load_models()
    from chainfed_ray.planning.dry_run import dry_run

    cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
    try:
        with memory_limit(most_bytes), reading_by(rules):
            return dry_run(spec, max(min(client_slots, cores), 1))  # a turn takes one core
    except InvalidJob as error:
        return plain(error)
    except MemoryError:
        return [too_large(spec, most_bytes)]
