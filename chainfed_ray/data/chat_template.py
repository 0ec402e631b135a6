"""A chat as a model's template writes it, and where in it assistants speak.

A template may write a message differently when others follow it: that of Qwen3 puts a block for thoughts before the last
answer alone. So what counts is how a turn stands in the whole chat.
"""

from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from chainfed_ray.data.chats import Chat
from chainfed_ray.errors import InvalidJob

_PRIVATE_USE = range(0xE000, 0xF900)  # characters that stand for nothing


def written(tokenizer: PreTrainedTokenizerBase, chat: Chat, opened: bool, field: str) -> str:
    """The chat by the tokenizer's template, which there has to be; ``opened`` for the assistant's turn.

    Raises:
        InvalidJob: the template does not accept the chat, which ``field`` names.
    """
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))
    except Exception as error:  # a template raises what it likes, such as for roles that do not take turns
        newest = messages[-1] if messages else None
        raise InvalidJob.at(field, newest, f"a chat that the model's template accepts ({error})") from None


def spoken(tokenizer: PreTrainedTokenizerBase, chat: Chat, field: str) -> tuple[str, list[tuple[int, int]]]:
    """The whole chat, and where an assistant's turns begin and end in it, in characters; a turn without words is left out.

    A turn begins where the template opens it for the assistant, and ends with what the template closes it with.

    Raises:
        InvalidJob: the template does not accept the chat, which ``field`` names, or does not write each turn at one place.
    """
    whole = written(tokenizer, chat, opened=False, field=field)
    mark = next(character for character in map(chr, _PRIVATE_USE) if character not in whole)
    turns = []
    for place, (role, content) in enumerate(chat):
        if role == "assistant" and content.strip():
            turn = _turn(tokenizer, chat, place, whole, mark)
            if turn is None:
                expected = (
                    "chats in which the template writes each turn at one place; where it writes this one is not clear"
                )
                raise InvalidJob.at(field, f"{role}: {content[:40]}", expected)
            turns.append(turn)
    return whole, turns


def _turn(tokenizer: PreTrainedTokenizerBase, chat: Chat, place: int, whole: str, mark: str) -> tuple[int, int] | None:
    """Where the turn at ``place`` stands in the ``whole`` chat: between what stays when it says nothing but ``mark``."""
    begun: Chat = (*chat[:place], ("assistant", mark))
    before, after = _around(tokenizer, (*begun, *chat[place + 1 :]), mark)
    _, closing = _around(tokenizer, begun, mark)
    if after is None or not whole.endswith(after):
        return None
    opened = _accepted(tokenizer, chat[:place], opened=True)
    begin = next((len(text) for text in (opened, before) if text is not None and whole.startswith(text)), None)
    if begin is None:
        return None
    # As the last one a turn may be closed by more, such as the end of the whole text.
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(closing or "", after, strict=False))
    return begin, len(whole) - len(after) + len(list(shared))


def _around(tokenizer: PreTrainedTokenizerBase, chat: Chat, mark: str) -> tuple[str, str] | tuple[None, None]:
    """What the template writes before and after the ``mark`` in a chat; nothing, unless it writes it once."""
    text = _accepted(tokenizer, chat, opened=False)
    if text is None or text.count(mark) != 1:
        return None, None
    before, _, after = text.partition(mark)
    return before, after


def _accepted(tokenizer: PreTrainedTokenizerBase, chat: Chat, opened: bool) -> str | None:
    """A part of a chat by the template, which need not accept a part."""
    try:
        return written(tokenizer, chat, opened, field="")
    except InvalidJob:
        return None
