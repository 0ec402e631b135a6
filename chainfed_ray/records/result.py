"""What a job came to, from its records: its stages, the memory of its clients, the early exits that are kept, its scores."""

from collections.abc import Iterable, Sequence
from typing import Literal

from chainfed_ray.record import Document, Record
from chainfed_ray.records.fleet import ExcludedClients
from chainfed_ray.records.rounds import Best, Evaluation, JobFinished, JobStarted, Measured, Restored, Round, Turn


class ExitScore(Record):
    """An early exit that is kept: the model of the lowest ``layers`` layers, with the adapters and the head after ``round``.

    ``loss`` and ``accuracy`` are those that the job measured on its validation rows.
    """

    layers: int
    round: int
    loss: float
    accuracy: float

    @classmethod
    def after(cls, record: Round, layers: int) -> "ExitScore | None":
        """The exit of a model of ``layers`` layers that is kept after a round.

        None if it was not evaluated, or if nothing is cut: the exit is the model's end.
        """
        loss, accuracy = record.kept_loss, record.kept_accuracy
        if record.exit is None or record.exit == layers - 1 or loss is None or accuracy is None:
            return None
        return cls(layers=record.exit + 1, round=record.index, loss=loss, accuracy=accuracy)

    @classmethod
    def of(cls, rounds: Iterable[Round], layers: int) -> "tuple[ExitScore, ...]":
        """The exits that are kept after all ``rounds``, the lowest first: of each layer the newest."""
        found = (cls.after(record, layers) for record in rounds)
        newest = {score.layers: score for score in found if score}
        return tuple(newest[count] for count in sorted(newest))


class StageResult(Record):
    """A stage that ended, and why. ``accuracy`` is of its early exit, ``evaluation`` of the whole model.

    Both are of the ``restored`` stack, if the stage went back to one.
    """

    stage: int
    bottom: int
    top: int
    rounds: int
    accuracy: float | None
    ended: str
    restored: Restored | None = None
    evaluation: Evaluation | None = None


class StageMemory(Record):
    """The memory of a class of clients in a stage: a client's budget, the highest plan and the highest measured peak.

    ``turns`` is the number of successful turns. ``exceeded`` of them were second turns, with a fallback plan.
    """

    stage: int
    bottom: int
    top: int
    client_class: str
    budget_bytes: int
    planned_bytes: int
    peak_bytes: int | None
    turns: int
    exceeded: int

    @classmethod
    def of(cls, rounds: Iterable[Round]) -> "tuple[StageMemory, ...]":
        """Every class that had a successful turn, stage by stage, the smallest budget first."""
        found: dict[tuple[int, int, str], StageMemory] = {}
        for record in rounds:
            for turn in record.turns:
                key = (record.stage, turn.budget_bytes, turn.client_class)
                alone = cls._of_turn(record, turn)
                found[key] = found[key]._with(alone) if key in found else alone
        return tuple(found[key] for key in sorted(found))

    @classmethod
    def _of_turn(cls, record: Round, turn: Turn) -> "StageMemory":
        return cls(
            stage=record.stage,
            bottom=record.bottom,
            top=record.top,
            client_class=turn.client_class,
            budget_bytes=turn.budget_bytes,
            planned_bytes=turn.planned_bytes,
            peak_bytes=turn.peak_bytes,
            turns=1,
            exceeded=int(turn.exceeded is not None),
        )

    def _with(self, other: "StageMemory") -> "StageMemory":
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        merged = {
            "planned_bytes": max(self.planned_bytes, other.planned_bytes),
            "peak_bytes": max(peaks, default=None),
            "turns": self.turns + other.turns,
            "exceeded": self.exceeded + other.exceeded,
        }
        return self.model_copy(update=merged)


class JobResult(Document):
    """The result of a finished job. The fields after ``partition_hash`` are those of its ``JobFinished``."""

    job: str
    status: Literal["succeeded"] = "succeeded"
    accuracy: float
    loss: Measured
    rounds: int
    start_layer: int
    layers: int
    classes: tuple[str, ...]
    stages: tuple[StageResult, ...]
    excluded: tuple[ExcludedClients, ...]
    peak_bytes: dict[str, int]
    memory: tuple[StageMemory, ...]
    exits: tuple[ExitScore, ...] = ()
    partition_hash: str
    served: Literal["last", "best"] = "last"
    best: Best | None = None
    evaluation: Evaluation | None = None
    epsilon: float | None = None
    stopped: str | None = None

    @classmethod
    def of(
        cls,
        job: str,
        job_started: JobStarted,
        rounds: Sequence[Round],
        job_finished: JobFinished,
    ) -> "JobResult":
        """The result of the job called ``job``."""
        fleet = job_started.with_late(site for record in rounds for site in record.late)
        return cls(
            job=job,
            accuracy=job_finished.accuracy,
            loss=job_finished.loss,
            rounds=job_finished.rounds,
            start_layer=job_started.start_layer,
            layers=job_started.layers,
            classes=job_started.classes,
            stages=tuple(
                StageResult(
                    stage=last.stage,
                    bottom=last.bottom,
                    top=last.top,
                    rounds=sum(record.stage == last.stage for record in rounds),
                    accuracy=last.kept_accuracy,
                    ended=last.ended,
                    restored=last.restored,
                    evaluation=last.evaluation,
                )
                for last in rounds
                if last.ended
            ),
            excluded=fleet.excluded,
            peak_bytes=job_finished.peak_bytes,
            memory=StageMemory.of(rounds),
            exits=ExitScore.of(rounds, job_started.layers),
            partition_hash=job_started.partition_hash,
            served=job_finished.served,
            best=job_finished.best,
            evaluation=job_finished.evaluation,
            epsilon=job_finished.epsilon,
            stopped=job_finished.stopped,
        )
