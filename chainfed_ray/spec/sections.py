"""The sections of a job's document, with the type, default and meaning of each key. ``job.py`` combines them."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from chainfed_ray.reading import NF4
from chainfed_ray.units import BYTES_PATTERN, SECONDS_PATTERN, format_bytes, parse_bytes, parse_seconds

_LONGEST = 30 * 24 * 3600  # seconds


def _exact_bytes(count: int) -> str | int:
    shown = format_bytes(count)
    return shown if parse_bytes(shown) == count else count


def _deadline(value: object) -> float:
    if value == "auto":
        return math.inf
    try:
        seconds = parse_seconds(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _LONGEST:
        raise ValueError("'auto' or a duration such as 120s, 5m or 1h, 30 days at most")
    return seconds


def _exact_deadline(seconds: float) -> str | float:
    return "auto" if seconds == math.inf else seconds


_ByteCount = Annotated[int, Field(gt=0, lt=2**60)]
_SecondCount = Annotated[float, Field(gt=0, le=_LONGEST)]
Bytes = Annotated[
    _ByteCount,
    BeforeValidator(parse_bytes, json_schema_input_type=_ByteCount | Annotated[str, Field(pattern=BYTES_PATTERN)]),
    PlainSerializer(_exact_bytes),
]
# In seconds; infinity for "auto".
Deadline = Annotated[
    float,
    BeforeValidator(
        _deadline,
        json_schema_input_type=_SecondCount | Literal["auto"] | Annotated[str, Field(pattern=SECONDS_PATTERN)],
    ),
    PlainSerializer(_exact_deadline),
]
Often = Literal["round", "stage"] | Annotated[int, Field(ge=1)]  # an integer n means every n rounds
SLUG_PATTERN = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
Slug = Annotated[str, Field(pattern=SLUG_PATTERN)]

LabelValue = Annotated[str, Field(max_length=63)]


class Section(BaseModel):
    """A part of the document: immutable, without unknown keys, and without silent conversions of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSpec(Section):
    """The base model, and the task that it is tuned for."""

    base: str = Field(
        description="`builtin:minilm`, `builtin:smollm2`, `hf:<org>/<name>[@<revision>]` or `path:<folder or .gguf file>`"
    )
    task: Literal["sequence-classification", "causal-lm"] = Field(
        "sequence-classification", description="what the model is tuned for: to classify texts, or to continue them"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="the dtype of the frozen weights and of activations"
    )
    quantization: Literal["none", "nf4"] = Field(
        "none",
        description="in which form the frozen matrices are kept on disk: as they come, or in 4.5 bits a weight (`nf4`)",
    )

    @property
    def weights(self) -> str:
        """The name of the base model's weights, for ``weights_folder``: its own, and how they are quantized."""
        return self.base if self.quantization == "none" else f"{self.base}{NF4}"


class DataSpec(Section):
    """The examples: where they are, and which columns to use."""

    train: str | None = Field(
        None,
        description="`builtin:docstrings`, `hf:<dataset>[:<configuration>]`, `path:<file or folder>` or `upload:<id>`; not "
        "needed if every client is at a site",
    )
    validation: str | None = Field(
        None, description="held-out rows for the losses during training; by default a tenth of `train`"
    )
    test: str | None = Field(None, description="held-out rows for the final accuracy; by default a tenth of `train`")
    text: str = Field(
        "text", description="the column of texts; for `causal-lm` they are joined and cut to equal lengths"
    )
    label: str = Field(
        "label", description="the column of classes; for `causal-lm` only the `dirichlet` partition uses it"
    )
    prompt: str | None = Field(None, description="for `causal-lm`: the column of prompts that `data.response` answers")
    response: str | None = Field(
        None, description="for `causal-lm`: the column of responses, which the model learns to give to prompts"
    )
    messages: str | None = Field(
        None,
        description="for `causal-lm`: the column of chats, lists of `role` and `content`; the assistants' turns are learnt",
    )
    classes: Annotated[tuple[str, ...], Field(strict=False, min_length=2, max_length=65536)] | None = Field(
        None, description="the names of all classes; by default those of the training rows, at sites as well"
    )
    max_length: int = Field(128, ge=2, le=32768, description="the most tokens of an example; longer texts are cut")

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """The columns with a language model's training text, as (key, column) pairs."""
        if self.messages is not None:
            return (("data.messages", self.messages),)
        if self.prompt is not None and self.response is not None:
            return (("data.prompt", self.prompt), ("data.response", self.response))
        return (("data.text", self.text),)


