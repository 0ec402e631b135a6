"""A service that sites can join, on loopback, and processes at sites: with every byte that sites send on record."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.client.messages import Training, Update
from chainfed_ray.client.objective import trained_names
from chainfed_ray.client.survey import ClientSurvey, Survey
from chainfed_ray.cluster.access.identity import Identity
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.site.agent import Agent, Offer
from chainfed_ray.site.connection import Connection
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.wire.codec import result_document, survey_document, turn_of, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, Order
from tests.watching import wait_for

ANYTHING = Policy(models=("*",))  # also models in a folder of this machine


@dataclass
class Wire:
    """Every request of a site: its path, and its body."""

    requests: list[tuple[str, str, bytes]] = field(default_factory=list)  # site, path, body

    @property
    def bytes(self) -> bytes:
        """All that was sent."""
        return b"\n".join(path.encode() + b" " + body for _, path, body in self.requests)

    def has(self, site: str, words: str) -> bool:
        """True if ``site`` has sent a request with ``words`` in its path."""
        return any(sender == site and words in path for sender, path, _ in self.requests)


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
        self._wire.requests.append((site, f"{scope['path']}?{query}", bytes(kept)))


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
        offer = Offer(data, scratch, parts=1, slots=1, tells_classes=True, policy=policy or ANYTHING)
        transcript = Transcript(self.folder / f"{site}.log")
        session = f"{len(self.stops):032x}"
        connection = Connection(self.address, site, session, transcript, stop, words.append)
        connection.join("1.0", site)
        agent = Thread(target=Agent(connection, replace(offer, **offered), stop, words.append).run, daemon=True)
        agent.start()

        def leave() -> None:
            stop.set()
            agent.join()
            connection.close()
            transcript.close()

        self.stops.append(leave)
        return leave

    def process(self, site: str, data: Path) -> "subprocess.Popen[bytes]":
        """A process at ``site``: ``chainfed join``, as people start it."""
        command = [
            sys.executable,
            "-c",
            "from chainfed_ray.api.command.entry import main; main()",
            "join",
            self.address,
        ]
        command += [
            "--site",
            site,
            "--data",
            str(data),
            "--cache",
            str(self.folder / f"cache-{site}"),
            "--allow-models",
            "*",
        ]
        process = subprocess.Popen(command, env={**os.environ, "CHAINFED_SITE_KEY": site})

        def leave() -> None:
            process.terminate()
            process.wait(30)

        self.stops.append(leave)
        return process

    def liar(self, site: str, lies: Iterable[Callable[[Update], Update]]) -> None:
        """Answer the orders of ``site`` as an honest site whose updates are changed by ``lies``, one after the other."""
        left = iter(lies)
        stop, session = Event(), f"{len(self.stops):032x}"
        connection = Connection(self.address, site, session, Transcript(None), stop, print)
        connection.join("1.0", site)

        def answers() -> None:
            while not stop.is_set():
                order = self.mailbox.next(site, session)
                if order is None:
                    stop.wait(0.05)
                elif order.kind == "survey":
                    counts = ClientSurvey(ExampleCounts(24, 8, 100), {"sea": 8, "sky": 8, "soil": 8})
                    self.mailbox.answer(site, order.id, session, Done(content=survey_document(Survey((counts,)))))
                else:
                    self._lie(site, session, connection, order, next(left))

        thread = Thread(target=answers, daemon=True)
        thread.start()

        def leave() -> None:
            stop.set()
            thread.join()
            connection.close()

        self.stops.append(leave)

    def _lie(
        self, site: str, session: str, connection: Connection, order: Order, lie: Callable[[Update], Update]
    ) -> None:
        turn = turn_of(order, self.mailbox.tensors_of(site, order.id))
        assert isinstance(turn, Training)
        names = trained_names(turn.tensors, turn.window, turn.global_weight, turn.global_trains)
        honest = Update({name: turn.tensors[name] for name in names}, 24, 1.0, 3, 0.1, 0.1)
        content, tensors = result_document(lie(honest))
        sent = self.folder / f"{site}.safetensors"
        write_tensors(tensors, sent)
        connection.send(order.id, sent)
        connection.answer(order.id, Done(content=json.loads(json.dumps(content)), tensors=HashedFile.of(sent)))


@contextmanager
def a_service(storage: Storage, store: JobStore, folder: Path) -> Iterator[SitesService]:
    """A service on a free port of loopback, for a block. Its sites leave at the end."""

    async def unused(*_: object) -> Any:
        raise NotImplementedError

    mailbox, wire = Mailbox(storage), Wire()
    app = create_app(Service(store, unused, unused, unused, unused, unused, {}, sites=mailbox))  # type: ignore[arg-type]
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
