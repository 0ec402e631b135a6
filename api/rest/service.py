"""What the routes need from the rest of the program, as protocols: routes do not know where or how it runs.

Work that a caller asked for ends when the caller goes away (``while_connected``).
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextvars import Context
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Annotated, Protocol, TypeVar

from fastapi import Depends, HTTPException, Request

from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.identity import WITHOUT_KEYS, Identity
from chainfed_ray.cluster.access.waiting import Waiting
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.feed import EventFeed
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.client_memory import check_fits
from chainfed_ray.cluster.queries.totals import TotalsOfJobs
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.sites.order_feed import OrderFeed
from chainfed_ray.records.fleet import FleetClient, clients_in
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Prompt, Sampling
from chainfed_ray.spec.job import JobSpec

Result = TypeVar("Result")
_PATIENCE_SECONDS = 5.0  # for a part of the service
_KEPT_SECONDS = 2.0
_log = logging.getLogger(__name__)


class CallerGone(Exception):
    """The caller has closed the connection, so nobody waits for the answer."""


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Do ``work``, and cancel it if the caller goes away. The request's body must have been read.

    Raises:
        CallerGone: the caller has gone.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CallerGone
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait((working, leaving))  # until it has let go of what it holds


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Check(Protocol):
    """Checks a job. Raises ``InvalidJob`` if it cannot run.

    It is a job of ``tenant``, whose uploads it may read. Unless it ``reads_anything``, it may read besides only what the
    service's rules name.
    """

    async def __call__(self, spec: JobSpec, reads_anything: bool, tenant: str) -> None: ...


class DryRun(Protocol):
    """Forecasts a job by a dry run, as ``Check`` checks it. Raises ``InvalidJob`` if it cannot run, whichever clients join."""

    async def __call__(self, spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast: ...


class Classify(Protocol):
    """Classifies texts with ``model``, which has a stack.

    Returns for each text the probability of each class, in the order of the model's classes.
    """

    async def __call__(self, model: ModelKey, texts: list[str]) -> list[list[float]]: ...


class Embed(Protocol):
    """Embeds texts with ``model``, an encoder. Returns the embedding of each text."""

    async def __call__(self, model: ModelKey, texts: list[str]) -> list[Embedding]: ...


class Write(Protocol):
    """Continues a prompt, or answers a chat, with a language model. Yields the text in pieces as they come, or as a whole.

    Closing the generator stops the generation. Asking for the first piece raises ``InvalidJob`` if the prompt is invalid.
    """

    def __call__(
        self, model: ModelKey, prompt: Prompt, sampling: Sampling, in_pieces: bool
    ) -> AsyncGenerator[Piece, None]: ...


class ListClients(Protocol):
    """At most ``limit`` clients of a job's fleet, without the first ``after``. Those that came ``late`` are the last."""

    def __call__(self, job: str, after: int, limit: int, late: Iterable[FleetClient]) -> list[FleetClient]: ...


def unlisted(job: str, after: int, limit: int, late: Iterable[FleetClient]) -> list[FleetClient]:
    """See ``ListClients``: a service without storage lists nobody."""
    return []


def listed_in(folder_of: Callable[[str], Path]) -> ListClients:
    """Lists from the files of jobs, whose folders are given by ``folder_of``."""
    return lambda job, after, limit, late: clients_in(folder_of(job), after, limit, late)


class Alive(Protocol):
    """Checks one part of the service. Raises any exception if that part does not work."""

    async def __call__(self) -> None: ...


