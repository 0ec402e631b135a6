"""``JobSpec``: the one definition of a job.

It is the YAML file, the body of ``POST /v1/jobs`` and the object that the coordinator reads. Unknown keys and wrong
types are errors which name the key's path; what depends on the data or the model is checked in ``job.py``.
"""

import difflib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from chainfed_ray.errors import MISSING, InvalidJob, Problem
from chainfed_ray.quantities import format_bytes, parse_bytes, parse_seconds


def _exact_bytes(count: int) -> str | int:
    shown = format_bytes(count)
    return shown if parse_bytes(shown) == count else count


Bytes = Annotated[int, BeforeValidator(parse_bytes), PlainSerializer(_exact_bytes), Field(gt=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0, allow_inf_nan=False)]
Slug = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class Section(BaseModel):
    """A part of the document: immutable, with no unknown keys and no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSpec(Section):
    """Which base model is tuned, and for what."""

    base: str = Field(description="`builtin:minilm`, `hf:<org>/<name>[@<revision>]` or `path:<folder>`")
    task: Literal["sequence-classification"] = Field(
        "sequence-classification", description="what the model is tuned for"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="of the frozen weights and activations")


class DataSpec(Section):
    """The examples: where they are and which columns to read."""

    train: str = Field(description="`builtin:docstrings`, `hf:<dataset>` or `path:<file.csv|jsonl|parquet>`")
    validation: str | None = Field(None, description="rows for the progress report; by default a tenth of `train`")
    test: str | None = Field(None, description="rows for the final accuracy; by default a tenth of `train`")
    text: str = Field("text", description="the column that holds the text")
    label: str = Field("label", description="the column that holds the class")
    max_length: int = Field(128, ge=2, le=32768, description="tokens kept of a text")


class PartitionSpec(Section):
    """How the examples are dealt to simulated clients."""

    scheme: Literal["iid", "dirichlet"] = Field("iid", description="`dirichlet` skews the classes between clients")
    alpha: float = Field(1.0, gt=0, allow_inf_nan=False, description="of the Dirichlet: the smaller, the more skewed")


class ClientClass(Section):
    """Clients of one kind."""

    name: Slug = Field(description="of the class; its clients are called `<name>-0`, `<name>-1`, …")
    count: int = Field(1, ge=1, le=100_000, description="how many clients of this class there are")
    memory: Bytes = Field(description="what a client's training may use above the idle process, such as `96MiB`")
    disk: Bytes | None = Field(
        None, description="what its prefix cache and saved activations may use; by default as much as there is"
    )


class FleetSpec(Section):
    """Who takes part."""

    partition: PartitionSpec = Field(default_factory=lambda: PartitionSpec(), description="how examples are dealt")
    clients: Annotated[tuple[ClientClass, ...], Field(strict=False)] = Field(description="a list of classes of clients")


class AdapterSpec(Section):
    """The bottleneck adapter that follows each layer."""

    bottleneck: int = Field(64, ge=1, le=65536, description="R, the adapter's inner width")


class ChainSpec(Section):
    """The chain (DESIGN: DLCT, GPO, FOAT)."""

    window: int = Field(2, ge=1, description="Q, adjacent adapters trained together; fewer by clients with less memory")
    schedule: Literal["staged", "cyclic"] = Field("staged", description="slide on convergence, or every round")
    start: Literal["auto"] | Annotated[int, Field(ge=0)] = Field("auto", description="first layer with an adapter")
    cka_threshold: float = Field(0.8, ge=0, le=1, description="`auto` starts at the first layer whose CKA is below it")
    profile_examples: int = Field(64, ge=4, le=4096, description="a client's examples in its CKA profile")
    global_weight: float = Field(0.1, ge=0, le=10, description="λ: loss = local + λ · global")
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
    learning_rate: float = Field(3e-3, gt=0, lt=10, description="of the adapters (AdamW, cosine over a stage)")
    head_learning_rate: float = Field(1e-2, gt=0, lt=10, description="of the head")
    convergence: ConvergenceSpec = Field(
        default_factory=lambda: ConvergenceSpec(), description="when a stage ends early"
    )


class EvaluationSpec(Section):
    """The server's judgement on held-out rows."""

    every: Literal["round", "stage"] = Field("round", description="how often validation accuracy is measured")
    engine: Literal["torch"] = Field("torch", description="the streaming evaluator, one layer in memory at a time")


