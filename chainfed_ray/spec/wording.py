"""Rewrites Pydantic's errors as problems: each has the key's path, its value and what was expected."""

import difflib
from typing import Any, get_args

from chainfed_ray.problem import MISSING, Problem
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import SLUG_PATTERN, Section


def problem_of(error: Any) -> Problem:
    """The ``Problem`` for one entry of Pydantic's ``ValidationError.errors()``."""
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
    if error["type"] == "string_pattern_mismatch" and error["ctx"]["pattern"] != SLUG_PATTERN:
        return Problem(path, error["input"], _description(location))
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return Problem(path, error["input"], _IN_OUR_WORDS.get(error["type"], message))


# Pydantic adds the branch of a union to an error's location. The user's document has no such key.
_UNION_BRANCHES = frozenset(
    {"literal['auto','best-exit','last']", "literal['round','stage']", "literal['never']", "constrained-int"}
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
    """The section of the schema at ``location``, a path of keys and list indices."""
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