class AdapterSpec(Section):
    """The adapter of each layer: a bottleneck that follows it, or a LoRA inside it."""

    kind: Literal["bottleneck", "lora"] = Field(
        "bottleneck",
        description="a `bottleneck` after each layer, or a `lora` on its linear modules, which other engines load as it is",
    )
    bottleneck: int = Field(64, ge=1, le=65536, description="R, the inner width of a bottleneck")
    rank: int = Field(8, ge=1, le=1024, description="r, the rank of a LoRA; its factor α/r is 2")
    targets: Annotated[tuple[str, ...], Field(strict=False, min_length=1, max_length=64)] | None = Field(
        None, description="the names of the linear modules that a LoRA is on, such as `q_proj`; by default all"
    )

    @property
    def width(self) -> int:
        """The inner width of an adapter: R of a bottleneck, r of a LoRA."""
        return self.rank if self.kind == "lora" else self.bottleneck


class ChainSpec(Section):
    """The chain and its windows (DLCT, GPO and FOAT: paper sections 3.2, 3.3 and 3.4)."""

    window: int | None = Field(
        None,
        ge=1,
        description="Q, the number of adjacent adapters trained together; clients with less memory train fewer; by default 2, "
        "or 8 of a language model",
    )
    schedule: Literal["staged", "cyclic"] = Field(
        "staged", description="when the window slides: on convergence (`staged`), or every round (`cyclic`)"
    )
    start: Literal["auto", "best-exit", "last"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="the first layer with an adapter: `auto` finds it by CKA, `best-exit` by heads fitted at each window; "
        "`last` is that of the model's last window, the only one that is trained then",
    )
    slide: int = Field(1, ge=1, description="by how many layers the window slides, at most `window`")
    direction: Literal["up", "down"] = Field(
        "up", description="which way the window slides; `down` begins at the model's top and needs `look_ahead: exact`"
    )
    cka_threshold: float = Field(0.5, ge=0, le=1, description="`auto` starts at the first layer whose CKA is below it")
    profile_examples: int = Field(64, ge=4, le=4096, description="how many examples a client uses for its CKA profile")
    look_ahead: Literal["none", "adapters", "exact"] = Field(
        "adapters",
        description="what a window's loss knows of the layers above: nothing (`none`), their `adapters` as stand-ins, or the "
        "layers themselves (`exact`: the loss of the whole model)",
    )
    global_weight: float = Field(
        0.1, ge=0, le=10, description="λ: loss = local + λ · global; the global loss is that of `look_ahead: adapters`"
    )
    head: Literal["zero", "fitted", "model"] = Field(
        "fitted",
        description="how the head starts: `fitted` in closed form at each stage, at `zero`, or as the language `model`'s own",
    )
    head_layers: int | None = Field(
        None,
        ge=1,
        description="how many layers' pooled features the head uses, from the exit down; by default as many as have "
        "1,536 features together if the head is `fitted` for each stage, otherwise 1",
    )
    global_trains: Literal["window", "head", "upper"] = Field(
        "head",
        description="what the global loss trains besides the window: nothing more (`window`), the `head`, or the head and "
        "the `upper` adapters",
    )
    adapter: AdapterSpec = Field(default_factory=lambda: AdapterSpec(), description="the shape of the adapters")

    @property
    def stand_in_weight(self) -> float:
        """λ of the global loss through stand-ins; 0 with another look-ahead, which has no such loss."""
        return self.global_weight if self.look_ahead == "adapters" else 0.0


class ConvergenceSpec(Section):
    """When a stage of the staged schedule ends before its rounds are used up."""

    rule: Literal["none", "plateau", "movement"] = Field(
        "plateau",
        description="`plateau`: the held-out loss no longer falls; `movement`: updates cancel out (effective movement)",
    )
    span: int = Field(
        3,
        ge=1,
        le=1000,
        description="H: the rule looks at the last H rounds; `plateau` compares them with the H before",
    )
    minimum: int = Field(6, ge=1, description="the fewest rounds of a stage")
    threshold: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="a stage ends when the relative fall of the loss, or the effective movement, is below this",
    )


