"""The process at a site: it asks the service for orders, has them carried out, and sends the answers."""

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from chainfed_ray.errors import ServiceFailed
from chainfed_ray.site.connection import Connection, Withdrawn
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.turn_process import TurnProcess
from chainfed_ray.site.working_time import WorkingTime
from chainfed_ray.wire.envelope import JOB, Answer, Done, JobDocument, NotDone, Order
from chainfed_ray.wire.reasons import in_words

_WAIT_SECONDS = 20.0
_LOOK_SECONDS = 0.2
_LEAVE_SECONDS = 10.0
_HEARTBEAT_SECONDS = 3.0
_PAUSE_SECONDS = 5.0  # after an order that the service could not handle
_MOST_JOBS = 1000  # that the service is asked after at a time
_KEPT = 8  # files of adapters, and of documents of jobs, that are kept: those that were used last


@dataclass(frozen=True)
class Offer:
    """What a site offers: the folder ``data``, of whose files ``parts`` clients are made, and ``slots`` turns at a time.

    Caches of prefixes, adapters and updates are in ``scratch``, and how long the turns of each job have taken. With
    ``tells_classes`` the names of classes may cross the boundary.
    """

    data: Path
    scratch: Path
    parts: int
    slots: int
    tells_classes: bool
    policy: Policy

    def worker(self, scratch: Path) -> dict[str, Any]:
        """The arguments of a worker with a folder of its own."""
        own = {"parts": self.parts, "tells_classes": self.tells_classes}
        return {"folder": str(self.data), "scratch": str(scratch), **own}


class _TooLong(Exception):
    """The turns of a job have taken longer than the site allows, which ``answer`` says."""

    def __init__(self, answer: NotDone) -> None:
        super().__init__(answer)
        self.answer = answer


