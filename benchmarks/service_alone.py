"""The service's application in one process, without Ray and HAProxy: ``python -m benchmarks.service_alone DATABASE PORT``.

Its models answer at once, so that what a request costs besides is not hidden behind them. With a folder of storage after the
port, sites can join.
"""

import socket
from argparse import ArgumentParser
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import uvicorn

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.serving.messages import ModelKey, Piece, Prompt, Sampling

_CLASSES = 8


async def _classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
    return [[1 / _CLASSES] * _CLASSES for _ in texts]


async def _none(*_: Any, **__: Any) -> Any:
    raise NotImplementedError


async def _nothing(model: ModelKey, prompt: Prompt, sampling: Sampling, in_pieces: bool) -> AsyncGenerator[Piece, None]:
    raise NotImplementedError
    yield  # which makes it a generator


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("database")
    parser.add_argument("port", type=int)
    parser.add_argument("storage", type=Path, nargs="?")
    options = parser.parse_args()
    unused: Any = _none
    store = JobStore(options.database, existing=True)
    mailbox = Mailbox(Storage.at(options.storage, options.database)) if options.storage else None
    service = Service(store, unused, unused, _classify, unused, _nothing, {}, sites=mailbox)
    keys, audit = KeyRing(KeyStore(options.database, existing=True)), AuditLog(options.database, existing=True)
    answers = FirstAnswers(options.database, existing=True)
    app = create_app(service, access=AccessRules(keys, "loopback", audit=audit), answers=answers)
    listener = socket.create_server(("127.0.0.1", options.port))
    print("ready", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run(sockets=[listener])
