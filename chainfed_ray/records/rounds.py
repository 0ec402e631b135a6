"""The records of a job: a ``JobStarted``, a ``Round`` for each round, and a ``JobFinished``.

The commit log keeps them, the service reports them and the command line prints them. All are JSON documents.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from chainfed_ray.record import Document, Record
from chainfed_ray.records.fleet import AdmittedClients, ExcludedClients, LateSite, Weights


def finite(value: float | None) -> float | None:
    """The value, or None if it is not finite: JSON cannot hold NaN, and such a loss must never win."""
    return value if value is not None and math.isfinite(value) else None


Measured = Annotated[float | None, BeforeValidator(finite)]
"""A measured value of a model, such as a loss. A value that is not finite is recorded as None."""


class FailedTurn(Record):
    """A client's turn that failed, and why. ``over_budget`` is True if the turn took more memory than it was allowed.

    In a round, a client that exceeds its plan gets a second turn with a fallback plan. The record is then of the second turn,
    and ``exceeded`` says how the first one failed. A client whose record of a round is ``over_budget`` has no more turns.
    ``awaited`` is True for the place that a private job keeps for a site which has not come.
    """

    client: str
    client_class: str
    reason: str
    over_budget: bool = False
    exceeded: str | None = None
    awaited: bool = False


class HeadFit(Record):
    """A head that was fitted in closed form, before a stage's first round or to find the chain's start.

    ``clients`` sent sums over ``examples``. ``held_out_loss`` and ``accuracy`` are of the early exit with
    this head, before the window is trained. Both are None if no client sent sums.
    """

    clients: int
    examples: int
    cpu_seconds: float
    sent_bytes: int
    failed_turns: tuple[FailedTurn, ...]
    held_out_loss: Measured = None
    accuracy: float | None = None


def complete_fits(fits: Sequence[HeadFit]) -> list[bool]:
    """For each head: True if no other was fitted to more examples. One with fewer lacks clients, and perhaps their classes."""
    most = max(fit.examples for fit in fits)
    return [fit.examples == most for fit in fits]


class JobStarted(Document):
    """The record before the first round: how many clients take part, with which plans, and where the chain starts.

    The clients themselves are in a file of their own (``CommitLog.clients``). ``clients_hash`` is the ``names_hash`` of those
    that take part.

    The search for the chain's start leaves ``cka``, the CKA of each layer (``chain.start: auto``), or ``exits``, a fitted head
    at the top of each window from the lowest up (``best-exit``). The clients spent ``profile_cpu_seconds`` on the search;
    ``failed_turns`` are of the search as well.

    ``window`` is Q, the widest window that the job allows and some client's budget holds. ``partition_hash`` is the manifest's.
    ``evaluator`` names the engine that evaluates the whole model and, if it is not the job's, the reason.
    """

    classes: tuple[str, ...] = ()
    admitted: tuple[AdmittedClients, ...]
    excluded: tuple[ExcludedClients, ...]
    clients_hash: str
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
    own_rules: dict[str, str] = Field(default_factory=dict)

    @property
    def taking_part(self) -> int:
        """The number of clients that take part."""
        return sum(group.clients for group in self.admitted)

    @property
    def left_out(self) -> int:
        """The number of clients that cannot take part."""
        return sum(group.clients for group in self.excluded)

    def with_late(self, late: Iterable[LateSite]) -> "JobStarted":
        """The same record, with clients as if the sites that came ``late`` had been there from the beginning."""
        late = tuple(late)
        came = {site.client_class for site in late}
        admitted = (*self.admitted, *(group for site in late for group in site.admitted))
        left = tuple(group for group in self.excluded if group.client_class not in came)
        excluded = (*left, *(group for site in late for group in site.excluded))
        return self.model_copy(update={"admitted": admitted, "excluded": excluded})


class Turn(Record):
    """A client's successful turn in a round: its plan, and what was measured.

    ``steps`` counts optimizer steps. ``cpu_seconds`` is the CPU time of the client's process, the advance of the prefix cache
    included. ``bottom`` is the lowest layer whose adapter the client trained, and ``rank`` the number of each LoRA's ranks that
    it trained; None means all. ``exceeded`` says how the first plan failed, if this is the turn with the fallback plan.
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
    weights: Weights
    activations_offloaded: bool
    budget_bytes: int
    planned_bytes: int
    peak_bytes: int | None
    sent_bytes: int
    activations_recomputed: bool = False
    rank: int | None = None
    exceeded: str | None = None