class RoundsSpec(Section):
    """Federated rounds: how many there are, who takes part and how each client trains."""

    total: int = Field(24, ge=1, le=100_000, description="the number of rounds in the job")
    last_stage_share: float = Field(0.5, gt=0, le=1, description="the share of `total` that the last stage gets")
    clients: int = Field(5, ge=1, description="how many clients are sampled for a round")
    quorum: int | None = Field(
        None, ge=1, description="the fewest updates with which a round counts; by default half of `rounds.clients`"
    )
    deadline: Deadline = Field(
        "auto",
        validate_default=True,
        description="the time after which a round stops waiting for clients that have not answered; `auto`: it waits for "
        "each as long as it works",
    )
    local_epochs: int = Field(1, ge=1, le=100, description="how often a client passes over its examples in a turn")
    local_steps: int | None = Field(
        None, ge=1, le=100_000, description="the optimizer steps of a client's turn; replaces `local_epochs`"
    )
    batch_size: int = Field(16, ge=1, le=4096, description="the number of examples in an optimizer step")
    learning_rate: float = Field(5e-3, gt=0, lt=10, description="the learning rate of the adapters (AdamW)")
    head_learning_rate: float = Field(
        1e-3, gt=0, lt=10, description="the learning rate of the head; by default 0.1 with `chain.head: zero`"
    )
    warmup: int = Field(
        0, ge=0, le=100_000, description="over how many rounds of a stage the learning rates rise to their full value"
    )
    decay: Literal["cosine", "linear", "none"] = Field(
        "cosine", description="how the learning rates then fall to 0 over the stage"
    )
    clip_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the L2 norm to which the gradient of an optimizer step is clipped"
    )
    convergence: ConvergenceSpec = Field(
        default_factory=lambda: ConvergenceSpec(), description="when a stage ends early"
    )
    restore_best: bool = Field(
        True,
        description="if true, a `staged` stage ends with its best stack, by the held-out loss of its early exits",
    )


class AggregationSpec(Section):
    """How the updates of a round are aggregated into the next stack (docs/aggregation.md). The defaults are FedAvg."""

    rule: Literal["mean", "median", "trimmed-mean", "krum"] = Field(
        "mean", description="the mean weighted by example count, or a rule that is robust to poisoned updates"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="the share of the updates that `trimmed-mean` drops at each end")
    byzantine: int = Field(
        1,
        ge=0,
        le=50_000,
        description="f, how many poisoned updates `krum` tolerates in a round; it needs 2f + 3 updates",
    )
    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none",
        description="the server's optimizer: FedAvgM (`momentum`), FedAdam or FedYogi; it applies the round's mean change",
    )
    server_learning_rate: float | None = Field(
        None,
        gt=0,
        lt=100,
        description="the server optimizer's learning rate; by default 1 for `momentum`, 0.01 for `adam` and `yogi`",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁, the decay of the server optimizer's momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂, the decay of its second moment (`adam`, `yogi`)")
    tau: float = Field(1e-3, gt=0, lt=1, description="τ, added to its divisor (`adam`, `yogi`)")
    proximal: float = Field(
        0.0,
        ge=0,
        lt=1e6,
        description="μ of FedProx, which pulls clients towards the weights that the round began with; 0 turns it off",
    )

    @property
    def fewest(self) -> int:
        """The fewest updates that the rule can aggregate: Krum needs 2f + 3 (Blanchard et al., 2017)."""
        return 2 * self.byzantine + 3 if self.rule == "krum" else 1


class PrivacySpec(Section):
    """Client-level differential privacy (docs/privacy.md)."""

    clip: float = Field(
        gt=0, lt=1e6, allow_inf_nan=False, description="C, the L2 norm to which a client's whole update is clipped"
    )
    noise_multiplier: float = Field(
        ge=0.01, le=1e4, description="z: the sum of the updates gets Gaussian noise of standard deviation z · C"
    )
    delta: float = Field(
        1e-5, gt=0, lt=1, description="δ, for which ε is reported; less than one over the number of clients"
    )
    where: Literal["server", "client"] = Field(
        "server",
        description="who adds the noise: the server, or each client its share. Each client clips its update either way",
    )
    epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the largest ε: the job ends before a round that could exceed it"
    )


class EvaluationSpec(Section):
    """The evaluation on held-out rows: the server's, or those that sites hold out."""

    rows: Literal["server", "sites"] = Field(
        "server",
        description="whose held-out rows: the `server`'s, or those of `sites`, which each hold out two tenths and send scores",
    )

    every: Often | Literal["never"] = Field(
        "round", description="how often the early exit is evaluated: the chain cut at the window's top"
    )
    whole_every: Often | Literal["never"] = Field(
        "stage", description="how often the whole model with the current stack is evaluated"
    )
    engine: Literal["torch", "deepspeed"] = Field(
        "torch",
        description="what evaluates the whole model: `torch`, layer by layer, or `deepspeed`, ZeRO-3 with parameters on disk",
    )
    workers: int = Field(
        1, ge=1, le=64, description="for `deepspeed`: how many processes share the examples and the model"
    )
    choices: str | None = Field(
        None,
        description="for `causal-lm`: a multiple-choice test of `prompt`, `choices` and `answer`; given like `data.train`",
    )
    serve: Literal["last", "best"] = Field(
        "last", description="which stack becomes the model: the last, or the one whose whole model had the lowest loss"
    )