class Agent:
    """Takes orders from ``connection`` until ``stop`` is set. ``told`` hears what goes on, in words."""

    def __init__(self, connection: Connection, offer: Offer, stop: Event, told: Callable[[str], None]) -> None:
        self._connection, self._offer, self._stop, self._told = connection, offer, stop, told
        self._working_time = WorkingTime(offer.scratch / "worked")
        # Of this process alone: one that takes its place may begin before this one ends.
        self._slots = offer.scratch / f"slots-{token_hex(8)}"
        # An earlier process has told of rows of these jobs: those that have ended meanwhile are forgotten.
        found = {told.stem for told in (offer.scratch / "told").glob("*.*")}
        self._jobs = {job for job in found if re.fullmatch(JOB, job)}
        self._failure: Exception | None = None
        self._running: set[str] = set()
        self._asking = Lock()
        self._told_at: defaultdict[str, float] = defaultdict(float)  # when the service heard of an order

    def run(self) -> None:
        """Carry out orders until ``stop`` is set. Orders in flight are then given back.

        Raises:
            ChainFedError: the service refuses the site.
            Exception: something else went wrong at the site.
        """
        slots = [Thread(target=self._slot, args=(slot,), daemon=True) for slot in range(self._offer.slots)]
        for thread in slots:
            thread.start()
        while not self._stop.wait(_LOOK_SECONDS):
            pass
        if not self._failure:
            self._connection.leave()  # at once: it also ends the wait for the next order
        ends = monotonic() + _LEAVE_SECONDS
        for thread in slots:  # one that waits for a service which does not answer ends with this process
            thread.join(max(ends - monotonic(), 0))
        shutil.rmtree(self._slots, ignore_errors=True)  # the next process makes its own
        if self._failure:
            raise self._failure

    def _slot(self, slot: int) -> None:
        """Carry out one order after the other."""
        scratch = self._slots / str(slot)
        process = TurnProcess(self._offer.worker(scratch))
        try:
            while not self._stop.is_set():
                try:
                    if order := self._next():
                        try:
                            self._carry_out(order, process, scratch)
                        finally:
                            self._running.discard(order.id)
                    else:
                        process.end()  # there is no work, so its memory is given back
                except Withdrawn:
                    continue
                except (ServiceFailed, OSError) as error:  # a disk that is full is waited for as well
                    self._told(str(error))
                    self._stop.wait(_PAUSE_SECONDS)
        except Exception as error:  # whatever it is: a process that lives on and asks for nothing is of no use
            if not self._stop.is_set():  # a process that leaves is given no more orders
                self._failure = error
                self._stop.set()
        finally:
            process.end()

    def _next(self) -> Order | None:
        """The next order. One slot asks at a time, so that the service knows which orders this process has."""
        with self._asking:
            if self._stop.is_set():
                return None
            asked = sorted(self._jobs)[-_MOST_JOBS:]
            found = self._connection.next(_WAIT_SECONDS, self._running, asked)
            self._forget(found.over)
            if found.order:
                self._running.add(found.order.id)
        return found.order

    def _forget(self, jobs: Iterable[str]) -> None:
        """Delete the caches of ``jobs``, which are over."""
        for job in self._jobs & {*jobs}:
            self._jobs.discard(job)
            for slot in self._slots.glob("*"):
                shutil.rmtree(slot / job, ignore_errors=True)
            for told in (self._offer.scratch / "told").glob(f"{job}.*"):
                told.unlink(missing_ok=True)

    def _carry_out(self, order: Order, process: TurnProcess, scratch: Path) -> None:
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)  # caches follow from rows, so they are for no other user
        if order.job not in self._jobs:
            self._jobs.add(order.job)
            self._told(f"Job {order.name} ({order.job}).")
        sent = scratch / f"{order.id}.answer.safetensors"
        started = monotonic()
        try:
            document = self._connection.fetch_document(order, scratch / "documents")
            answer: Answer | None = self._refusal(order, document)
            if answer is None:
                tensors = self._connection.fetch(order, scratch / "adapters")
                answer = self._carried_out(order, document, tensors, process, sent)
            answer = self._sent(order.id, answer, sent)
            how = in_words(answer) if isinstance(answer, NotDone) else "done"
            self._told(f"{order.name}: {order.kind} {_client(order)}: {how} ({monotonic() - started:.1f} s)")
        except Withdrawn as error:
            self._told(f"{order.name}: {order.kind} {_client(order)}: given up ({error})")
            process.end()
            raise
        finally:
            self._told_at.pop(order.id, None)
            sent.unlink(missing_ok=True)
            for folder in ("documents", "adapters"):
                _forget_all_but(_KEPT, scratch / folder)

    def _refusal(self, order: Order, document: Path) -> NotDone | None:
        """The answer that refuses ``order``, or None."""
        try:
            spec = JobDocument.read(document).spec
        except ValueError:
            return NotDone(reason="job")
        return self._offer.policy.refusal(order, spec, self._working_time.of(order.job))

    def _carried_out(
        self, order: Order, document: Path, tensors: Path | None, process: TurnProcess, sent: Path
    ) -> Answer:
        """Have an order carried out. Its time counts for its job, however it ends."""
        counted = monotonic()

        def count(is_over: bool = False) -> float:
            nonlocal counted
            before, counted = counted, monotonic()
            return self._working_time.add(order.job, counted - before, is_over)

        def heard(doing: Mapping[str, Any]) -> None:
            if too_long := self._offer.policy.too_long(count()):
                raise _TooLong(too_long)
            self._heard(order, doing)

        try:
            return process.carry_out(order, document, tensors, sent, heard)
        except _TooLong as error:
            return error.answer
        finally:
            count(is_over=True)

    def _sent(self, order: str, answer: Answer, tensors: Path) -> Answer:
        """Send an answer. One that the service refuses is replaced by one that says so, or it would be asked for again."""
        try:
            if isinstance(answer, Done) and answer.tensors is not None:
                self._connection.send(order, tensors)
            self._connection.answer(order, answer)
        except ServiceFailed as error:
            self._told(str(error))
            answer = NotDone(reason="error", kind="AnswerRefused")
            self._connection.answer(order, answer)
        return answer

    def _heard(self, order: Order, doing: Mapping[str, Any]) -> None:
        if self._stop.is_set():
            raise Withdrawn("the site leaves")
        if monotonic() - self._told_at[order.id] >= _HEARTBEAT_SECONDS:
            self._connection.heartbeat(order.id, doing)
            self._told_at[order.id] = monotonic()


def forget_caches(scratch: Path) -> None:
    """Delete what earlier processes left in ``scratch``."""
    for folder in scratch.glob("slot*-*"):
        shutil.rmtree(folder, ignore_errors=True)


def _client(order: Order) -> str:
    client: Mapping[str, Any] = order.content.get("client", {})
    return str(client.get("name") or order.content.get("data", ""))


def _forget_all_but(count: int, folder: Path) -> None:
    """Delete the files of ``folder`` that were not used lately."""
    files = sorted(folder.glob("*"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[count:]:
        file.unlink(missing_ok=True)
