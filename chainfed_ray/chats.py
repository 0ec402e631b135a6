"""Chats as they are given: a row is a list of messages, each with a role and a content."""

import json
from collections.abc import Sequence
from typing import Any

from chainfed_ray.errors import InvalidJob

Chat = tuple[tuple[str, str], ...]
"""Roles and contents, in their order."""

_FORM = "a list of messages such as {role: user, content: …}, the last by the assistant"


def chat(value: Any, column: str, where: str) -> Chat:
    """The chat in a cell of ``column``; in a file without lists, such as CSV, it is JSON.

    Raises:
        InvalidJob: it is none, or has nothing to learn from.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise InvalidJob.at("data.messages", column, f"{_FORM}; in {where} it is {value[:40]!r}") from None
    if hasattr(value, "tolist"):  # as parquet gives a list
        value = value.tolist()
    messages = tuple(_message(item) for item in value) if isinstance(value, Sequence) else ()
    if not messages or None in messages or messages[-1][0] != "assistant":  # type: ignore[index]
        raise InvalidJob.at("data.messages", column, f"{_FORM}; {where} has none")
    return tuple(message for message in messages if message)


def _message(item: Any) -> tuple[str, str] | None:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("role", "content")):
        return None
    return item["role"], item["content"]
