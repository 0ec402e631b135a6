"""Parses a job from a YAML or JSON document: checks each key, then the rules between keys."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import yaml
from pydantic import ValidationError

from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import Problem
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.recipes import with_defaults_of
from chainfed_ray.spec.rules import contradictions
from chainfed_ray.spec.wording import problem_of

_MOST_PROBLEMS = 100  # in one answer
_MOST_REASON = 200  # characters
_MOST_ALIASES = 20
_MOST_DEPTH = 20
_LONGEST_KEY = 200  # characters of a key in the name of a field: the names of all that is below it begin with that
_UNKEPT = re.compile("[\\0\\ud800-\\udfff]")


def parse_job(document: object) -> JobSpec:
    """Check a document that was read from YAML or JSON, and fill in its defaults.

    Raises:
        InvalidJob: one or more fields are wrong; it has a ``Problem`` for each.
    """
    if not isinstance(document, Mapping):
        raise InvalidJob.at("(job)", document, "a mapping with the keys " + ", ".join(JobSpec.model_fields))
    try:
        if problems := list(islice(_no_texts(document), _MOST_PROBLEMS)):
            raise InvalidJob(tuple(problems))
        spec = JobSpec.model_validate(with_defaults_of(document))
        found = contradictions(spec)
    except InvalidJob:
        raise
    except ValidationError as error:
        # Of very many mistakes the first tell enough: an answer does not grow with the question.
        by_path = {
            problem.field: problem for problem in map(problem_of, error.errors(include_url=False)[:_MOST_PROBLEMS])
        }
        raise InvalidJob(tuple(by_path.values())) from None
    except Exception as error:  # a document may be anything, also one that no check has thought of
        reason = f"{type(error).__name__}: {error}"[:_MOST_REASON]
        raise InvalidJob.at("(job)", document, f"a job that can be read ({reason})") from None
    if found:
        raise InvalidJob(tuple(found[:_MOST_PROBLEMS]))
    return spec


def _no_texts(value: object, path: str = "") -> Iterator[Problem]:
    """The strings in a document that no path and no database can hold: with half a surrogate pair, or a null character."""
    if isinstance(value, str) and _UNKEPT.search(value):
        yield Problem(path, ascii(value), "a text without lone surrogates and null characters")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _no_texts(item, f"{path}.{str(key)[:_LONGEST_KEY]}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _no_texts(item, f"{path}[{index}]")


def parse_yaml(text: str) -> JobSpec:
    """Parse and check a YAML document.

    Raises:
        InvalidJob: the text is not YAML, or a field of the document is wrong.
    """
    try:
        document = document_of(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        shown = text.splitlines()[line : line + 1] or ["the end"]
        raise InvalidJob.at("(file)", f"line {line + 1}: {shown[0]}", f"YAML ({error.problem})") from None
    except InvalidJob:
        raise
    except Exception as error:  # YAML's own errors, and what Python raises for dates, numbers and depths that are none
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_REASON]
        raise InvalidJob.at("(file)", text[:80], f"a YAML document ({reason})") from None
    return parse_job(document)


def document_of(text: str, field: str = "") -> Any:
    """What a YAML text says, which is the value of ``field`` or, by default, of a whole file.

    Raises:
        InvalidJob: it has a value that versions of YAML read differently.
        Exception: it is no YAML, or has too many aliases or levels; or Python has no such date or number.
    """
    _check_shape(text)
    loader = _YamlLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        implied = partial(loader.resolve, yaml.ScalarNode, implicit=(True, False))
        if problems := list(islice(_ambiguous(node, field, set(), implied), _MOST_PROBLEMS)):
            raise InvalidJob(tuple(problems))
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _ambiguous(node: yaml.Node, path: str, seen: set[int], implied: Callable[[str], str]) -> Iterator[Problem]:
    """The values below ``node`` that YAML 1.1 and 1.2 read differently. A node to which aliases lead is looked at once.

    ``implied`` gives the tag of a plain value that has none. A value with another one is what its tag says.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        if not node.style and node.tag == implied(node.value) and (expected := _read_alike(node.value)):
            yield Problem(path or "(file)", node.value, f"{expected}: versions of YAML read this differently")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _ambiguous(item, f"{path}[{index}]", seen, implied)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            name = key.value[:_LONGEST_KEY] if isinstance(key, yaml.ScalarNode) else "?"
            below = f"{path}.{name}".lstrip(".")
            yield from _ambiguous(key, below, seen, implied)
            yield from _ambiguous(item, below, seen, implied)


def _read_alike(value: str) -> str | None:
    """What to write in place of a plain ``value``, if YAML 1.1 and 1.2 read it differently."""
    return next((expected for pattern, expected in _DIFFER if pattern.fullmatch(value)), None)


_DIFFER = [
    (re.compile(pattern), expected)
    for pattern, expected in (
        ("yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF", "true or false, or a text in quotes"),  # 1.2: a text
        (
            "[-+]?0o?[0-9_]+|[-+]?0b[01_]+",
            "a decimal number without a 0 before it, or a text in quotes",
        ),  # 010 is 8, or 10
        (
            "[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+([.][0-9_]*)?",
            "a number without colons, or a text in quotes",
        ),  # 1.1: to base 60
        (
            "(?=.*_)[-+]?([0-9.][0-9._]*([eE][-+]?[0-9]+)?|0x[0-9a-fA-F_]*)",
            "a number without underscores, or a text in quotes",
        ),
        ("[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?", "a text in quotes"),  # 1.1: a date
    )
]


class _YamlLoader(yaml.CSafeLoader):
    """A YAML loader that reads ``1e-3`` as a number, and refuses a key that is given twice."""

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


def _check_shape(text: str) -> None:
    """Refuse what grows as it is read: many aliases, of which nested ones grow exponentially, and great depth.

    Raises:
        ComposerError: there are too many of them.
    """
    aliases = depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        aliases += isinstance(event, yaml.AliasEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if aliases > _MOST_ALIASES or depth > _MOST_DEPTH:
            found = (
                f"more than {_MOST_ALIASES} aliases" if aliases > _MOST_ALIASES else f"more than {_MOST_DEPTH} levels"
            )
            raise yaml.composer.ComposerError(None, None, found, event.start_mark)  # type: ignore[arg-type]


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)