class ClientScore(Record):
    """The scores of a client at a site on the ``examples`` that it holds out; None where it has none."""

    client: str
    examples: int
    loss: Measured = None
    accuracy: Measured = None


class Evaluation(Record):
    """An evaluation of the whole model on held-out rows by ``engine``, or the ``failure`` that prevented it.

    ``loss`` (in nats) and ``accuracy`` are means over examples for a classifier, and over predicted tokens for a language
    model. ``forward_seconds`` is the part of ``seconds`` spent in forward passes. Bytes are of the largest of the evaluator's
    ``processes``: ``planned_bytes`` and ``peak_bytes`` above its idle state, ``process_bytes`` in all. A ``failure`` beside a
    loss is that of the job's own engine, which ``engine`` replaced. ``clients`` are those at sites, if these evaluate.
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
    clients: tuple[ClientScore, ...] = ()


class EarlyExit(Record):
    """The cost of evaluating an early exit. Bytes count above the coordinator's idle process."""

    seconds: float
    planned_bytes: int
    peak_bytes: int | None


class Best(Record):
    """The round after which the whole model had its least held-out loss, and ``why`` it was chosen."""

    round: int
    stage: int
    loss: float
    accuracy: float | None
    why: str


class Restored(Record):
    """The stack that a stage went back to at its end: the stack after ``round``, or the stage's first one if that is None.

    ``loss`` and ``accuracy`` are of the stack's early exit.
    """

    round: int | None
    loss: float
    accuracy: float


class Round(Document):
    """One federated round.

    ``held_out_loss`` and ``accuracy`` are of the early exit at the window's top or, with an exact look-ahead, at the model's
    end; ``early_exit`` is the cost of evaluating it.
    ``evaluation`` is of the whole model. Both are None if they were not due. If the stage ended with this round, ``ended`` says
    why, and ``restored`` which earlier stack it went back to. ``head_fit`` is the head fitted as the stage began, in its first
    round. ``exit`` is the layer of the early exit; None in records of earlier versions. ``counted`` says whether the round met
    the quorum; with DP every round counts, since skipping one would reveal who was sampled.
    ``epsilon`` is ε of all rounds so far at the job's δ, None without privacy. Changes were summed as whole
    multiples of 2^-``fraction_bits``; None if the rule keeps updates. ``late`` are sites that came after the job had begun, and
    whose clients take part from this round on.
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
    exit: int | None = None
    early_exit: EarlyExit | None = None
    evaluation: Evaluation | None = None
    epsilon: float | None = None
    fraction_bits: int | None = None
    late: tuple[LateSite, ...] = ()

    @property
    def kept_loss(self) -> float | None:
        """The held-out loss of the stack that the next round starts from, which may be a restored one."""
        return self.restored.loss if self.restored else self.held_out_loss

    @property
    def kept_accuracy(self) -> float | None:
        """The accuracy of the same stack's early exit."""
        return self.restored.accuracy if self.restored else self.accuracy


class JobFinished(Document):
    """The record after the last round: the scores of the whole model on the test rows, with the stack that is ``served``.

    ``loss`` is None if it is not finite. ``best`` is the round with the best stack, None if no evaluation gave a finite loss.
    ``epsilon`` is ε of all rounds at the job's δ, None without privacy. ``stopped`` says which limit of the job ended it early.
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
