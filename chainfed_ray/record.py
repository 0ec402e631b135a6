"""Base classes of persisted JSON documents: immutable, and with the version of their format."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Version = Literal[2]
VERSION: Version = 2


class Record(BaseModel):
    """An immutable JSON document, or a part of one. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Document(Record):
    """A JSON document that is stored as a whole. One of another version is refused: its keys may mean something else."""

    version: Version = VERSION


def named(rule: object) -> str:
    """The name by which a function or an object of the caller's own stands on record: its module and its name there."""
    kind = rule if hasattr(rule, "__qualname__") else type(rule)
    return f"{kind.__module__}.{kind.__qualname__}"  # type: ignore[attr-defined]
