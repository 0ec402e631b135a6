"""The base of what is kept: JSON documents that are immutable, and that say in which version of their form they are written."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Version = Literal[1]
VERSION: Version = 1


class Record(BaseModel):
    """An immutable JSON document, or a part of one. A key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Record):
    """A document that is kept as a whole. One of another version is refused, and not read as what it is not."""

    version: Version = VERSION


def named(rule: object) -> str:
    """The name by which a function or an object of the caller's own stands on record: its module and its name there."""
    kind = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{kind.__module__}.{kind.__qualname__}"  # type: ignore[attr-defined]
