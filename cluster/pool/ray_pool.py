"""Runs the clients' turns on Ray actors, ``slots`` at a time. Whatever Ray raises for a turn is that turn's failure.

So a process that dies, a machine that is gone or an object that is lost costs a turn, and the job goes on.
"""

from collections.abc import Iterator, Sequence
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, TurnOrder
from chainfed_ray.client.pool import Failure, Outcome
from chainfed_ray.cluster.pool.leases import Lease, Leases
from chainfed_ray.cluster.pool.orders import SentOrder
from chainfed_ray.cluster.pool.waiting import Waiting
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes

_POLL_SECONDS = 1.0
_FETCH_SECONDS = 60  # how long a result that is ready may take to arrive
# How long an actor may wait for a machine before idle actors are ended to make room. On a busy machine, starting takes ten
# seconds even if there is room. Ending idle actors sooner would make every later round start them again.
_PATIENCE_SECONDS = 30.0
_WORDS = 300  # the most characters of Ray's words for a failure


class RayPool:
    """A ``ClientPool`` on the Ray cluster that this process is connected to. It runs ``slots`` turns at a time.

    ``note`` is told when turns wait for processes to start. That takes seconds, or longer if no machine has room.
    """

    def __init__(self, base: ModelSource, slots: int, note: Note = lambda words: None) -> None:
        self.base, self._note = base, note
        self._leases = Leases(base, slots)

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run ``order`` for each client, for at most ``deadline`` seconds. Yields an outcome for each, in order of arrival."""
        ends = monotonic() + deadline
        sent, waiting = SentOrder(order), Waiting(enumerate(clients))
        running: dict[Any, tuple[int, Lease]] = {}
        try:
            while waiting or running:
                for place, client, lease in waiting.startable(self._leases.lease):
                    try:
                        running[lease.actor.take_turn.remote(client, [sent.reference()])] = (place, lease)
                    except RayError as error:  # such as a full object store
                        self._leases.give_back(lease)
                        yield Outcome(place, _failure(error))
                left = ends - monotonic()
                if left <= 0:
                    break
                done, _ = ray.wait(list(running), timeout=min(left, _POLL_SECONDS)) if running else ([], [])
                for reference in done:
                    yield self._outcome(reference, *running.pop(reference), sent)
                self._make_room([lease for _, lease in running.values()])
            for place, lease in list(running.values()):
                why = "" if lease.is_placed() else f"no machine with {format_bytes(lease.memory)} was free for it"
                self._leases.end(lease)
                yield Outcome(place, Failure.late(deadline, why))
            running.clear()
            for place in waiting.places():
                yield Outcome(place, Failure.late(deadline, "other clients used every process"))
        finally:
            # If the caller stopped iterating in the middle of a round, turns are still running.
            for _, lease in running.values():
                self._leases.end(lease)
            self._note(None)

    def close(self) -> None:
        """End every idle actor."""
        self._leases.end_idle()

    def _outcome(self, reference: Any, place: int, lease: Lease, sent: SentOrder) -> Outcome:
        """The result of a turn that has ended. If the turn itself raised an error, its process lives on."""
        try:
            result = ray.get(reference, timeout=_FETCH_SECONDS)
        except RayTaskError as error:
            self._leases.give_back(lease)
            if isinstance(error.cause, ObjectLostError):
                sent.lost()
            return Outcome(place, Failure.of(error.cause))
        except RayError as error:
            self._leases.end(lease)
            return Outcome(place, _failure(error))
        self._leases.give_back(lease)
        return Outcome(place, result)

    def _make_room(self, running: Sequence[Lease]) -> None:
        """Report waiting actors. If one has waited too long, end all idle actors: they may hold the memory that it needs."""
        now, waiting = monotonic(), [lease for lease in running if not lease.is_placed()]
        late = [lease for lease in waiting if now - lease.made_at > _PATIENCE_SECONDS]
        self._note(_in_words(len(running), len(waiting), max((lease.memory for lease in late), default=None)))
        if late:
            self._leases.end_idle()


def _failure(error: RayError) -> Failure:
    """The failure of a turn for which Ray raised ``error``, with Ray's words for the cause."""
    if isinstance(error, GetTimeoutError):
        return Failure(f"its result could not be fetched within {_FETCH_SECONDS} s")
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, RayActorError):
        what, words = "its process died", lines[-1]  # below the actor's identity or a traceback
    else:
        what, words = "Ray could not run it", " ".join(lines)
    return Failure(f"{what} ({type(error).__name__}: {words[:_WORDS]})")


def _in_words(running: int, waiting: int, memory: int | None) -> str | None:
    """A note that of ``running`` turns, ``waiting`` ones wait for a process to start; None if none does.

    ``memory`` is what the process needs in bytes, if it has waited for long.
    """
    if not waiting:
        return None
    machine = "" if memory is None else f", with {format_bytes(memory)}"
    return f"waiting for {waiting} of {running} processes{machine}"
