"""Reads chats from rows, in the forms that people have: OpenAI's messages, and ShareGPT's."""

import json
from collections.abc import Mapping
from typing import Any

from chainfed_ray.data.cells import as_list
from chainfed_ray.data.messages import Chat, Message
from chainfed_ray.data.tables import shown
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import some_of

# Other names of the roles, as data sets and models have them.
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
# What is said beside the content, in forms that are not read. To leave it out would teach something else.
_NOT_READ = (
    "function_call",
    "refusal",
    "reasoning_content",
    "reasoning",
    "thinking",
    "audio",
    "image",
    "images",
    "videos",
)
# What programs other than OpenAI's call it that a message is learnt, or is not. With another value than 0, 1 or a truth value,
# such as a loss that was measured, the key means something else.
_LEARNT = {"loss": True, "train": True, "training": True, "masked": False}


def chat(cell: Any, column: str, where: str) -> Chat:
    """The chat in a cell of ``column``, up to the last message of an assistant: the messages after it are not answered.

    A message is an object with ``role`` and ``content`` (a text or a list of text parts), as OpenAI has it, with
    ``tool_calls``, ``tool_call_id``, ``name`` and a ``weight`` of 0 or 1 if it has some; or one with ``from`` and ``value``, as
    ShareGPT has it. Others call the weight ``loss``, ``train``, ``training`` or ``masked``, if it is 0 or 1. The chat is empty
    if no assistant speaks. ``where`` names the row in errors.

    Raises:
        InvalidJob: the cell holds no list of such messages; the error names the first message that is none.
    """
    given = as_list(cell)
    if given is None:
        expected = f"a list of messages such as {{role: user, content: …}}; {where} holds {shown(cell)}"
        raise InvalidJob.at("data.messages", column, expected)
    messages = []
    for place, item in enumerate(given, start=1):
        try:
            messages.append(_message(item))
        except ValueError as error:
            raise InvalidJob.at(
                "data.messages", column, f"{error}; message {place} of {where} is {shown(item)}"
            ) from None
    last = max((place for place, message in enumerate(messages) if message.role == "assistant"), default=-1)
    return tuple(messages[: last + 1])


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise ValueError("a message with a role and a content")
    if said := [key for key in _NOT_READ if item.get(key)]:
        raise ValueError(f"a message without {said[0]}, which is not read")
    role = _either(item, "role", "from")
    if not isinstance(role, str) or not role.strip():
        raise ValueError("a message with a role, such as user or assistant")
    role = role.strip().lower()
    calls = item.get("tool_calls") or None
    if calls and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise ValueError("a message whose tool_calls are a list of objects")
    content = _either(item, "content", "value")
    return Message(
        role=_ROLES.get(role, role),
        content="" if content is None and calls else _content(content),
        learnt=_is_learnt(item),
        tool_calls=_as_json(calls) if calls else None,
        name=_name(item, "name"),
        tool_call_id=_name(item, "tool_call_id"),
    )


def _is_learnt(item: Mapping[Any, Any]) -> bool:
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise ValueError("a message whose weight is 0 or 1")
    said = {key: item[key] for key in _LEARNT if item.get(key) in (0, 1)}
    return weight != 0 and all(bool(value) == _LEARNT[key] for key, value in said.items())


def _either(item: Mapping[Any, Any], key: str, other: str) -> Any:
    """The value of a key that has two names, of which a table of both has one empty."""
    value, again = item.get(key), item.get(other)
    if value is not None and again is not None and value != again:
        raise ValueError(f"a message with one of {key} and {other}")
    return again if value is None else value


def _name(item: Mapping[Any, Any], key: str) -> str | None:
    value = item.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"a message whose {key} is a text")
    return value


def _as_json(calls: list[Any]) -> str:
    try:
        return json.dumps(calls)
    except TypeError as error:  # a table may hold dates and bytes
        raise ValueError(f"a message whose tool_calls are JSON ({error})") from None


def _content(content: Any) -> str:
    """The text of a message: as such, or in parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = {str(part.get("type")) for part in content}
        if kinds <= {"text"} and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        raise ValueError(f"a message of text parts alone, not of {some_of(sorted(kinds - {'text'}) or ['others'])}")
    raise ValueError("a message with a content that is a text, or a call of a tool")