class Parts:
    """Checks all parts of the service at the same time, each within ``_PATIENCE_SECONDS``. All calls come from one event loop.

    A check writes to disks and asks other processes, and anybody may ask for it. So what was found is kept for
    ``_KEPT_SECONDS``, and who asks meanwhile, or while the parts are checked, is told the same.
    """

    def __init__(self, parts: Mapping[str, Alive]) -> None:
        self._parts, self._kept_until = parts, 0.0
        self._checking: asyncio.Task[dict[str, str]] | None = None

    async def states(self) -> dict[str, str]:
        """For each part ``ok``, or why it does not work."""
        checking = self._checking
        if checking is None or (checking.done() and monotonic() >= self._kept_until):
            # In a context of its own: Ray Serve would take the check for a part of this caller's request, and end it with that.
            self._checking = checking = asyncio.create_task(self._check(), context=Context())
        return await asyncio.shield(checking)  # a caller that goes away ends it for nobody

    async def _check(self) -> dict[str, str]:
        states = await asyncio.gather(*(self._state(name, alive) for name, alive in self._parts.items()))
        self._kept_until = monotonic() + _KEPT_SECONDS
        return dict(zip(self._parts, states, strict=True))

    async def _state(self, name: str, alive: Alive) -> str:
        try:
            await asyncio.wait_for(alive(), _PATIENCE_SECONDS)
        except TimeoutError:
            return f"no answer within {_PATIENCE_SECONDS:g} s"
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():
                raise
            return "gave up its answer"
        except Exception as error:  # whatever one part raises, the others are still checked
            _log.warning("%s does not work", name, exc_info=error)
            return f"{type(error).__name__}; the service's log says more"
        return "ok"


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Service:
    """The database of jobs, the work of other processes, the health check of each part, lists of clients, orders of sites."""

    store: JobStore
    check: Check
    plan: DryRun
    classify: Classify
    embed: Embed
    write: Write
    parts: dict[str, Alive]
    clients: ListClients = unlisted
    sites: Mailbox | None = None
    audit: AuditLog | None = None
    most_queued: int | None = None  # jobs that a tenant may have in the queue
    uploads: UploadStore | None = None
    upload_bytes: int = 2**30  # of an upload, at most
    stored_bytes: int | None = None  # of a tenant: of its uploads, and of its jobs
    folder_of: Callable[[str], Path] | None = None  # a job's commits and artifacts
    most_uploads: int | None = None  # of a tenant
    most_aliases: int | None = None  # of a tenant
    drains: Callable[[], bool] = _never  # whether the service is about to end
    client_memory: int | None = None  # bytes of a tenant's clients that train at once
    client_slots: int = 1  # clients of a job that train at once

    def queue_of(self, caller: Identity) -> int | None:
        """How many jobs a tenant may have in the queue, where ``caller`` asks. Without keys there is no limit."""
        return self.most_queued if caller.key else None

    def bytes_of(self, caller: Identity) -> int | None:
        """How many bytes may be kept for a tenant, where ``caller`` asks. Without keys there is no limit."""
        return self.stored_bytes if caller.key else None

    def check_fits(self, document: Mapping[str, object], caller: Identity) -> None:
        """Check that the limit of clients' memory lets the job of ``document`` ever begin. Without keys there is no limit.

        Raises:
            InvalidJob: it does not.
        """
        if caller.key and self.client_memory is not None:
            check_fits(document, self.client_slots, self.client_memory)

    def check_kept(self, caller: Identity) -> None:
        """Check that there is room for what another job of the caller's tenant leaves.

        Raises:
            LimitReached: as many bytes as may be are kept for it already.
        """
        self.store.kept_bytes.check(caller.tenant, self.bytes_of(caller))

    @cached_property
    def feed(self) -> EventFeed:
        """The events of jobs as they come, for all who watch."""
        return EventFeed(self.store, self.drains)

    @cached_property
    def health(self) -> Parts:
        """Whether each part works, for all who ask."""
        return Parts(self.parts)

    @cached_property
    def log_readers(self) -> Waiting:
        """The requests that wait for lines of logs."""
        return Waiting("lines of logs")

    @cached_property
    def orders(self) -> OrderFeed:
        """Which sites have an order that waits, for all sites that ask."""
        return OrderFeed(self.mailbox)

    @property
    def mailbox(self) -> Mailbox:
        """The orders of sites.

        Raises:
            HTTPException: 404, if this service has no sites.
        """
        if self.sites is None:
            raise HTTPException(404, "this service has no sites")
        return self.sites

    @cached_property
    def totals(self) -> defaultdict[str | None, TotalsOfJobs]:
        """The sums of jobs' events, by the tenant that asks for them; None sees all. Each keeps those of the jobs it shows."""
        return defaultdict(lambda: TotalsOfJobs(self.store))


# Each of these is async, or FastAPI would have it done by a thread, which takes longer than what is done.


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _caller(request: Request) -> Identity:
    """Who sends a request: the front door says it, and there is none where routes are tested without keys."""
    identity: Identity = getattr(request.state, "identity", WITHOUT_KEYS)
    return identity


Caller = Annotated[Identity, Depends(_caller)]
WithService = Annotated[Service, Depends(_service)]


async def _jobs(request: Request) -> JobStore:
    service, caller = await _service(request), await _caller(request)  # as dependencies they would take longer
    return service.store.seen_by(caller.tenant, caller.sees_everything)


async def _uploads(service: WithService, caller: Caller) -> UploadStore:
    if service.uploads is None:
        raise HTTPException(404, "this service keeps no uploads")
    return service.uploads.seen_by(caller.tenant, caller.sees_everything)


Uploads = Annotated[UploadStore, Depends(_uploads)]
"""The uploads that the caller sees."""
Jobs = Annotated[JobStore, Depends(_jobs)]
"""The jobs, models and aliases that the caller sees. Routes use these alone, so none tells of another tenant's."""
