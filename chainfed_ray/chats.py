"""Chats as they are given: a row is a list of messages, each with a role and a content."""

from typing import Any

from chainfed_ray.cells import as_list
from chainfed_ray.errors import InvalidJob

Message = tuple[str, str]
"""A role and a content."""

Chat = tuple[Message, ...]


def chat(cell: Any, column: str, where: str) -> Chat:
    """The chat in a cell of ``column``.

    Raises:
        InvalidJob: it is none, or has nothing to learn from.
    """
    messages = [_message(item) for item in as_list(cell) or []]
    whole = tuple(message for message in messages if message)
    if not messages or len(whole) < len(messages) or whole[-1][0] != "assistant":
        expected = f"a list of messages such as {{role: user, content: …}}, the last by the assistant; {where} has none"
        raise InvalidJob.at("data.messages", column, expected)
    return whole


def _message(item: Any) -> Message | None:
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("role", "content")):
        return None
    return item["role"], item["content"]
