"""The real application over a real database, where checks find nothing and there are no models."""

from collections.abc import AsyncGenerator, Sequence

from fastapi import FastAPI

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import InvalidJob
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.job import JobSpec


def an_app(
    store: JobStore, access: AccessRules | None = None, hosts: Sequence[str] = (), most_queued: int | None = None
) -> FastAPI:
    """The application. Its dry runs refuse every job."""
    audit = access.audit if access else None
    service = Service(store, _check, _plan, _classify, _embed, _write, {}, audit=audit, most_queued=most_queued)
    return create_app(service, hosts, access)


async def _check(spec: JobSpec, reads_anything: bool) -> None:
    pass


async def _plan(spec: JobSpec, reads_anything: bool) -> Forecast:
    raise InvalidJob.at("model.base", spec.model.base, "a model that is here")


async def _classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
    raise NotImplementedError


async def _embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
    raise NotImplementedError


def _write(model: ModelKey, prompt: object, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
    raise NotImplementedError
