"""Renders a chat with a model's template, and finds the assistant's turns in the text.

A template may write a message differently when others follow it: Qwen3's puts a block of thoughts only before the last answer.
So each turn is located in the whole chat, not rendered by itself.
"""

import json
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase

from chainfed_ray.data.messages import Chat, Message
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import shown, some_of

_PRIVATE_USE = range(0xE000, 0xF900)  # Unicode's private use area: characters without a meaning


def apply_template(tokenizer: PreTrainedTokenizerBase, chat: Chat, add_generation_prompt: bool, field: str) -> str:
    """The text of ``chat`` by the tokenizer's template, which must exist.

    ``add_generation_prompt`` opens an assistant's turn at the end. ``field`` names the chat in errors.

    Raises:
        InvalidJob: the template does not accept the chat.
    """
    messages = [_as_template_has_it(message) for message in chat]

    def text(count: int) -> str:
        first = messages[:count]
        return str(tokenizer.apply_chat_template(first, tokenize=False, add_generation_prompt=add_generation_prompt))

    try:
        return text(len(messages))
    except Exception as error:  # templates raise any error, for example for two user turns in a row
        place = next((count for count in range(1, len(messages)) if _says(text, count) == str(error)), len(messages))
        refused = messages[place - 1] if messages else None
        raise InvalidJob.at(field, refused, f"a chat that the model's template accepts ({error})") from None


def broken_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What is wrong with the tokenizer's template, whatever chat it is given; None if nothing is."""
    found: Any = tokenizer.chat_template
    if isinstance(found, dict):
        if "default" not in found:
            return f"of several, one is called default; this one has {some_of(map(str, found))}"
        found = found["default"]
    if not isinstance(found, str):
        return f"a template is a text, and not {shown(found)}"
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    except Exception as error:
        # Only an error of syntax has a line. Any other is about this chat, and others may be accepted.
        line = getattr(error, "lineno", None)
        return None if line is None else f"line {line}: {error}"
    return None


def _says(text: Callable[[int], str], count: int) -> str | None:
    """What the template says of a chat that ends after ``count`` messages, if it refuses it."""
    try:
        text(count)
    except Exception as error:
        return str(error)
    return None


def _as_template_has_it(message: Message) -> dict[str, Any]:
    given = {
        key: value
        for key in ("role", "content", "name", "tool_call_id")
        if (value := getattr(message, key)) is not None
    }
    return given if message.tool_calls is None else given | {"tool_calls": json.loads(message.tool_calls)}


def assistant_spans(tokenizer: PreTrainedTokenizerBase, chat: Chat, field: str) -> tuple[str, list[tuple[int, int]]]:
    """The text of the whole chat, and the span of each assistant's turn that is learnt: (begin, end) in characters.

    A span begins where the template opens the turn for the assistant, and includes what the template closes the turn with.
    Turns without words have no span.

    Raises:
        InvalidJob: the template does not accept the chat, which ``field`` names, leaves out a part of it, or does not write
            each turn at one place.
    """
    whole = apply_template(tokenizer, chat, add_generation_prompt=False, field=field)
    mark = _mark_for(whole)
    check_written(tokenizer, chat, whole, add_generation_prompt=False, field=field)
    turns = []
    for place, message in enumerate(chat):
        role, content = message.role, message.content
        if role == "assistant" and content.strip() and message.learnt:
            turn = _turn(tokenizer, chat, place, whole, mark)
            if turn is None:
                expected = (
                    "chats in which the template writes each turn at one place; the place of this one is not clear"
                )
                raise InvalidJob.at(field, f"{role}: {content[:40]}", expected)
            turns.append(turn)
    return whole, turns


def check_written(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, whole: str, add_generation_prompt: bool, field: str
) -> None:
    """Check that ``whole``, which the template has made of ``chat``, has all of it: many leave out roles that they do not know.

    The template may write a content in another form, and the text of one may be a part of another. So what counts is whether
    it writes a mark in the content's place. One text with marks in all places tells, if the template accepts it; only what is
    not there is marked by itself.

    Raises:
        InvalidJob: a message or its calls of tools are left out.
    """
    mark = _mark_for(whole)
    marked = tuple(
        message._replace(content=f"{mark}{place}{mark}") if message.content.strip() else message
        for place, message in enumerate(chat)
    )
    together = _accepted(tokenizer, marked, add_generation_prompt) or ""
    for place, message in enumerate(chat):

        def instead(other: Message, place: int = place) -> str | None:
            return _accepted(tokenizer, (*chat[:place], other, *chat[place + 1 :]), add_generation_prompt)

        content, lost = marked[place].content.strip(), None
        if content not in together:
            found = instead(marked[place])
            lost = "the content" if found is not None and content not in found else None
        if message.tool_calls is not None and instead(message._replace(tool_calls=None)) == whole:
            lost = lost or "the tool_calls"
        if lost:
            expected = f"chats that the template writes whole; it leaves out {lost} of message {place + 1}"
            raise InvalidJob.at(field, f"{message.role}: {message.content[:40]}", expected)


def _mark_for(whole: str) -> str:
    """A character that a text does not contain."""
    return next(character for character in map(chr, _PRIVATE_USE) if character not in whole)


def _turn(tokenizer: PreTrainedTokenizerBase, chat: Chat, place: int, whole: str, mark: str) -> tuple[int, int] | None:
    """The span of the turn at ``place`` in the ``whole`` chat, or None if it is not clear.

    The turn's content is replaced by ``mark``, a character that the chat does not contain. What the template then writes before
    and after the mark is the text around the turn.
    """
    up_to_turn: Chat = (*chat[:place], chat[place]._replace(content=mark))
    before, after = _around(tokenizer, (*up_to_turn, *chat[place + 1 :]), mark)
    _, closing = _around(tokenizer, up_to_turn, mark)
    if after is None or not whole.endswith(after):
        return None
    opened = _accepted(tokenizer, chat[:place], add_generation_prompt=True)
    begin = next((len(text) for text in (opened, before) if text is not None and whole.startswith(text)), None)
    if begin is None:
        return None
    # A turn that is the chat's last may be closed by more text, such as an end-of-text token. Only the common beginning belongs
    # to the turn.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(closing or "", after, strict=False))
    return begin, len(whole) - len(after) + len(list(shared))


def _around(tokenizer: PreTrainedTokenizerBase, chat: Chat, mark: str) -> tuple[str, str] | tuple[None, None]:
    """What the template writes before and after ``mark`` in a chat; (None, None) unless it writes the mark exactly once."""
    text = _accepted(tokenizer, chat, add_generation_prompt=False)
    if text is None or text.count(mark) != 1:
        return None, None
    before, _, after = text.partition(mark)
    return before, after


def _accepted(tokenizer: PreTrainedTokenizerBase, chat: Chat, add_generation_prompt: bool) -> str | None:
    """The text of a part of a chat, or None: a template need not accept a part."""
    try:
        return apply_template(tokenizer, chat, add_generation_prompt, field="")
    except InvalidJob:
        return None
