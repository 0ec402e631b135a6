"""What a job leaves on record: an ``JobStarted``, a ``Round`` for each round, and an ``JobFinished``.

They are what the commit log keeps, what the service reports and what the command line prints. All JSON.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator

from chainfed_ray.budget.planner import WeightPlacement
from chainfed_ray.record import Document, Record


def finite(value: float | None) -> float | None:
    """The number, or None if it is infinite or none at all: JSON has no word for it, and it is better than nothing never."""
    return value if value is not None and math.isfinite(value) else None


Measured = Annotated[float | None, BeforeValidator(finite)]
"""What a model comes to, which may be anything: a number that is not finite is kept as None."""


class AdmittedClient(Record):
    """A client that takes part, and the plan of its turns."""

    client: str
    client_class: str
    examples: int
    budget_bytes: int
    planned_bytes: int
    disk_bytes: int
    window: int
    micro_batch: int
    weights: WeightPlacement
    activations_offloaded: bool
    cached: bool


class ExcludedClient(Record):
    """A client that cannot take part."""

    client: str
    client_class: str
    budget_bytes: int
    shortfall_bytes: int
    reason: str


class FailedTurn(Record):
    """A client's turn that did not count, and why; ``over_budget`` if it took more memory than it may.

    In a round that is its last turn: it had a second one. ``exceeded`` says how its first plan failed, if there was a second.
    """

    client: str
    client_class: str
    reason: str
    over_budget: bool = False
    exceeded: str | None = None


class HeadFit(Record):
    """A head in closed form, before a stage's first round or to find the chain's start: whose sums it is made of, and what
    they took.

    ``held_out_loss`` and ``accuracy`` are those of the chain cut at the window's top, with that head, before the window is
    trained. Both are None if nobody sent sums.
    """

    clients: int
    examples: int
    cpu_seconds: float
    sent_bytes: int
    failed_turns: tuple[FailedTurn, ...]
    held_out_loss: Measured = None
    accuracy: float | None = None


def complete_fits(fits: Sequence[HeadFit]) -> list[bool]:
    """Which of some heads have as many examples as any: one without some of the clients may be without their classes."""
    most = max(fit.examples for fit in fits)
    return [fit.examples == most for fit in fits]


class JobStarted(Document):
    """Before the first round: who takes part, and where the chain starts; ``lost`` are turns of looking for that.

    ``cka`` are those of each layer (CKA), where the start follows from them; ``exits`` are heads at the top of each
    window, from the lowest up, where it follows from those. ``profile_cpu_seconds`` are what the clients spent on either.

    ``window`` is Q: the widest that the job allows and a client's budget holds. ``partition_hash`` is that of the manifest.
    ``evaluator`` is the engine that judges the whole model, and why it is another than the job's, if it is.
    """

    admitted: tuple[AdmittedClient, ...]
    excluded: tuple[ExcludedClient, ...]
    layers: int
    start_layer: int
    window: int
    cka: tuple[float, ...]
    exits: tuple[HeadFit, ...] = ()
    failed_turns: tuple[FailedTurn, ...]
    stages: int
    total_rounds: int
    partition_hash: str
    profile_cpu_seconds: float = 0.0
    evaluator: str = "torch"


class Turn(Record):
    """A client's part in a round that counted: the plan of its turn, and what was measured.

    ``steps`` are optimizer steps, ``cpu_seconds`` those of its process's CPU, the advance of its prefix cache included;
    ``bottom`` is the lowest layer whose adapter it trained. ``exceeded`` says how its first plan failed, if this was its
    second.
    """

    client: str
    client_class: str
    examples: int
    loss: float
    steps: int
    seconds: float
    cpu_seconds: float
    bottom: int
    micro_batch: int
    weights: WeightPlacement
    activations_offloaded: bool
    budget_bytes: int
    planned_bytes: int
    peak_bytes: int | None
    sent_bytes: int
    exceeded: str | None = None


class Evaluation(Record):
    """The whole model on held-out rows, judged by ``engine``; or the ``failure`` for which it could not be.

    ``loss`` is in nats: the mean over examples for a classifier, over tokens to be predicted for a language model, whose
    ``accuracy`` is that of tokens. ``forward_seconds`` of its ``seconds`` went into forward passes. Bytes are those of the
    evaluator's largest process: ``planned_bytes`` and ``peak_bytes`` above itself when idle, ``process_bytes`` with all that
    it is. ``processes`` are as many, each as large at most. A ``failure`` beside a loss is another engine's, in whose place
    this one judged.
    """

    engine: str
    loss: Measured = None
    accuracy: float | None = None
    macro_f1: float | None = None
    perplexity: Measured = None
    choice_accuracy: float | None = None
    seconds: float = 0.0
    forward_seconds: float = 0.0
    processes: int = 1
    planned_bytes: int | None = None
    peak_bytes: int | None = None
    process_bytes: int | None = None
    failure: str | None = None


class EarlyExit(Record):
    """What it took to judge the chain cut at the window's top: bytes above the coordinator's process when idle."""

    seconds: float
    planned_bytes: int
    peak_bytes: int | None


class Best(Record):
    """The round after which the whole model was at its best on held-out rows, and ``why`` that one."""

    round: int
    stage: int
    loss: float
    accuracy: float | None
    why: str


class Restored(Record):
    """The stack that a stage went back to as it ended: that after ``round``, or, None, the one that it began with.

    ``loss`` and ``accuracy`` are those of its early exit.
    """

    round: int | None
    loss: float
    accuracy: float


class Round(Document):
    """One federated round. ``held_out_loss`` and ``accuracy`` are those of the chain cut at the window's top: an early exit.

    ``early_exit`` is what that took. ``evaluation`` is that of the whole model. Either is None where it was not due. ``ended``
    says why its stage ended with it, if it did, and ``restored`` which stack it went back to then, if to another than the
    last; ``head_fit`` how it began, if in that way. ``epsilon`` is ε of the rounds so far, at the job's δ; None without
    privacy, with which each round is ``counted``.
    """

    index: int
    stage: int
    bottom: int
    top: int
    turns: tuple[Turn, ...]
    failed_turns: tuple[FailedTurn, ...]
    counted: bool
    train_loss: float | None
    held_out_loss: Measured
    accuracy: float | None
    movement: float | None
    ended: str | None
    seconds: float
    restored: Restored | None = None
    head_fit: HeadFit | None = None
    early_exit: EarlyExit | None = None
    evaluation: Evaluation | None = None
    epsilon: float | None = None

    @property
    def kept_loss(self) -> float | None:
        """The held-out loss of the stack that is handed on: what the stage went back to, if it did."""
        return self.restored.loss if self.restored else self.held_out_loss

    @property
    def kept_accuracy(self) -> float | None:
        """The accuracy of that stack's early exit."""
        return self.restored.accuracy if self.restored else self.accuracy


