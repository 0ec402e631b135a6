"""What a chat is. This file imports nothing, so a process that only passes chats on loads no library of tables."""

from typing import NamedTuple


class Message(NamedTuple):
    """One message of a chat. An assistant's is ``learnt``, unless its weight is 0.

    ``tool_calls`` are the calls of tools that it makes, as JSON for the model's template; None if it makes none.
    """

    role: str
    content: str
    learnt: bool = True
    tool_calls: str | None = None


Chat = tuple[Message, ...]
