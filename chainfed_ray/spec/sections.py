"""The sections of a job's document, and what each of their keys may be. ``prepare.py`` puts them together."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from chainfed_ray.units import format_bytes, parse_bytes, parse_seconds


def _exact_bytes(count: int) -> str | int:
    shown = format_bytes(count)
    return shown if parse_bytes(shown) == count else count


Bytes = Annotated[int, BeforeValidator(parse_bytes), PlainSerializer(_exact_bytes), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, allow_inf_nan=False)]
Often = Literal["round", "stage"] | Annotated[int, Field(ge=1)]  # or so many rounds
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Section(BaseModel):
    """A part of the document: immutable, with no unknown keys and no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSpec(Section):
    """Which base model is tuned, and for what."""

    base: str = Field(description="`builtin:minilm`, `hf:<org>/<name>[@<revision>]` or `path:<folder>`")
    task: Literal["sequence-classification", "causal-lm"] = Field(
        "sequence-classification", description="what the model is tuned for: to classify texts, or to go on with them"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights and activations")


class DataSpec(Section):
    """The examples: where they are and which columns to read."""

    train: str = Field(
        description="`builtin:docstrings`, `hf:<dataset>[:<configuration>]` or `path:<file.csv|jsonl|parquet>`"
    )
    validation: str | None = Field(None, description="rows for the progress report; by default a tenth of `train`")
    test: str | None = Field(None, description="rows for the final accuracy; by default a tenth of `train`")
    text: str = Field(
        "text", description="the column that holds the text; for `causal-lm` texts are joined, and cut evenly"
    )
    label: str = Field(
        "label", description="the column that holds the class; for `causal-lm` only `dirichlet` reads it"
    )
    prompt: str | None = Field(None, description="for `causal-lm`: the column that holds the prompt of `data.response`")
    response: str | None = Field(
        None, description="for `causal-lm`: the column of what is to be learnt, after a prompt"
    )
    messages: str | None = Field(
        None,
        description="for `causal-lm`: the column of chats, lists of `role` and `content`; what assistants say is learnt",
    )
    max_length: int = Field(128, ge=2, le=32768, description="tokens kept of a text")

    @property
    def columns(self) -> tuple[tuple[str, str], ...]:
        """What is read of a row by a language model: the keys, and the columns that they name."""
        if self.messages is not None:
            return (("data.messages", self.messages),)
        if self.prompt is not None and self.response is not None:
            return (("data.prompt", self.prompt), ("data.response", self.response))
        return (("data.text", self.text),)


class PartitionSpec(Section):
    """How the examples are dealt to simulated clients (docs/heterogeneity.md)."""

    scheme: Literal["iid", "dirichlet", "quantity", "column"] = Field(
        "iid",
        description="`dirichlet` skews the classes, `quantity` the numbers of rows; `column` keeps a site's rows together",
    )
    alpha: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="of the Dirichlet (`dirichlet`, `quantity`): the smaller, the more skewed",
    )
    column: str | None = Field(
        None, description="for `column`: rows with the same value there, such as a site or a user, go to one client"
    )


class ClientClass(Section):
    """Clients of one kind."""

    name: Slug = Field(description="of the class; its clients are called `<name>-0`, `<name>-1`, …")
    count: int = Field(1, ge=1, le=100_000, description="how many clients of this class there are")
    memory: Bytes = Field(description="what a client's training may use above the idle process, such as `96MiB`")
    disk: Bytes | None = Field(
        None, description="what its prefix cache and saved activations may use; by default as much as there is"
    )
    availability: float = Field(
        1.0, gt=0, le=1, description="probability that a client which is sampled for a round answers in it (simulated)"
    )
    speed: float = Field(
        1.0, ge=1e-8, le=1, description="of its machine: at 0.5 a turn takes twice as long (simulated)"
    )


class FleetSpec(Section):
    """Who takes part."""

    partition: PartitionSpec = Field(default_factory=lambda: PartitionSpec(), description="how examples are dealt")
    clients: Annotated[tuple[ClientClass, ...], Field(strict=False)] = Field(description="a list of classes of clients")

    @property
    def members(self) -> tuple[tuple[str, ClientClass], ...]:
        """Every client's name and class, class by class."""
        return tuple((f"{group.name}-{index}", group) for group in self.clients for index in range(group.count))


class AdapterSpec(Section):
    """The bottleneck adapter that follows each layer."""

    bottleneck: int = Field(64, ge=1, le=65536, description="R, the adapter's inner width")


class ChainSpec(Section):
    """The chain (DESIGN: DLCT, GPO, FOAT)."""

    window: int = Field(2, ge=1, description="Q, adjacent adapters trained together; fewer by clients with less memory")
    schedule: Literal["staged", "cyclic"] = Field("staged", description="slide on convergence, or every round")
    start: Literal["auto", "best-exit"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="first layer with an adapter; `auto` follows from CKA, `best-exit` from heads fitted at each window",
    )
    cka_threshold: float = Field(0.5, ge=0, le=1, description="`auto` starts at the first layer whose CKA is below it")
    profile_examples: int = Field(64, ge=4, le=4096, description="a client's examples in its CKA profile")
    global_weight: float = Field(0.1, ge=0, le=10, description="λ: loss = local + λ · global")
    head: Literal["zero", "fitted", "model"] = Field(
        "fitted",
        description="`fitted` in closed form as each stage begins, or at `zero` once; `model`: a language model's own",
    )
    head_layers: int | None = Field(
        None,
        ge=1,
        description="layers that the head reads, up to the window's top: by default as many as have 1,536 features "
        "together if it is `fitted` for each stage, and else one",
    )
    global_trains: Literal["window", "head", "upper"] = Field(
        "head",
        description="what the global loss may move besides the window: nothing, the head, head and upper adapters",
    )
    adapter: AdapterSpec = Field(default_factory=lambda: AdapterSpec(), description="the adapters' shape")


