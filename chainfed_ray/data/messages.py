"""What a chat is. This file imports nothing, so a process that only passes chats on loads no library of tables."""

from typing import NamedTuple


class Message(NamedTuple):
    """One message of a chat. An assistant's is ``learnt``, unless its weight is 0.

    ``tool_calls`` are the calls of tools that it makes, as JSON for the model's template; None if it makes none. ``name`` and
    ``tool_call_id`` are for the template, too: who speaks, and which call is answered.
    """

    role: str
    content: str
    learnt: bool = True
    tool_calls: str | None = None
    name: str | None = None
    tool_call_id: str | None = None


Chat = tuple[Message, ...]
