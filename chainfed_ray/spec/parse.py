"""Parses a job from a YAML or JSON document: checks each key, then the rules between keys."""

import re
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.recipes import with_defaults_of
from chainfed_ray.spec.rules import contradictions
from chainfed_ray.spec.wording import problem_of


def parse_job(document: object) -> JobSpec:
    """Check a document that was read from YAML or JSON, and fill in its defaults.

    Raises:
        InvalidJob: one or more fields are wrong; it has a ``Problem`` for each.
    """
    if not isinstance(document, Mapping):
        raise InvalidJob.at("(job)", document, "a mapping with the keys " + ", ".join(JobSpec.model_fields))
    try:
        spec = JobSpec.model_validate(with_defaults_of(document))
    except ValidationError as error:
        by_path = {problem.field: problem for problem in map(problem_of, error.errors())}
        raise InvalidJob(tuple(by_path.values())) from None
    if problems := contradictions(spec):
        raise InvalidJob(tuple(problems))
    return spec


def parse_yaml(text: str) -> JobSpec:
    """Parse and check a YAML document.

    Raises:
        InvalidJob: the text is not YAML, or a field of the document is wrong.
    """
    try:
        document = yaml.load(text, Loader=_YamlLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        shown = text.splitlines()[line : line + 1] or ["the end"]
        raise InvalidJob.at("(file)", f"line {line + 1}: {shown[0]}", f"YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise InvalidJob.at("(file)", " ".join(str(error).split()), "a YAML document") from None
    return parse_job(document)


class _YamlLoader(yaml.SafeLoader):
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


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
