"""A service that sites can join, on loopback, and processes at sites: with every byte that sites send on record."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.access.identity import Identity
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.site.agent import Agent, Offer
from chainfed_ray.site.connection import Connection
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.transcript import Transcript
from tests.watching import wait_for


@dataclass
class Wire:
    """Every request of a site: its path, and its body."""

    requests: list[tuple[str, bytes]] = field(default_factory=list)

    @property
    def bytes(self) -> bytes:
        """All that was sent."""
        return b"\n".join(path.encode() + b" " + body for path, body in self.requests)


class _Tap:
    """Middleware that knows a site by its key, which is its name, and keeps what it sends."""

    def __init__(self, app: ASGIApp, wire: Wire) -> None:
        self._app, self._wire = app, wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        site = dict(scope["headers"]).get(b"authorization", b"").decode().removeprefix("Bearer ")
        scope.setdefault("state", {})["identity"] = Identity("key", "default", site, frozenset(["site"]))
        kept = bytearray()

        async def tapped() -> Message:
            message = await receive()
            kept.extend(message.get("body", b""))
            return message

        await self._app(scope, tapped, send)
        query = scope["query_string"].decode()
        self._wire.requests.append((f"{scope['path']}?{query}", bytes(kept)))


@dataclass
class SitesService:
    """The service at ``address``, and what its sites have sent."""

    address: str
    mailbox: Mailbox
    wire: Wire
    folder: Path
    stops: list[Callable[[], None]] = field(default_factory=list)

    def join(self, site: str, data: Path, policy: Policy | None = None, **offered: Any) -> Callable[[], None]:
        """Start a process at ``site``, which offers the folder ``data``. Gives what makes it leave."""
        stop, words = Event(), list[str]()
        scratch = self.folder / f"site-{site}"
        offer = Offer(data, scratch, parts=1, slots=1, tells_classes=True, policy=policy or Policy())
        transcript = Transcript(self.folder / f"{site}.log")
        session = f"{len(self.stops):032x}"
        connection = Connection(self.address, site, session, transcript, stop, words.append)
        connection.join("1.0")
        agent = Thread(target=Agent(connection, replace(offer, **offered), stop, words.append).run, daemon=True)
        agent.start()

        def leave() -> None:
            stop.set()
            agent.join()
            connection.close()
            transcript.close()

        self.stops.append(leave)
        return leave


@contextmanager
def a_service(storage: Storage, store: JobStore, folder: Path) -> Iterator[SitesService]:
    """A service on a free port of loopback, for a block. Its sites leave at the end."""

    async def unused(*_: object) -> Any:
        raise NotImplementedError

    mailbox, wire = Mailbox(storage), Wire()
    app = create_app(Service(store, unused, unused, unused, unused, unused, {}, mailbox))  # type: ignore[arg-type]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(_Tap(app, wire), log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        serving = Thread(target=server.run, args=([listening],), daemon=True)
        serving.start()
        wait_for(lambda: server.started, "server")
        found = SitesService(f"http://127.0.0.1:{listening.getsockname()[1]}", mailbox, wire, folder)
        try:
            yield found
        finally:
            for leave in found.stops:
                leave()
            server.should_exit = True
            serving.join()
            mailbox.close()
