"""What a language model reads of a row, and which of its tokens it is to predict."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainfed_ray.chats import Chat
from chainfed_ray.data import Text
from chainfed_ray.errors import InvalidJob
from chainfed_ray.tokens import Examples, ragged

Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are to be predicted."""


def tokenize_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int) -> Examples:
    """The examples of running texts, of prompts with their responses, or of chats; each ends with the end-of-text token.

    Of a response and of what an assistant says every token is to be predicted, and the end after it; of a prompt none. What
    comes after ``max_length`` tokens is cut off. Running texts stay whole: see ``packed``.

    Raises:
        InvalidJob: the tokenizer has no chat template, or one that cannot be followed from message to message.
    """
    rows = [_row(tokenizer, text, max_length) for text in texts]
    ids = [np.array(row or [0], dtype=np.int32) for row, _ in rows]
    targets = [np.array(wanted or [False], dtype=bool) for _, wanted in rows]
    for wanted in targets:
        wanted[0] = False  # there is nothing by which it could be predicted
    return ragged(ids, np.zeros(len(ids), dtype=np.int64), targets)


def packed(examples: Examples, length: int) -> Examples:
    """The same tokens end to end, cut into examples of ``length``: no padding, and no text is too long. What is left over is
    an example, too, if there are two tokens of it.
    """
    offsets = np.arange(0, len(examples.ids) + length, length).clip(max=len(examples.ids))
    if len(offsets) > 2 and offsets[-1] - offsets[-2] < 2:
        offsets = offsets[:-1]
    kept = int(offsets[-1])
    whole = Examples(examples.ids[:kept], offsets, np.zeros(len(offsets) - 1, dtype=np.int64))
    return replace(whole, targets=whole.every_token)


def learnable(examples: Examples) -> np.ndarray:
    """The indices of the examples of which something is to be predicted, [n]."""
    assert examples.targets is not None, "only those of a language model have targets"
    sums = np.concatenate([[0], np.cumsum(examples.targets)])
    return np.flatnonzero(np.diff(sums[examples.offsets]))


def choice_examples(
    tokenizer: PreTrainedTokenizerBase, prompt: str, choices: Sequence[str], max_length: int
) -> list[Row]:
    """A question with each of its answers, of which the answer's tokens are to be predicted; a long prompt loses its begin."""
    begun = prompt_ids(tokenizer, prompt)
    rows = []
    for choice in choices:
        answer = _ids(tokenizer, choice)[: max_length - 1]
        kept = begun[-(max_length - len(answer)) :]
        rows.append((kept + answer, [False] * len(kept) + [True] * len(answer)))
    return rows


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before it, and without an end."""
    encoded: Any = tokenizer(text, verbose=False)
    ids: list[int] = encoded["input_ids"]
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    return ids


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, opened: bool, field: str) -> list[int]:
    """The tokens of a chat by the tokenizer's template, which there has to be; ``opened`` for the assistant's turn.

    Raises:
        InvalidJob: the template does not accept the chat, which ``field`` names.
    """
    messages = [{"role": role, "content": content} for role, content in chat]
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=opened, return_dict=True
        )
    except Exception as error:  # a template raises what it likes, such as for roles that do not take turns
        newest = messages[-1] if messages else None
        raise InvalidJob.at(field, newest, f"a chat that the model's template accepts ({error})") from None
    return list(encoded["input_ids"])


def _row(tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int) -> Row:
    if isinstance(text, str):
        ids = prompt_ids(tokenizer, text) + _end(tokenizer)
        return ids, [True] * len(ids)
    if isinstance(text[0], str):
        prompt, response = prompt_ids(tokenizer, text[0]), _ids(tokenizer, str(text[1]))
        response += _end(tokenizer)
        ids, targets = prompt + response, [False] * len(prompt) + [True] * len(response)
    else:
        ids, targets = _chat(tokenizer, text)  # type: ignore[arg-type]
    return ids[:max_length], targets[:max_length]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Row:
    """What an assistant says is what the template adds to the chat before it, once it is the assistant's turn."""
    if not tokenizer.chat_template:
        raise InvalidJob.at("data.messages", None, "a model whose tokenizer has a chat template; this one has none")
    whole = chat_ids(tokenizer, chat, opened=False, field="data.messages")
    targets = [False] * len(whole)
    for place, (role, content) in enumerate(chat):
        if role == "assistant":
            before = chat_ids(tokenizer, chat[:place], opened=True, field="data.messages")
            after = chat_ids(tokenizer, chat[: place + 1], opened=False, field="data.messages")
            if after[: len(before)] != before or whole[: len(after)] != after:
                expected = "chats for whose tokenizer each message only adds to those before it; its template does more"
                raise InvalidJob.at("data.messages", f"{role}: {content[:40]}", expected)
            targets[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, targets
