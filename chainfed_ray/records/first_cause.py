"""What first went wrong in a job that failed: an error says what was given up in the end, and this says what began it."""

from collections.abc import Sequence
from itertools import takewhile

from chainfed_ray.errors import QuorumLost
from chainfed_ray.record import Record
from chainfed_ray.records.rounds import JobStarted, Round


class FirstCause(Record):
    """The first thing that went wrong: in the turn of a ``client``, if it was one; ``stage`` and ``round`` count from 1.

    ``round`` is None before the first round and after the last; ``stage`` is None as well, and between two stages.
    """

    client: str | None = None
    stage: int | None = None
    round: int | None = None
    message: str


def first_cause(error: BaseException, started: JobStarted | None, rounds: Sequence[Round]) -> FirstCause:
    """The cause of the ``error`` that ended a job after these committed ``rounds``. ``started`` is None if it never began.

    A lost quorum began with the first turn that failed, in the first of the newest rounds that all had too few updates. Any
    other error began with what Python says caused it.
    """
    if isinstance(error, QuorumLost):
        fruitless = list(takewhile(lambda record: len(record.turns) < error.quorum, reversed(rounds)))
        for record in reversed(fruitless):
            for turn in record.failed_turns[:1]:
                return FirstCause(
                    client=turn.client, stage=record.stage + 1, round=record.index + 1, message=turn.reason
                )
        for client, reason in error.reasons.items():
            return FirstCause(client=client, message=reason)
    root = error
    while behind := root.__cause__ or (None if root.__suppress_context__ else root.__context__):
        root = behind
    message = str(root) or type(root).__name__
    if started is None or len(rounds) >= started.total_rounds:
        return FirstCause(message=message)
    last = rounds[-1] if rounds else None
    stage = None if last and last.ended else (last.stage if last else 0) + 1
    return FirstCause(stage=stage, round=len(rounds) + 1, message=message)
