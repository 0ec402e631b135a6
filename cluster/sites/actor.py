"""The Ray actor that stands for a job's clients at sites: it gives their orders to the mailbox, and waits for the answers.

One process stands for all of them, since it only waits. What a site sends is read here and not in the coordinator.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from errno import ENOTCONN
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray

from chainfed_ray.activity import Activity
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.messages import Calibrating, Client, Evaluating, Fitting, Training, TurnResult
from chainfed_ray.client.progress import Progress
from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.pool.orders import receive
from chainfed_ray.cluster.sites.mailbox import Mailbox, OrderState
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.structured_logs import log_as_asked
from chainfed_ray.errors import BudgetExceeded, TurnNotTaken
from chainfed_ray.wire.codec import job_document, result_of, turn_order, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, NotDone, Order
from chainfed_ray.wire.reasons import in_words

Result = TypeVar("Result")
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 1.0
_OVER = ("answered", "withdrawn")
_RETRY_SECONDS = 2.0  # until a database is asked again
_WAITING = OrderState("waiting", None, None, 0.0)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobForSites:
    """What sites must know of a job. ``spec`` is its document, ``base_digest`` that of the base model's files.

    ``memory`` is that of the base model's parts; None before the job is planned.
    """

    id: str
    name: str
    spec: Mapping[str, Any]
    base_digest: str
    memory: MemoryProfile | None = None


class Seen(NamedTuple):
    """The clients whose turns processes at their sites have taken, and the sites that have no process."""

    taken: frozenset[str]
    absent: frozenset[str]


@ray.remote(max_concurrency=10_000, max_restarts=-1, max_task_retries=-1)  # type: ignore[call-overload]  # its types lack this option
class SitesActor:
    """Stands for the clients of ``job`` that are at sites. All calls run in one event loop."""

    def __init__(self, job: JobForSites, storage: Storage) -> None:
        log_as_asked()
        self._job, self._storage = job, storage
        self._opened: Mailbox | None = None
        self._pending: dict[tuple[str, str], asyncio.Future[OrderState]] = {}
        self._seen: dict[tuple[str, str], OrderState] = {}
        self._joined: set[str] | None = None
        self._addresses: dict[str, str] = {}  # of sites, by the names that the job has for them
        self._orders: dict[str, tuple[str, str]] = {}  # the newest of each client, by its name
        self._files: dict[str, HashedFile | None] = {}  # by Ray's names of orders
        self._documents: dict[tuple[str, ...], HashedFile] = {}  # of the job, by its classes
        self._lock = asyncio.Lock()
        self._polling: asyncio.Task[None] | None = None

    async def take_turn(self, client: Client, order: list[Any], told: Mapping[str, str | int]) -> TurnResult:
        """Have the site of ``client`` carry out an order. See ``ClientActor.take_turn``. What is ``told`` stays here.

        Raises:
            BudgetExceeded: the turn exceeded its budget at the site.
            TurnNotTaken: the site refused it, or could not carry it out.
            InvalidUpdate: the answer cannot be read.
        """
        assert client.remote is not None, "a client at a site"
        async with self._lock:  # clients of a round have the same order: its tensors are written once
            given = await _once_there(partial(self._given, client, order[0]))
        key = (self._addresses[client.remote.site], given.id)
        self._orders[client.name] = key
        try:
            state = await self._answered(key)
        finally:
            self._seen.pop(key, None)
        return await _once_there(partial(self._result, client, given, state))

    async def look(self) -> Seen:
        """Where the turns are. One question serves all of them."""
        taken = frozenset(client for client, key in self._orders.items() if key in self._pending and key in self._seen)
        joined = self._joined  # None before the first look at the sites
        return Seen(
            taken, frozenset(site for site, at in self._addresses.items() if joined is not None and at not in joined)
        )

    async def progress(self, client: str) -> Progress:
        """How far the turn of ``client`` is, as the site said last."""
        seen = self._seen.get(self._orders.get(client, ("", "")), _WAITING)
        if seen.doing is None:
            return Progress(Activity(what="getting ready at its site"), seen.worked)
        doing = seen.doing
        return Progress(Activity(what=doing.doing, done=doing.done, total=doing.total, unit=doing.unit), seen.worked)

    async def withdraw(self, client: str) -> None:
        """Take the order of ``client`` back."""
        if key := self._orders.get(client):
            await asyncio.to_thread(self._mailbox.withdraw, *key)

    @property
    def _mailbox(self) -> Mailbox:
        """Opened when it is needed: a database that does not answer now does so later."""
        if self._opened is None:
            self._opened = Mailbox(self._storage)
        return self._opened

    def _given(self, client: Client, reference: Any) -> Order:
        """Put the order for ``client`` into the mailbox."""
        assert client.remote is not None, "a client at a site"
        turn = receive(reference)
        if (name := reference.hex()) not in self._files:
            self._files = {name: None}
            if isinstance(turn, Training | Fitting | Evaluating | Calibrating):
                self._files[name] = self._written(turn)
        job = self._job
        assert job.memory is not None, "turns come after the plan"
        classes = client.remote.classes
        if classes not in self._documents:  # all clients of a job have the same ones
            document = job_document(job.spec, job.memory, classes)
            self._documents = {classes: self._mailbox.files.keep_document(job.id, document)}
        order = turn_order(job.id, job.name, self._documents[classes], job.base_digest, client, turn, self._files[name])
        site = client.remote.site
        if site not in self._addresses:
            self._addresses[site] = self._mailbox.address(self._job.id, site)
        self._mailbox.give(self._addresses[site], order)
        return order

    def _written(self, turn: Training | Fitting | Evaluating | Calibrating) -> HashedFile:
        file = self._mailbox.files.local_tensors(self._job.id, "new")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(turn.tensors, file)
        written = HashedFile.of(file)
        self._mailbox.files.keep_tensors(self._job.id, file, written.sha256)
        self._mailbox.forget_others(self._job.id, written.sha256)
        return written

    async def _answered(self, key: tuple[str, str]) -> OrderState:
        """Wait until the order with this site and id is answered or withdrawn."""
        self._pending[key] = asyncio.get_running_loop().create_future()
        if self._polling is None or self._polling.done():
            self._polling = asyncio.create_task(self._poll())
        try:
            return await self._pending[key]
        finally:
            del self._pending[key]

    async def _poll(self) -> None:
        """Look at the orders in flight, while there are any. A database that does not answer is waited for.

        Those that are over are looked for often; those that sites work on, which may be many, now and then.
        """
        loop = asyncio.get_running_loop()
        look_at = loop.time()
        while self._pending:
            try:
                over = await asyncio.to_thread(self._mailbox.states, {*self._pending}, _OVER)
                if loop.time() >= look_at:
                    look_at = loop.time() + _LOOK_SECONDS
                    self._seen = await asyncio.to_thread(self._mailbox.states, {*self._pending}, ("taken",))
                    self._joined = {site.name for site in await asyncio.to_thread(self._mailbox.sites) if site.joined}
            except Exception as error:  # whatever it is, turns at sites must not hang
                _log.warning("sites cannot be looked at (%s); their turns wait", type(error).__name__)
                over = {}
            for key, state in over.items():
                future = self._pending.get(key)
                if future and not future.done():
                    future.set_result(state)
            await asyncio.sleep(_POLL_SECONDS)

    def _result(self, client: Client, order: Order, state: OrderState) -> TurnResult:
        assert client.remote is not None, "a client at a site"
        site = client.remote.site
        match state.answer:
            case Done() as done:
                file = self._mailbox.files.answer(self._job.id, order.id) if done.tensors else None
                return result_of(client.name, order.kind, done.content, file)
            case NotDone(reason="budget", numbers=numbers, phase=phase) if len(numbers) >= 2:
                planned, cap, *peak = map(int, numbers)
                raise BudgetExceeded(planned, cap, peak[0] if peak else None, phase or "training")
            case NotDone() as answer:
                raise TurnNotTaken(f"site {site}: {in_words(answer)}")
            case _:
                raise TurnNotTaken(f"site {site}: the order was withdrawn")


async def _once_there(work: Callable[[], Result]) -> Result:
    """What ``work`` gives, once the database and the object store answer."""
    while True:
        try:
            return await asyncio.to_thread(work)
        except (*NO_ANSWER, OSError) as error:
            if isinstance(error, OSError) and error.errno != ENOTCONN:
                raise
            _log.warning("the database or the storage does not answer (%s); turns at sites wait", type(error).__name__)
            await asyncio.sleep(_RETRY_SECONDS)
