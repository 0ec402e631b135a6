"""What the routes need of the rest of the house, and nothing of how it is reached."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Annotated, Protocol

from fastapi import Depends, Request

from chainfed_ray.cluster.jobs.store import JobRecord, JobStore
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.generator import Piece, Prompt, Sampling
from chainfed_ray.spec.job import JobSpec


class Check(Protocol):
    """Raises ``InvalidJob`` where a job cannot run."""

    async def __call__(self, spec: JobSpec) -> None: ...


class DryRun(Protocol):
    """The dry run of a job; raises ``InvalidJob`` where it cannot run with any clients."""

    async def __call__(self, spec: JobSpec) -> Forecast: ...


class Classify(Protocol):
    """The probability of each class, in the order of the model's, for each text."""

    async def __call__(self, job: JobRecord, texts: list[str]) -> list[list[float]]: ...


class Write(Protocol):
    """What a language model makes of a prompt or a chat, piece by piece. Closed before its end, it is written no further.

    Raises ``InvalidJob`` with the first piece, where there is nothing that it can write.
    """

    def __call__(self, job: JobRecord, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]: ...


class Alive(Protocol):
    """Raises where the part of the service that it stands for does not work."""

    async def __call__(self) -> None: ...


@dataclass(frozen=True)
class Service:
    """The database, and the work that is done elsewhere."""

    store: JobStore
    check: Check
    plan: DryRun
    classify: Classify
    write: Write
    parts: dict[str, Alive]


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


WithService = Annotated[Service, Depends(_service)]