class ConvergenceSpec(Section):
    """When a stage of the staged schedule ends before its rounds are used up."""

    rule: Literal["none", "plateau", "movement"] = Field(
        "plateau", description="held-out loss no longer falls, or updates cancel out (effective movement)"
    )
    span: int = Field(
        3, ge=1, le=1000, description="H: the last H rounds are judged, against the H before for `plateau`"
    )
    minimum: int = Field(6, ge=1, description="rounds that a stage has in any case")
    threshold: float = Field(
        0.01, ge=0, lt=1, description="relative fall of the loss, or the effective movement, below which a stage ends"
    )


class RoundsSpec(Section):
    """Federated rounds: how many, with whom and how each client trains."""

    total: int = Field(24, ge=1, le=100_000, description="rounds of the whole job")
    last_stage_share: float = Field(0.5, gt=0, le=1, description="of `total`, kept for the last stage")
    clients: int = Field(5, ge=1, description="clients sampled for a round")
    quorum: int | None = Field(None, ge=1, description="updates without which a round does not count; half by default")
    deadline: Seconds = Field(300.0, description="after which a round goes on without those still working")
    local_epochs: int = Field(1, ge=1, le=100, description="passes of a client over its own examples")
    local_steps: int | None = Field(
        None, ge=1, le=100_000, description="optimizer steps of a client's turn, in place of `local_epochs`"
    )
    batch_size: int = Field(16, ge=1, le=4096, description="examples in an optimizer step")
    learning_rate: float = Field(5e-3, gt=0, lt=10, description="of the adapters (AdamW)")
    head_learning_rate: float = Field(
        1e-3, gt=0, lt=10, description="of the head; 0.1 where it begins at zero (`chain.head: zero`)"
    )
    warmup: int = Field(
        0, ge=0, le=100_000, description="rounds of a stage over which the rates rise to their full value"
    )
    decay: Literal["cosine", "linear", "none"] = Field(
        "cosine", description="how the rates then fall to 0 over the stage"
    )
    clip_norm: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="L2 norm to which the gradient of an optimizer step is clipped"
    )
    convergence: ConvergenceSpec = Field(
        default_factory=lambda: ConvergenceSpec(), description="when a stage ends early"
    )
    restore_best: bool = Field(
        True,
        description="whether a stage (`staged`) that ends goes back to its best stack, by the held-out loss of its exits",
    )


class AggregationSpec(Section):
    """How the updates of a round become the next stack (docs/aggregation.md). The defaults are FedAvg."""

    rule: Literal["mean", "median", "trimmed-mean", "krum"] = Field(
        "mean", description="the mean by example count, or one that withstands poisoned updates"
    )
    trim: float = Field(0.1, ge=0, lt=0.5, description="share of the updates that `trimmed-mean` cuts at each end")
    byzantine: int = Field(
        1, ge=0, le=50_000, description="f, poisoned updates of a round that `krum` withstands; it needs 2f + 3 in all"
    )
    optimizer: Literal["none", "momentum", "adam", "yogi"] = Field(
        "none", description="of the server: FedAvgM, FedAdam or FedYogi, on what the round changes"
    )
    server_learning_rate: float | None = Field(
        None, gt=0, lt=100, description="of that optimizer; by default 1 for `momentum`, 0.01 for `adam` and `yogi`"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="β₁, of its momentum")
    beta2: float = Field(0.99, ge=0, lt=1, description="β₂, of its second moment (`adam`, `yogi`)")
    tau: float = Field(1e-3, gt=0, lt=1, description="τ, its least divisor (`adam`, `yogi`)")
    proximal: float = Field(
        0.0, ge=0, lt=1e6, description="μ of FedProx: clients are held to where a round began; 0 is off"
    )

    @property
    def fewest(self) -> int:
        """Updates without which the rule has no answer: Krum needs 2f + 3 (Blanchard et al., 2017)."""
        return 2 * self.byzantine + 3 if self.rule == "krum" else 1


class PrivacySpec(Section):
    """Client-level differential privacy (docs/privacy.md)."""

    clip: float = Field(
        gt=0, lt=1e6, allow_inf_nan=False, description="C, the most that a client's whole update may change (L2 norm)"
    )
    noise_multiplier: float = Field(
        ge=0.01, le=1e4, description="z: the sum of the updates gets Gaussian noise of deviation z · C"
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="δ, at which ε is told; less than one over the fleet's clients")
    where: Literal["server", "client"] = Field(
        "server", description="who clips and adds noise: the server, or each client its share before it sends"
    )
    epsilon: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the job ends before the round that could take ε beyond it"
    )


class EvaluationSpec(Section):
    """The server's judgement on held-out rows."""

    every: Often | Literal["never"] = Field(
        "round", description="how often the chain cut at the window's top is judged, as an early exit"
    )
    whole_every: Often | Literal["never"] = Field(
        "stage", description="how often the whole model with the present stack is judged"
    )
    engine: Literal["torch", "deepspeed"] = Field(
        "torch", description="what judges the whole model: layer by layer, or ZeRO-3 with its parameters on disk"
    )
    workers: int = Field(1, ge=1, le=64, description="of `deepspeed`: processes that share the examples and the model")
    choices: str | None = Field(
        None, description="for `causal-lm`: a test of `prompt`, `choices` and `answer`, in the forms of `data.train`"
    )
    serve: Literal["last", "best"] = Field(
        "last", description="which stack becomes the model: the last, or that with the least loss of the whole model"
    )