class JobSpec(Section):
    """A fine-tuning job."""

    name: Slug = Field(description="of the job and, once it is done, of its model: `<base>:<name>`")
    model: ModelSpec = Field(description="the base model")
    data: DataSpec = Field(description="the examples")
    fleet: FleetSpec = Field(description="the clients")
    chain: ChainSpec = Field(default_factory=lambda: ChainSpec(), description="the method")
    rounds: RoundsSpec = Field(default_factory=lambda: RoundsSpec(), description="the federation")
    evaluation: EvaluationSpec = Field(default_factory=lambda: EvaluationSpec(), description="the measurements")
    seed: int = Field(0, ge=0, lt=2**63, description="from which every random choice follows")

    @classmethod
    def parse(cls, document: object) -> "JobSpec":
        """Check a document read from YAML or JSON.

        Raises:
            InvalidJob: with a ``Problem`` for each field that is wrong.
        """
        if not isinstance(document, Mapping):
            raise InvalidJob.at("(job)", document, "a mapping with the keys " + ", ".join(cls.model_fields))
        try:
            spec = cls.model_validate(document)
        except ValidationError as error:
            by_path = {problem.field: problem for problem in map(_problem, error.errors())}
            raise InvalidJob(tuple(by_path.values())) from None
        if problems := _contradictions(spec):
            raise InvalidJob(tuple(problems))
        return spec

    @classmethod
    def from_yaml(cls, text: str) -> "JobSpec":
        """Check a YAML document.

        Raises:
            InvalidJob: the text is no YAML, or the document is wrong.
        """
        try:
            document = yaml.load(text, Loader=_YamlLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line if error.problem_mark else 0
            shown = text.splitlines()[line : line + 1] or ["the end"]
            raise InvalidJob.at("(file)", f"line {line + 1}: {shown[0]}", f"YAML ({error.problem})") from None
        except yaml.YAMLError as error:
            raise InvalidJob.at("(file)", " ".join(str(error).split()), "a YAML document") from None
        return cls.parse(document)

    def document(self) -> dict[str, Any]:
        """The job as JSON-ready data, every default spelt out; ``parse`` gives the same job back."""
        return self.model_dump(mode="json")

    @property
    def quorum(self) -> int:
        """Updates without which a round does not count."""
        return self.rounds.quorum if self.rounds.quorum is not None else (self.rounds.clients + 1) // 2

    @property
    def model_name(self) -> str:
        """What the finished model is called: ``<base>:<name>``, with the last part of the base's path."""
        path = self.model.base.partition(":")[2].partition("@")[0]
        return f"{path.rstrip('/').rpartition('/')[2]}:{self.name}"


class _YamlLoader(yaml.SafeLoader):
    """YAML as people write it: ``1e-3`` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _contradictions(spec: JobSpec) -> list[Problem]:
    """What is wrong between fields that are right by themselves."""
    if not spec.fleet.clients:
        return [Problem("fleet.clients", [], "at least one class of clients")]
    problems = []
    names = [group.name for group in spec.fleet.clients]
    for index, name in enumerate(names):
        if name in names[:index]:
            problems.append(Problem(f"fleet.clients[{index}].name", name, "a name that no other class has"))
    count = sum(group.count for group in spec.fleet.clients)
    if spec.rounds.clients > count:
        problems.append(Problem("rounds.clients", spec.rounds.clients, f"at most {count}, the clients in the fleet"))
    elif spec.quorum > spec.rounds.clients:
        problems.append(Problem("rounds.quorum", spec.quorum, f"at most {spec.rounds.clients}, rounds.clients"))
    return problems


def _problem(error: Any) -> Problem:
    """A pydantic error in our words."""
    location = tuple(part for part in error["loc"] if part not in _UNION_BRANCHES)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "missing":
        return Problem(path, MISSING, _description(location))
    if error["type"] == "extra_forbidden":
        return Problem(path, error["input"], _known_keys(location))
    if location[-2:] == ("chain", "start"):
        return Problem(path, error["input"], "'auto' or the index of a layer, 0 or more")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return Problem(path, error["input"], _IN_OUR_WORDS.get(error["type"], message))


# Pydantic adds the branch of a union to an error's location: no key of the user's document.
_UNION_BRANCHES = frozenset({"literal['auto']", "constrained-int"})

_IN_OUR_WORDS = {
    "string_pattern_mismatch": "lower-case letters, digits and dashes, 63 at most, such as my-job-1",
    "string_type": "a string",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "model_type": "a mapping",
    "tuple_type": "a list",
}


def _section_at(location: tuple[str | int, ...]) -> type[Section]:
    """The section of the schema that a path leads to."""
    section: type[Section] = JobSpec
    for part in location:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            candidates = (annotation, *get_args(annotation))
            section = next(item for item in candidates if isinstance(item, type) and issubclass(item, Section))
    return section


def _description(location: tuple[str | int, ...]) -> str:
    return _section_at(location[:-1]).model_fields[str(location[-1])].description or "a value"


def _known_keys(location: tuple[str | int, ...]) -> str:
    keys = list(_section_at(location[:-1]).model_fields)
    close = difflib.get_close_matches(str(location[-1]), keys, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"one of the keys {', '.join(keys)}{hint}"
