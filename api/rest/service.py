"""What the routes need from the rest of the program, as protocols: routes do not know where or how it runs."""

from collections import defaultdict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

from fastapi import Depends, Request

from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.identity import WITHOUT_KEYS, Identity
from chainfed_ray.cluster.jobs.feed import EventFeed
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.jobs.totals import TotalsOfJobs
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Prompt, Sampling
from chainfed_ray.spec.job import JobSpec


class Check(Protocol):
    """Checks a job. Raises ``InvalidJob`` if it cannot run.

    Unless it ``reads_anything``, it may read only what the service's rules name.
    """

    async def __call__(self, spec: JobSpec, reads_anything: bool) -> None: ...


class DryRun(Protocol):
    """Forecasts a job by a dry run, as ``Check`` checks it. Raises ``InvalidJob`` if it cannot run, whichever clients join."""

    async def __call__(self, spec: JobSpec, reads_anything: bool) -> Forecast: ...


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


class Alive(Protocol):
    """Checks one part of the service. Raises any exception if that part does not work."""

    async def __call__(self) -> None: ...


@dataclass(frozen=True)
class Service:
    """The database of jobs, the work that other processes do, and the health check of each part by its name."""

    store: JobStore
    check: Check
    plan: DryRun
    classify: Classify
    embed: Embed
    write: Write
    parts: dict[str, Alive]
    audit: AuditLog | None = None
    most_queued: int | None = None  # jobs that a tenant may have in the queue

    @cached_property
    def feed(self) -> EventFeed:
        """The events of jobs as they come, for all who watch."""
        return EventFeed(self.store)

    @cached_property
    def totals(self) -> defaultdict[str | None, TotalsOfJobs]:
        """The sums of jobs' events, by the tenant that asks for them; None sees all. Each keeps those of the jobs it shows."""
        return defaultdict(lambda: TotalsOfJobs(self.store))


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Identity:
    """Who sends a request: the front door says it, and there is none where routes are tested without keys."""
    identity: Identity = getattr(request.state, "identity", WITHOUT_KEYS)
    return identity


Caller = Annotated[Identity, Depends(_caller)]
WithService = Annotated[Service, Depends(_service)]


def _jobs(service: WithService, caller: Caller) -> JobStore:
    return service.store.seen_by(caller.tenant, caller.sees_everything)


Jobs = Annotated[JobStore, Depends(_jobs)]
"""The jobs, models and aliases that the caller sees. Routes use these alone, so none tells of another tenant's."""
