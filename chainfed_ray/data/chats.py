"""Reads chats from rows: a list of messages, each with a role and a content."""

from typing import Any

from chainfed_ray.data.cells import as_list
from chainfed_ray.errors import InvalidJob

Message = tuple[str, str]
"""(role, content)"""

Chat = tuple[Message, ...]


def chat(cell: Any, column: str, where: str) -> Chat:
    """The chat in a cell of ``column``, up to the last message of an assistant: the messages after it are not answered.

    The chat is empty if no assistant speaks. It is also empty if a message has no content (a tool call has none): without that
    message, the messages after it would answer something that is not there. ``where`` names the row in errors.

    Raises:
        InvalidJob: the cell holds no list of messages.
    """
    given = as_list(cell)
    if given is None or not all(map(_is_message, given)):
        expected = f"a list of messages such as {{role: user, content: …}}; {where} has none"
        raise InvalidJob.at("data.messages", column, expected)
    if any(message["content"] is None for message in given):
        return ()
    last = max((place for place, message in enumerate(given) if message["role"] == "assistant"), default=-1)
    return tuple((message["role"], message["content"]) for message in given[: last + 1])


def _is_message(item: Any) -> bool:
    return (
        isinstance(item, dict)
        and isinstance(item.get("role"), str)
        and "content" in item
        and isinstance(item["content"], str | None)
    )
