"""Which stack is kept: of a job the one whose whole model is the best, of a stage the one at its best early exit.

All of it follows from the committed rounds. The best has the least held-out loss, and of equals it is the newest.
"""

from collections.abc import Iterable, Sequence

from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.rounds import Best, Restored, Round


def best_round(rounds: Sequence[Round]) -> Round | None:
    """The round after which the whole model had the least held-out loss; of equals the newest.

    None if no evaluation of the whole model gave a finite loss.
    """
    evaluated = [record for record in rounds if record.evaluation and record.evaluation.loss is not None]
    return min(reversed(evaluated), key=_loss, default=None)


def best_of(rounds: Sequence[Round]) -> Best | None:
    """The round whose stack is the best, with its scores and the reason in words; None if there is none."""
    record = best_round(rounds)
    if record is None or record.evaluation is None:
        return None
    last = next((other for other in reversed(rounds) if other.evaluation and other.evaluation.loss is not None), record)
    why = f"the whole model had the least held-out loss, {_loss(record):.4f}"
    if last.index != record.index:
        why += f"; after round {last.index + 1}, the last one evaluated, it had {_loss(last):.4f}"
    return Best(
        round=record.index, stage=record.stage, loss=_loss(record), accuracy=record.evaluation.accuracy, why=why
    )


def exits(rounds: Iterable[Round], begun_with: Restored | None = None) -> list[Restored]:
    """The early exits of one stage that were evaluated in its ``rounds``, in order. The stage may end with any of them.

    The first exit is the stack that the stage began with, and its ``round`` is None, if the stage's head was fitted or the exit
    with which the stage has ``begun_with`` is given. Exits without a finite loss are not in the list.
    """
    evaluated = list[tuple[int | None, float | None, float | None]]()
    if begun_with:
        evaluated.append((None, begun_with.loss, begun_with.accuracy))
    for record in rounds:
        if fit := record.head_fit:
            evaluated.append((None, fit.held_out_loss, fit.accuracy))
        evaluated.append((record.index, record.held_out_loss, record.accuracy))
    return [
        Restored(round=index, loss=loss, accuracy=accuracy)
        for index, loss, accuracy in evaluated
        if loss is not None and accuracy is not None
    ]


def kept_exit(record: Round) -> Restored | None:
    """The exit whose stack a stage has after its last round ``record``; None if it was not evaluated."""
    if record.restored or record.held_out_loss is None or record.accuracy is None:
        return record.restored
    return Restored(round=record.index, loss=record.held_out_loss, accuracy=record.accuracy)


def best_exit(evaluated: Sequence[Restored]) -> Restored | None:
    """The exit with the least held-out loss, of equals the newest; None if there is no exit."""
    return min(reversed(evaluated), key=lambda one: one.loss, default=None)


def best_tensors(best: Tensors, index: int, evaluated: Sequence[Restored], after: Tensors) -> Tensors:
    """The trained tensors at a stage's best early exit: the ``best`` before the round ``index``, or those ``after`` it."""
    found = best_exit(evaluated)
    if found is None:
        return {}
    return after if found.round == index else best


def stack_to_restore(evaluated: Sequence[Restored]) -> Restored | None:
    """The exit whose stack a stage restores when it ends; None if its newest exit is its best."""
    best = best_exit(evaluated)
    return None if best is None or best is evaluated[-1] else best


def _loss(record: Round) -> float:
    assert record.evaluation is not None
    assert record.evaluation.loss is not None
    return record.evaluation.loss