class JobFinished(Document):
    """After the last round: what the whole model is worth on the test rows, with the stack that is ``served``.

    ``loss`` is None where it is no finite number. ``best`` is the round whose stack is the best one, if the whole model was
    ever judged. ``epsilon`` is ε of all rounds, at the job's δ; None without privacy. ``stopped`` says which limit of the job
    ended it early, if one did.
    """

    status: Literal["succeeded"] = "succeeded"
    accuracy: float
    loss: Measured
    rounds: int
    peak_bytes: dict[str, int]
    served: Literal["last", "best"] = "last"
    best: Best | None = None
    evaluation: Evaluation | None = None
    epsilon: float | None = None
    stopped: str | None = None


class StageResult(Record):
    """A stage that ended, and why. ``accuracy`` is that of the chain cut at its top, ``evaluation`` the whole model's.

    Both are those of the stack that it went back to, if it was ``restored``.
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
    """A class of clients in a stage: bytes that a client may use, and the most that one was planned to take, and took.

    ``turns`` counted; ``exceeded`` of them were taken again with a leaner plan.
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
        """Every class that had a turn, stage by stage, the smallest budget first."""
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
    """What a finished job comes to. What follows its ``partition_hash`` is that of its ``JobFinished``."""

    job: str
    status: Literal["succeeded"] = "succeeded"
    accuracy: float
    loss: Measured
    rounds: int
    start_layer: int
    layers: int
    classes: tuple[str, ...]
    stages: tuple[StageResult, ...]
    excluded: tuple[ExcludedClient, ...]
    peak_bytes: dict[str, int]
    memory: tuple[StageMemory, ...]
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
        classes: tuple[str, ...],
        job_started: JobStarted,
        rounds: Sequence[Round],
        job_finished: JobFinished,
    ) -> "JobResult":
        """The result of the job called ``job``, whose head tells ``classes`` apart."""
        return cls(
            job=job,
            accuracy=job_finished.accuracy,
            loss=job_finished.loss,
            rounds=job_finished.rounds,
            start_layer=job_started.start_layer,
            layers=job_started.layers,
            classes=classes,
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
            excluded=job_started.excluded,
            peak_bytes=job_finished.peak_bytes,
            memory=StageMemory.of(rounds),
            partition_hash=job_started.partition_hash,
            served=job_finished.served,
            best=job_finished.best,
            evaluation=job_finished.evaluation,
            epsilon=job_finished.epsilon,
            stopped=job_finished.stopped,
        )
