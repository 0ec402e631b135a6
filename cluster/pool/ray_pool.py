"""Runs the clients' turns on Ray actors, ``slots`` at a time. Whatever Ray raises for a turn is that turn's failure.

So a process that dies, a machine that is gone or an object that is lost costs a turn, and the job goes on.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import isinf
from time import monotonic
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError, RayTaskError

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, HeadLosses, HeadSums, Metrics, Profile, TurnOrder, Update
from chainfed_ray.client.pool import Failure, Outcome
from chainfed_ray.client.progress import Progress
from chainfed_ray.cluster.pool.leases import Lease, LeaseOfSite, Leases
from chainfed_ray.cluster.pool.orders import SentOrder
from chainfed_ray.cluster.pool.placement import never_placed
from chainfed_ray.cluster.pool.waiting import Waiting
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes, format_seconds

_POLL_SECONDS = 1.0
_FETCH_SECONDS = 60  # how long a result that is ready may take to arrive
_ANSWER_SECONDS = 5.0  # how long an actor may take to say how far its turn is
# How long an actor may wait for a machine before idle actors are ended to make room. On a busy machine, starting takes ten
# seconds even if there is room. Ending idle actors sooner would make every later round start them again.
_PATIENCE_SECONDS = 30.0
_LEAST_WORK = 0.01  # the part of the time that a process works, by which it is known to do something
_WORDS = 300  # the most characters of Ray's words for a failure


@dataclass(eq=False)
class _Turn:
    """A turn that runs. ``heard`` is when it was last known to get further; its process had ``worked`` so many seconds then."""

    place: int
    lease: Lease
    heard: float = field(default_factory=monotonic)
    worked: float = 0.0


class RayPool:
    """A ``ClientPool`` on the Ray cluster that this process is connected to. It runs ``slots`` turns at a time.

    ``note`` is told when turns wait for processes to start. That takes seconds, or longer if no machine has room. Without a
    deadline, a turn is given up if its process does nothing for ``silence`` seconds, or if it has no machine for as long.
    ``at_site`` gives leases for clients at sites.
    """

    def __init__(
        self,
        base: ModelSource,
        slots: int,
        note: Note = lambda words: None,
        *,
        silence: float = 300.0,
        at_site: LeaseOfSite | None = None,
    ) -> None:
        self.base, self._note, self._silence = base, note, silence
        self._leases = Leases(base, slots, at_site)

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run ``order`` for each client, for at most ``deadline`` seconds. Yields an outcome for each, in order of arrival."""
        ends, sent, never = monotonic() + deadline, SentOrder(order), never_placed(clients)
        yield from (Outcome(place, failure) for place, failure in never.items())
        waiting = Waiting((place, client) for place, client in enumerate(clients) if place not in never)
        running: dict[Any, _Turn] = {}
        try:
            while waiting or running:
                for place, client, lease in waiting.startable(self._leases.lease):
                    try:
                        running[lease.start(client, sent.reference())] = _Turn(place, lease)
                    except RayError as error:  # such as a full object store
                        self._leases.give_back(lease)
                        yield Outcome(place, _failure(error))
                left = ends - monotonic()
                if left <= 0:
                    break
                done, _ = ray.wait(list(running), timeout=min(left, _POLL_SECONDS)) if running else ([], [])
                for reference in done:
                    yield self._outcome(reference, running.pop(reference), sent)
                for reference, failure in self._silent(running) if isinf(deadline) else ():
                    yield self._given_up(running.pop(reference), failure)
                self._make_room([turn.lease for turn in running.values()])
            known = _asked(running)
            while running:
                reference, turn = running.popitem()
                why = _why(turn.lease, known.get(reference))
                if reference in known:
                    why += "; `rounds.deadline: auto` waits as long as a client works"
                yield self._given_up(turn, Failure.late(deadline, why))
            for place in waiting.places():
                yield Outcome(place, Failure.late(deadline, "other clients used every process"))
        finally:
            # If the caller stopped iterating in the middle of a round, turns are still running.
            for turn in running.values():
                self._leases.end(turn.lease)
            self._note(None)

    def close(self) -> None:
        """End every idle actor."""
        self._leases.end_idle()

    def _outcome(self, reference: Any, turn: _Turn, sent: SentOrder) -> Outcome:
        """The result of a turn that has ended. If the turn itself raised an error, its process lives on."""
        try:
            result = ray.get(reference, timeout=_FETCH_SECONDS)
        except RayTaskError as error:
            self._leases.give_back(turn.lease)
            if isinstance(error.cause, ObjectLostError):
                sent.lost()
            return Outcome(turn.place, Failure.of(error.cause))
        except RayError as error:
            return self._given_up(turn, _failure(error))
        self._leases.give_back(turn.lease)
        known = isinstance(
            result, Profile | Update | HeadSums | Metrics | HeadLosses
        )  # a failure is ours to say, not a client's
        return Outcome(turn.place, result if known else Failure(f"it answered with a {type(result).__name__}"))

    def _given_up(self, turn: _Turn, failure: Failure) -> Outcome:
        self._leases.end(turn.lease)
        return Outcome(turn.place, failure)

    def _silent(self, running: dict[Any, _Turn]) -> list[tuple[Any, Failure]]:
        """The turns that did nothing for too long, each with its failure.

        An actor without a machine may wait as long as other turns run: when they end, there may be room.
        """
        now = monotonic()
        quiet = {reference: turn for reference, turn in running.items() if now - turn.heard >= self._silence}
        known, lost = _asked(quiet), []
        others_run = any(turn.lease.placed for turn in running.values())
        for reference, turn in quiet.items():
            answer = known.get(reference)
            if answer and answer.worked < turn.worked:  # another process at the site has begun it anew
                turn.worked = 0.0
            if answer and answer.worked - turn.worked >= _LEAST_WORK * self._silence:
                turn.heard, turn.worked = now, answer.worked
            elif not turn.lease.placed and others_run:
                turn.heard = now
            else:
                why = _why(turn.lease, answer)
                lost.append((reference, Failure(f"nothing happened for {self._silence:g} s: {why}")))
        return lost

    def _make_room(self, running: Collection[Lease]) -> None:
        """Report waiting actors. If one has waited too long, end all idle actors: they may hold the memory that it needs."""
        now, waiting = monotonic(), [lease for lease in running if not lease.is_placed()]
        processes = [lease for lease in waiting if lease.kept]
        late = [lease for lease in processes if now - lease.made_at > _PATIENCE_SECONDS]
        words = _in_words(len(running), len(processes), max((lease.memory for lease in late), default=None))
        for_sites = sorted({lease.why_waiting() for lease in waiting if not lease.kept})
        self._note("; ".join([*([words] if words else []), *for_sites]) or None)
        if late:
            self._leases.end_idle()


def _asked(turns: dict[Any, _Turn]) -> dict[Any, Progress]:
    """How far each of ``turns`` is, of those whose processes have started and answer."""
    asked = {turn.lease.ask(): key for key, turn in turns.items() if turn.lease.is_placed()}
    if not asked:
        return {}
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_SECONDS)
    known = {}
    for reference in answered:
        try:
            known[asked[reference]] = ray.get(reference)
        except RayError:
            continue  # its process died; the result of its turn will say so
    return known


def _why(lease: Lease, answer: Progress | None) -> str:
    """Why a turn is not done, from its process's ``answer``: how far it is."""
    if not lease.placed:
        return lease.why_waiting()
    if answer is None:
        return "its process does not answer"
    doing = answer.doing
    counted = [f"{doing.done} of {doing.total} {doing.unit}"] if doing.total else []
    if doing.seconds_left:
        counted.append(f"about {format_seconds(doing.seconds_left)} more")
    return f"it was {doing.what}" + (f" ({', '.join(counted)})" if counted else "")


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
