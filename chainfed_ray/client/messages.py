"""The messages between server and clients: the orders that a client is given, and the results that it sends back."""

from dataclasses import dataclass
from typing import Literal

from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.objective import GlobalTrains, Objective
from chainfed_ray.client.privacy import ClientPrivacy
from chainfed_ray.client.survey import SiteRows
from chainfed_ray.data.tokens import ExampleCounts, Examples
from chainfed_ray.model.adapters import Tensors


@dataclass(frozen=True)
class Client:
    """A data owner: its examples, the memory that it declared, and the plan of its next turn.

    A turn that would hold more than ``cap_bytes`` is stopped. The cap is what the plan needs or, after a plan that was too
    small, all that the client declared. ``privacy`` is what it does with its update before it is sent, in a job with privacy.
    ``speed`` is the speed of its machine, at most 1: at 0.5 a turn takes twice as long as it does here. ``remote`` says where
    the rows of a client at a site are; on the server it has no ``examples``.
    """

    name: str
    client_class: str
    examples: Examples
    budget_bytes: int
    plan: TurnPlan
    cap_bytes: int
    privacy: ClientPrivacy | None = None
    speed: float = 1.0
    remote: SiteRows | None = None

    @property
    def counts(self) -> ExampleCounts:
        """How many examples the client has, and how long they are."""
        return self.remote.counts if self.remote else self.examples.counts


@dataclass(frozen=True)
class Profiling:
    """The order to profile the layers on at most ``examples`` examples.

    With ``guess``, all examples of the client pass through the layers, since a head is fitted to them next (first_pass.py).
    """

    examples: int
    seed: int
    guess: StartGuess | None = None


@dataclass(frozen=True)
class Training:
    """The order to train the stack ``tensors``, with the learning rates of this round.

    A client makes ``steps`` optimizer steps if they are given, and otherwise ``epochs`` passes over its examples. ``proximal``
    is μ of FedProx, which pulls the trained tensors towards ``tensors``. A gradient with an L2 norm above ``clip_norm`` is
    scaled down to it. ``window`` is the stage's; a client trains the window of its plan, which may be narrower and has the
    same top. The loss is computed on the output of layer ``exit``, at the window's top or above it. ``objective`` is a loss of
    the caller's own, in place of ``chain_loss``.
    """

    tensors: Tensors
    window: Window
    exit: int
    epochs: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float
    global_weight: float
    global_trains: GlobalTrains
    seed: int
    steps: int | None = None
    proximal: float = 0.0
    clip_norm: float | None = None
    objective: Objective | None = None


@dataclass(frozen=True)
class Fitting:
    """The order to sum the features of the stack ``tensors`` at the output of layer ``exit``, for a head in closed form.

    ``window`` is the one that is trained next.
    """

    tensors: Tensors
    window: Window
    exit: int


@dataclass(frozen=True)
class Evaluating:
    """The order to evaluate the stack ``tensors`` on rows that the client holds out, ``validation`` or ``test``.

    The chain is cut at the top of ``window``, an early exit.
    """

    tensors: Tensors
    window: Window
    rows: Literal["validation", "test"]


@dataclass(frozen=True)
class Metrics:
    """The result of an evaluation, added up over ``examples``: a classifier predicts a class of each, a language model tokens.

    ``loss`` is the sum in nats over ``predictions``, of which ``correct`` were right. For each class ``hits`` counts the
    examples that were rightly given it, and ``occurs`` those that have it and those that were given it; both are empty for a
    language model.
    """

    examples: int
    predictions: int
    loss: float
    correct: int
    hits: tuple[int, ...]
    occurs: tuple[int, ...]
    cpu_seconds: float
    peak_bytes: int | None = None


CANDIDATE = "candidate."  # how the names of tensors begin that are classifiers to be tried


@dataclass(frozen=True)
class Calibrating:
    """The order to try classifiers on the validation rows that a client holds out, at the top of ``window``.

    ``tensors`` are those of the stack, and ``candidate.<n>.weight`` [C, F] and ``candidate.<n>.bias`` [C] of each classifier.
    """

    tensors: Tensors
    window: Window


@dataclass(frozen=True)
class HeadLosses:
    """The result of trying S classifiers on ``examples`` examples at T temperatures (``head_sums.TEMPERATURES``).

    ``losses`` [S][T] are sums in nats, and ``correct`` [S] counts the examples that a classifier gets right.
    """

    examples: int
    losses: tuple[tuple[float, ...], ...]
    correct: tuple[int, ...]
    cpu_seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Profile:
    """The CKA between each layer's output and the embeddings, and the number of examples that it was computed on."""

    cka: tuple[float, ...]
    examples: int
    cpu_seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Update:
    """The result of a turn of training: the trained ``tensors`` by name, and what the turn took.

    ``loss`` is the mean over the examples, in nats. ``steps`` are optimizer steps. ``seconds`` is the wall time on a machine of
    the client's speed, ``cpu_seconds`` the CPU time of the process.
    """

    tensors: Tensors
    examples: int
    loss: float
    steps: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class HeadSums:
    """The result of a turn of fitting a head: the tensors of ``ClassSums``, added up over the client's ``examples``."""

    tensors: Tensors
    examples: int
    cpu_seconds: float
    peak_bytes: int | None = None


TurnOrder = Profiling | Training | Fitting | Evaluating | Calibrating
TurnResult = Profile | Update | HeadSums | Metrics | HeadLosses
