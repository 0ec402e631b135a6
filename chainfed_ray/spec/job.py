"""``JobSpec``: the one definition of a job.

It is the YAML file, the body of ``POST /v1/jobs`` and the object that the coordinator reads. Unknown keys and wrong
types are errors which name the key's path; what depends on the data or the model is checked in ``prepare.py``.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError

from chainfed_ray.errors import MISSING, InvalidJob, Problem
from chainfed_ray.spec.recipes import Recipe, with_defaults_of
from chainfed_ray.spec.sections import (
    AggregationSpec,
    ChainSpec,
    DataSpec,
    EvaluationSpec,
    FleetSpec,
    ModelSpec,
    PartitionSpec,
    PrivacySpec,
    RoundsSpec,
    Section,
    Slug,
)


class JobSpec(Section):
    """A fine-tuning job."""

    name: Slug = Field(description="of the job and, once it is done, of its model: `<base>:<name>`")
    recipe: Recipe = Field(
        "chainfed-ray", description="whose defaults hold for what the job leaves open: ours, or the `paper`'s"
    )
    model: ModelSpec = Field(description="the base model")
    data: DataSpec = Field(description="the examples")
    fleet: FleetSpec = Field(description="the clients")
    chain: ChainSpec = Field(default_factory=lambda: ChainSpec(), description="the method")
    rounds: RoundsSpec = Field(default_factory=lambda: RoundsSpec(), description="the federation")
    aggregation: AggregationSpec = Field(default_factory=lambda: AggregationSpec(), description="of a round's updates")
    privacy: PrivacySpec | None = Field(None, description="differential privacy; by default there is none")
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
            spec = cls.model_validate(with_defaults_of(document))
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
        """Updates without which a round does not count: by default half, but no fewer than the rule needs."""
        if self.rounds.quorum is not None:
            return self.rounds.quorum
        return max((self.rounds.clients + 1) // 2, self.aggregation.fewest)

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
    problems += _of_partition(spec.fleet.partition)
    problems += _of_task(spec)
    count = sum(group.count for group in spec.fleet.clients)
    if spec.rounds.clients > count:
        problems.append(Problem("rounds.clients", spec.rounds.clients, f"at most {count}, the clients in the fleet"))
    elif spec.aggregation.fewest > spec.rounds.clients:
        problems.append(Problem("rounds.clients", spec.rounds.clients, _for_krum(spec.aggregation)))
    elif spec.quorum > spec.rounds.clients:
        problems.append(Problem("rounds.quorum", spec.quorum, f"at most {spec.rounds.clients}, rounds.clients"))
    elif spec.aggregation.fewest > spec.quorum:
        problems.append(Problem("rounds.quorum", spec.quorum, _for_krum(spec.aggregation)))
    problems += _not_robust(spec)
    problems += _of_start(spec)
    problems += _of_evaluation(spec)
    if spec.privacy:
        problems += _without_a_price(spec, spec.privacy, count)
    return problems


def _without_a_price(spec: JobSpec, privacy: PrivacySpec, clients: int) -> Iterator[Problem]:
    """What ``privacy`` cannot be promised with."""
    if spec.aggregation.rule != "mean":
        yield Problem("aggregation.rule", spec.aggregation.rule, "'mean', the only rule that privacy has a price for")
    if spec.chain.head == "fitted":
        expected = "'zero': privacy does not cover the sums of which a fitted head is made"
        yield Problem("chain.head", spec.chain.head, expected)
    if privacy.delta >= 1 / clients:
        expected = f"less than 1/{clients}, one over the clients in the fleet: with more, one of them may be given away"
        yield Problem("privacy.delta", privacy.delta, expected)


def _not_robust(spec: JobSpec) -> Iterator[Problem]:
    """Rules that withstand poisoned updates would not withstand poisoned sums or profiles, which have plain means."""
    rule = spec.aggregation.rule
    if rule != "mean" and spec.chain.head == "fitted":
        expected = (
            f"'zero' with aggregation.rule {rule}: a fitted head is made of plain sums, which one client can spoil"
        )
        yield Problem("chain.head", spec.chain.head, expected)
    if spec.aggregation.optimizer == "none" and spec.aggregation.server_learning_rate is not None:
        rate = spec.aggregation.server_learning_rate
        yield Problem(
            "aggregation.server_learning_rate", rate, "no value without aggregation.optimizer, whose rate it is"
        )


def _of_task(spec: JobSpec) -> Iterator[Problem]:
    """Keys of the one task in a job of the other, and half a pair of columns."""
    data, causal = spec.data, spec.model.task == "causal-lm"
    if causal and spec.chain.head != "model":
        yield Problem(
            "chain.head", spec.chain.head, "'model' for model.task causal-lm: a language model has its own head"
        )
    if not causal and spec.chain.head == "model":
        yield Problem("chain.head", spec.chain.head, "'fitted' or 'zero', unless model.task is causal-lm")
    if causal and spec.chain.head_layers not in (None, 1):
        yield Problem("chain.head_layers", spec.chain.head_layers, "1 for model.task causal-lm: its own head reads one")
    given = [("data.prompt", data.prompt), ("data.response", data.response), ("data.messages", data.messages)]
    given.append(("evaluation.choices", spec.evaluation.choices))
    for key, value in given:
        if value is not None and not causal:
            yield Problem(key, value, "no value, unless model.task is causal-lm")
    if data.messages is not None and data.prompt is not None:
        yield Problem(
            "data.prompt", data.prompt, "no value beside data.messages: a row is a chat, or a prompt and a response"
        )
    (form, column), *_ = data.columns
    # A job's document spells out its defaults, so that only another column than the usual one tells that it was asked for.
    if causal and form != "data.text" and data.text != DataSpec.model_fields["text"].default:
        expected = f"no value beside {form}, which is {column!r}: a row is a running text, or has the other form"
        yield Problem("data.text", data.text, expected)
    if (data.prompt is None) != (data.response is None):
        missing = "data.prompt" if data.prompt is None else "data.response"
        yield Problem(
            missing, MISSING, "the column that goes with " + ("data.response" if data.prompt is None else "data.prompt")
        )


def _of_start(spec: JobSpec) -> Iterator[Problem]:
    """A start that would follow from what clients do not send, or what should not be asked of them."""
    start, rule, head = spec.chain.start, spec.aggregation.rule, spec.chain.head
    if isinstance(start, int):
        return
    if spec.privacy:
        expected = f"the index of a layer: privacy does not cover what clients send for {start!r} to follow from"
        yield Problem("chain.start", start, expected)
    elif rule != "mean":
        sent = "a plain mean of profiles" if start == "auto" else "plain sums"
        yield Problem(
            "chain.start", start, f"the index of a layer with aggregation.rule {rule}: {start!r} follows from {sent}"
        )
    elif start == "best-exit" and head != "fitted":
        expected = f"'auto' or the index of a layer with chain.head {head}: the exits are those of fitted heads"
        yield Problem("chain.start", start, expected)


def _of_evaluation(spec: JobSpec) -> Iterator[Problem]:
    """What needs judgements that the job does not have."""
    wanted, rule = spec.evaluation, spec.rounds.convergence.rule
    if wanted.every == "never" and rule == "plateau" and spec.chain.schedule == "staged":
        expected = "'round', 'stage' or a number of rounds while rounds.convergence.rule is plateau, for its losses"
        yield Problem("evaluation.every", wanted.every, expected)
    if wanted.whole_every == "never" and wanted.serve == "best":
        expected = "'last' while evaluation.whole_every is never: no round is judged, so none is the best"
        yield Problem("evaluation.serve", wanted.serve, expected)
    if wanted.whole_every == "never" and wanted.choices is not None:
        yield Problem("evaluation.choices", wanted.choices, "no value while evaluation.whole_every is never")
    if wanted.engine == "torch" and wanted.workers > 1:
        expected = "1 while evaluation.engine is torch, which is one process"
        yield Problem("evaluation.workers", wanted.workers, expected)


def _of_partition(partition: PartitionSpec) -> list[Problem]:
    if partition.scheme == "column" and partition.column is None:
        return [Problem("fleet.partition.column", MISSING, "the column of which a client gets whole values")]
    if partition.scheme != "column" and partition.column is not None:
        expected = f"column, since fleet.partition.column is {partition.column!r}"
        return [Problem("fleet.partition.scheme", partition.scheme, expected)]
    return []


def _for_krum(aggregation: AggregationSpec) -> str:
    return f"at least {aggregation.fewest}: Krum needs 2f + 3 updates, and aggregation.byzantine f is {aggregation.byzantine}"


def _problem(error: Any) -> Problem:
    """A pydantic error in our words."""
    location = tuple(part for part in error["loc"] if part not in _UNION_BRANCHES)
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if error["type"] == "missing":
        return Problem(path, MISSING, _description(location))
    if error["type"] == "extra_forbidden":
        return Problem(path, error["input"], _known_keys(location))
    if location[-2:] == ("chain", "start"):
        return Problem(path, error["input"], "'auto', 'best-exit' or the index of a layer, 0 or more")
    if location[:1] == ("evaluation",) and location[1:] in (("every",), ("whole_every",)):
        return Problem(path, error["input"], "'round', 'stage', 'never' or a number of rounds, 1 or more")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return Problem(path, error["input"], _IN_OUR_WORDS.get(error["type"], message))


# Pydantic adds the branch of a union to an error's location: no key of the user's document.
_UNION_BRANCHES = frozenset(
    {"literal['auto','best-exit']", "literal['round','stage']", "literal['never']", "constrained-int"}
)

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
