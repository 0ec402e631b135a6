"""What a job's rounds have come to: remembered, so that a request for one of its stacks reads no round that was read before."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import EventRow
from chainfed_ray.records.result import ExitScore
from chainfed_ray.records.rounds import Round

_MOST_JOBS = 1000  # that are remembered
_TURNS = {"turns": (), "failed_turns": ()}  # what makes a round's record long, and is of no use here


@dataclass(frozen=True)
class Stack:
    """The stack after the round with this ``index``, with the ``evaluation`` of the whole model, if there was one."""

    index: int
    evaluation: Mapping[str, Any] | None

    @property
    def loss(self) -> float | None:
        """The held-out loss of the whole model."""
        found = (self.evaluation or {}).get("loss")
        return None if found is None else float(found)


@dataclass(frozen=True)
class RoundsSoFar:
    """The ``newest`` round of a job, and the ``best``: the one with the least held-out loss, of equals the newest.

    If none was evaluated, the best is the newest. ``exits`` are the early exits that the job has kept, the lowest first.
    ``seq`` is the number of the event of the newest round.
    """

    seq: int
    newest: Stack
    best: Stack
    classes: tuple[str, ...] = ()
    layers: int | None = None
    kept: Mapping[int, ExitScore] = field(default_factory=dict)

    @property
    def exits(self) -> list[ExitScore]:
        """See the class."""
        return [self.kept[count] for count in sorted(self.kept)]

    def after(self, seq: int, data: Mapping[str, Any]) -> "RoundsSoFar":
        """The same with one more round, whose record is ``data``."""
        newest = Stack(data["index"], data.get("evaluation"))
        least, loss = self.best.loss, newest.loss
        is_best = least is None or (loss is not None and loss <= least)
        kept = self.kept
        if self.layers is not None and data.get("exit") is not None:  # others are of a version without such names
            score = ExitScore.after(Round.model_validate({**data, **_TURNS}), self.layers)
            kept = {**kept, score.layers: score} if score else kept
        return replace(self, seq=seq, newest=newest, best=newest if is_best else self.best, kept=kept)


class Rounds:
    """The rounds of jobs, in the database behind ``engine``; safe to use from several threads.

    Events only come, and never change: so what a job's rounds had come to stays true, and only later ones are read.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._lock = engine, Lock()
        self._known = OrderedDict[str, RoundsSoFar]()

    def of(self, job: str) -> RoundsSoFar | None:
        """What a job's rounds have come to by now; None if none has counted, so that there is no stack."""
        with self._lock:
            known = self._known.get(job)
        of_job = EventRow.job == job, EventRow.kind.in_(("started", "round"))
        last = select(EventRow.seq).where(EventRow.job == job, EventRow.kind == "round")
        with Session(self._engine) as session:
            newest = session.scalar(last.order_by(EventRow.seq.desc()).limit(1))
            if newest is None or (known and known.seq == newest):
                return known
            later = select(EventRow).where(*of_job, EventRow.seq > (known.seq if known else 0))
            found = _with(known, session.scalars(later.order_by(EventRow.seq)))
        if found:
            with self._lock:
                self._known[job] = found
                self._known.move_to_end(job)
                while len(self._known) > _MOST_JOBS:
                    self._known.popitem(last=False)
        return found


def _with(known: RoundsSoFar | None, events: Iterable[EventRow]) -> RoundsSoFar | None:
    """What is known, and what the later ``events`` add: the job's start, and rounds."""
    classes: tuple[str, ...] = ()
    layers: int | None = None
    for event in events:
        if event.kind == "started":
            classes, layers = tuple(event.data.get("classes", ())), event.data.get("layers")
            continue
        if known is None:
            if not event.data.get("counted", True):
                continue  # nothing was trained by then
            first = Stack(event.data["index"], event.data.get("evaluation"))
            known = RoundsSoFar(event.seq, first, first, classes, layers)
        known = known.after(event.seq, event.data)
    return known
