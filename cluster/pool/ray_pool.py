"""Runs the clients' turns on Ray actors, ``slots`` at a time. Whatever Ray raises for a turn is that turn's failure.

So a process that dies or an object that is lost costs a turn, and the job goes on. A machine that is gone costs nothing but
time: its turns begin anew on another one.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import isinf
from time import monotonic
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, HeadLosses, HeadSums, Metrics, Profile, TurnOrder, Update
from chainfed_ray.client.pool import Failure, Foresee, Need, Outcome, Tell
from chainfed_ray.client.progress import Progress
from chainfed_ray.cluster.pool.autoscaler import has_been_given_room, is_gone, is_growing, may_have_room
from chainfed_ray.cluster.pool.leases import Lease, LeaseOfSite, Leases
from chainfed_ray.cluster.pool.orders import SentOrder
from chainfed_ray.cluster.pool.placement import is_one_machine
from chainfed_ray.cluster.pool.unmet import UnmetDemands
from chainfed_ray.cluster.pool.waiting import Waiting
from chainfed_ray.cluster.tracing import Span, open_span
from chainfed_ray.model.source import ModelSource
from chainfed_ray.problem import some_of
from chainfed_ray.units import format_bytes, format_seconds

_POLL_SECONDS = 1.0
_FETCH_SECONDS = 60  # how long a result that is ready may take to arrive
_ANSWER_SECONDS = 5.0  # how long an actor may take to say how far its turn is
# How long an actor may wait for a machine before idle actors are ended to make room. On a busy machine, starting takes ten
# seconds even if there is room. Ending idle actors sooner would make every later round start them again.
_PATIENCE_SECONDS = 30.0
_GROWING_SECONDS = 120.0  # the same while the autoscaler adds a machine
_MACHINES = 3  # on so many machines a turn is begun, if one after the other is lost
_UNCLEAR_SECONDS = 120.0  # how long Ray may take to find out whether a process or its machine is gone
_LEAST_WORK = 0.01  # the part of the time that a process works, by which it is known to do something
_WORDS = 300  # the most characters of Ray's words for a failure


@dataclass(eq=False)
class _Turn:
    """A turn that runs. ``heard`` is when it was last known to get further; its process had ``worked`` so many seconds then.

    With ``starting`` its process has a machine, and is not ready: then it has had that since ``heard`` at least.
    If the process stops to answer, ``unclear`` is Ray's error for the turn, ``since`` when, until it is known why.
    """

    place: int
    client: Client
    lease: Lease
    span: Span
    heard: float = field(default_factory=monotonic)
    worked: float = 0.0
    starting: bool = False
    unclear: RayError | None = None
    since: float = 0.0


class RayPool:
    """A ``ClientPool`` on the Ray cluster that this process is connected to. It runs ``slots`` turns at a time.

    ``note`` is told when turns wait for processes to start. That takes seconds, or longer if no machine has room. Without a
    deadline, a turn is given up if its process does nothing for ``silence`` seconds, is not ready so long after it was found to
    have a machine, or for as long has none and there is none on which it could wait for room.
    ``at_site`` gives leases for clients at sites. ``tell`` hears of classes of clients for which the cluster never has room.
    """

    def __init__(
        self,
        base: ModelSource,
        slots: int,
        note: Note = lambda words: None,
        *,
        silence: float = 300.0,
        at_site: LeaseOfSite | None = None,
        tell: Tell = lambda demand: None,
    ) -> None:
        self.base, self._note, self._silence = base, note, silence
        self._leases = Leases(base, slots, at_site)
        self._unmet = UnmetDemands(tell)
        self._needs: Sequence[Need] | None = None  # of the next rounds; None if nobody has said

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run ``order`` for each client, for at most ``deadline`` seconds. Yields an outcome for each, in order of arrival."""
        ends, sent, never = monotonic() + deadline, SentOrder(order), self._unmet.among(clients)
        yield from (Outcome(place, failure) for place, failure in never.items())
        waiting = Waiting((place, client) for place, client in enumerate(clients) if place not in never)
        running: dict[Any, _Turn] = {}
        lost = Counter[int]()  # machines, by the places of clients whose turns they had
        try:
            while waiting or running:
                for place, client, lease in waiting.startable(self._leases.lease, self._leases.loss):
                    try:
                        begun = lease.start(client, sent.reference())
                        kind = client.client_class
                        span = open_span("turn", order=type(order).__name__, client=client.name, client_class=kind)
                        running[begun] = _Turn(place, client, lease, span)
                    except RayError as error:  # such as a full object store
                        self._leases.give_back(lease, client)
                        yield Outcome(place, _failure(error))
                left = ends - monotonic()
                if left <= 0:
                    break
                done, _ = ray.wait(list(running), timeout=min(left, _POLL_SECONDS)) if running else ([], [])
                for reference in done:
                    turn = running.pop(reference)
                    found = self._outcome(reference, turn, sent)
                    if isinstance(found, Outcome):
                        turn.span.end(failed=isinstance(found.result, Failure))
                        yield found
                        continue
                    if found is not None:
                        running[found] = turn
                        continue
                    turn.span.end(failed=True)
                    if lost[turn.place] + 1 < _MACHINES:
                        lost[turn.place] += 1
                        waiting.again(turn.place, turn.client)
                    elif turn.unclear:
                        yield Outcome(turn.place, _failure(turn.unclear))
                for reference, failure in self._silent(running) if isinf(deadline) else ():
                    yield self._given_up(running.pop(reference), failure)
                if self._unmet.look([turn.lease for turn in running.values()]):
                    yield from self._never_begun(running, waiting)
                in_time = self._make_room([turn.lease for turn in running.values()])
                if self._needs is not None and not waiting and in_time:
                    self._leases.make_ahead([need for need in self._needs if self._unmet.can_be_met(need)])
                    self._leases.let_go(self._needs)
            known = _asked(running)
            while running:
                reference, turn = running.popitem()
                why = _why(turn, known.get(reference))
                if reference in known:
                    why += "; `rounds.deadline: auto` waits as long as a client works"
                yield self._given_up(turn, Failure.late(deadline, why))
            for place in waiting.places():
                yield Outcome(place, Failure.late(deadline, "other clients used every process"))
        finally:
            # If the caller stopped iterating in the middle of a round, turns are still running.
            for turn in running.values():
                self._given_up(turn, Failure("nobody waits for it any more"))
            self._note("; ".join(self._unmet.in_words()) or None)

    def expect(self, foresee: Foresee) -> None:
        """Ask Ray for the processes of the next round before it begins, and end those that the job does not need any more.

        Machines come and go with them. A cluster of one machine has nothing to gain: its processes stay for the next round.
        """
        if not is_one_machine():
            self._needs = foresee()
            self._leases.let_go(self._needs)

    def close(self) -> None:
        """End every idle actor."""
        self._leases.end_idle()

    def _outcome(self, reference: Any, turn: _Turn, sent: SentOrder) -> Outcome | Any | None:
        """What became of a turn that has ended: its outcome, or None if its machine is gone, or its process never began.

        As long as it is not known whether that is so, it is a reference to a question to its process. If the turn itself
        raised an error, its process lives on.
        """
        try:
            result = ray.get(reference, timeout=_FETCH_SECONDS)
        except RayTaskError as error:
            self._leases.give_back(turn.lease, turn.client)
            if isinstance(error.cause, ObjectLostError):
                sent.lost()
            return Outcome(turn.place, Failure.of(error.cause))
        except RayError as error:
            return self._without_answer(turn, error)
        if turn.unclear:  # it lives, but Ray has lost its answer
            return self._given_up(turn, _failure(turn.unclear))
        self._leases.give_back(turn.lease, turn.client)
        known = isinstance(
            result, Profile | Update | HeadSums | Metrics | HeadLosses
        )  # a failure is ours to say, not a client's
        return Outcome(turn.place, result if known else Failure(f"it answered with a {type(result).__name__}"))

    def _without_answer(self, turn: _Turn, error: RayError) -> Outcome | Any | None:
        """See ``_outcome``; of a turn for which Ray raised ``error``."""
        if not turn.lease.kept:
            return self._given_up(turn, _failure(error))
        turn.unclear, turn.since = turn.unclear or error, turn.since or monotonic()
        if isinstance(error, ActorUnavailableError) and monotonic() - turn.since < _UNCLEAR_SECONDS:
            return turn.lease.ask()
        node = turn.lease.node
        if node is not None and not is_gone(node):
            return self._given_up(turn, _failure(error))
        self._leases.end(turn.lease)
        if node is not None:
            self._leases.lose(node)
        return None

    def _never_begun(self, running: dict[Any, _Turn], waiting: Waiting) -> Iterator[Outcome]:
        """Give up the turns that wait for a machine that there will never be."""
        for reference, turn in list(running.items()):
            if not turn.lease.is_placed() and (failure := self._unmet.failure(turn.client)):
                yield self._given_up(running.pop(reference), failure)
        for client in waiting.first_of_each():
            if failure := self._unmet.failure(client):
                yield from (Outcome(place, failure) for place, _ in waiting.take(client.client_class))

    def _given_up(self, turn: _Turn, failure: Failure) -> Outcome:
        self._leases.end(turn.lease)
        turn.span.end(failed=True)
        return Outcome(turn.place, failure)

    def _silent(self, running: dict[Any, _Turn]) -> list[tuple[Any, Failure]]:
        """The turns that did nothing for too long, each with its failure.

        An actor without a machine may wait as long as there may be room later: when other turns end, of this job or of others
        on a machine that is large enough, or when the machine comes that is being added. One that has a machine gets ready in
        as long as any may be silent, or never; unless it waits for room again, since that machine was lost.
        """
        now = monotonic()
        quiet = {reference: turn for reference, turn in running.items() if now - turn.heard >= self._silence}
        known, lost = _asked(quiet), []
        others_run = any(turn.lease.placed for turn in running.values())
        # Ray's head is asked once for all turns of one class. What stands for a site, which is not kept, waits for no room.
        has_room, given_room = cache(may_have_room), cache(has_been_given_room)
        for reference, turn in quiet.items():
            answer, waits = known.get(reference), not turn.lease.placed and not turn.starting
            if answer and answer.worked < turn.worked:  # another process at the site has begun it anew
                turn.worked = 0.0
            if answer and answer.worked - turn.worked >= _LEAST_WORK * self._silence:
                turn.heard, turn.worked = now, answer.worked
            elif not turn.lease.placed and turn.lease.has_machine(given_room) != turn.starting:
                turn.heard, turn.starting = now, waits
            elif waits and (others_run or (turn.lease.kept and has_room(turn.lease.memory))):
                turn.heard = now
            else:
                why = _why(turn, answer)
                lost.append((reference, Failure(f"nothing happened for {self._silence:g} s: {why}")))
        return lost

    def _make_room(self, running: Collection[Lease]) -> bool:
        """Report waiting actors. If one has waited too long, end all idle actors: they may hold the memory that it needs.

        True if no actor has waited for long.
        """
        now, waiting = monotonic(), [lease for lease in running if not lease.is_placed()]
        processes = [lease for lease in waiting if lease.kept]
        late = [lease for lease in processes if now - lease.made_at > _PATIENCE_SECONDS]
        words = _in_words(len(running), len(processes), max((lease.memory for lease in late), default=None))
        for_sites = sorted({lease.why_waiting() for lease in waiting if not lease.kept})
        told = [*([words] if words else []), *self._unmet.in_words(), *for_sites]
        self._note(some_of(told, "; ") if told else None)
        longest = max((now - lease.made_at for lease in late), default=0.0)
        if late and (longest > _GROWING_SECONDS or not is_growing()):
            self._leases.end_idle()
        return not late


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


def _why(turn: _Turn, answer: Progress | None) -> str:
    """Why a turn is not done, from its process's ``answer``: how far it is."""
    if not turn.lease.placed:
        return "its process has a machine, and does not get ready there" if turn.starting else turn.lease.why_waiting()
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
