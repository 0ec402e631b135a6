"""What a client is asked for, and what it sends back: orders and results, which travel between server and clients."""

from dataclasses import dataclass

from chainfed_ray.aggregation.privacy import NoiseShare
from chainfed_ray.budget.planner import TurnPlan
from chainfed_ray.chain import Window
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.objective import GlobalTrains
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.adapters import Tensors


@dataclass(frozen=True)
class Client:
    """One data owner: its examples, the memory that it declared, and how its next turn keeps to that.

    ``cap_bytes`` is what the turn is held to: its plan or, once that was too little, all that the client declared. ``share`` is
    what it does to its update for privacy, if it is to do anything. ``speed`` is that of its machine, at most 1: at 0.5 a turn
    is to take twice as long as it does here.
    """

    name: str
    client_class: str
    examples: Examples
    budget_bytes: int
    plan: TurnPlan
    cap_bytes: int
    share: NoiseShare | None = None
    speed: float = 1.0


@dataclass(frozen=True)
class Profiling:
    """The order to profile the layers on at most ``examples`` examples.

    With ``guess`` all the client's examples pass through the layers, for the head that is fitted to them next (first_pass.py).
    """

    examples: int
    seed: int
    guess: StartGuess | None = None


@dataclass(frozen=True)
class Training:
    """The order to train the stack ``tensors``; rates are those of this round.

    A client makes ``steps`` optimizer steps, if that is given, and else ``epochs`` passes over its examples. ``proximal`` is
    μ of FedProx, which holds what is trained to ``tensors``. A step's gradient is scaled to the L2 norm ``clip_norm`` if it is
    longer than that.
    ``window`` is the stage's. A client trains that of its plan, which may be narrower and has the same top.
    """

    tensors: Tensors
    window: Window
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


@dataclass(frozen=True)
class Fitting:
    """The order to add up what a head in closed form is made of, at the output of ``window`` of the stack ``tensors``."""

    tensors: Tensors
    window: Window


@dataclass(frozen=True)
class Profile:
    """The CKA between each layer's output and the embedding output, and on how many examples."""

    cka: tuple[float, ...]
    examples: int
    cpu_seconds: float
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Update:
    """What a turn of training sends back, and what it took: optimizer steps, seconds, and seconds of its process's CPU.

    ``seconds`` are those of a machine with the client's speed.
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
    """What a turn of fitting sends back: the tensors of ``ClassSums``."""

    tensors: Tensors
    examples: int
    cpu_seconds: float
    peak_bytes: int | None = None


TurnOrder = Profiling | Training | Fitting
TurnResult = Profile | Update | HeadSums
