"""The real application over a real database, where checks find nothing and there are no models."""

import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from fastapi import FastAPI

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import InvalidJob
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Sampling
from chainfed_ray.spec.job import JobSpec
from tests.watching import wait_for

MOST_BYTES = 10_000


def an_app(
    store: JobStore,
    access: AccessRules | None = None,
    hosts: Sequence[str] = (),
    most_queued: int | None = None,
    uploads: UploadStore | None = None,
    stored_bytes: int | None = None,
    folder_of: Callable[[str], Path] | None = None,
    answers: FirstAnswers | None = None,
    most_uploads: int | None = None,
    most_aliases: int | None = None,
) -> FastAPI:
    """The application. Its dry runs refuse every job. An upload has 10,000 bytes at most."""
    audit = access.audit if access else None
    service = Service(
        store, _check, _plan, _classify, _embed, _write, {}, audit=audit, most_queued=most_queued, uploads=uploads,
        upload_bytes=MOST_BYTES, stored_bytes=stored_bytes, folder_of=folder_of, most_uploads=most_uploads,
        most_aliases=most_aliases,
    )  # fmt: skip
    return create_app(service, hosts, access, answers)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of the application behind a real HTTP server, for a block."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        thread = Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        wait_for(lambda: server.started, "server")
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


async def _check(spec: JobSpec, reads_anything: bool, tenant: str) -> None:
    pass


async def _plan(spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast:
    raise InvalidJob.at("model.base", spec.model.base, "a model that is here")


async def _classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
    raise NotImplementedError


async def _embed(model: ModelKey, texts: list[str]) -> list[Embedding]:
    raise NotImplementedError


def _write(model: ModelKey, prompt: object, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
    raise NotImplementedError
