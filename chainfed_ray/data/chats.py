"""Chats as they are given: a row is a list of messages, each with a role and a content."""

from typing import Any

from chainfed_ray.data.cells import as_list
from chainfed_ray.errors import InvalidJob

Message = tuple[str, str]
"""A role and a content."""

Chat = tuple[Message, ...]


def chat(cell: Any, column: str, where: str) -> Chat:
    """The chat in a cell of ``column``, up to what an assistant says last: after that there is nothing to learn.

    It is empty if no assistant speaks, or if a message has no content, as a call of a tool has none: without that, what
    follows is no answer to what is left.

    Raises:
        InvalidJob: the cell holds no chat.
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
