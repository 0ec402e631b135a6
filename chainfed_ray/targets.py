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
    begun = _ids(tokenizer, prompt, special=True)
    rows = []
    for choice in choices:
        answer = _ids(tokenizer, choice, special=False)[: max_length - 1]
        kept = begun[-(max_length - len(answer)) :]
        rows.append((kept + answer, [False] * len(kept) + [True] * len(answer)))
    return rows


def _row(tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int) -> Row:
    if isinstance(text, str):
        ids = _ids(tokenizer, text, special=True) + _end(tokenizer)
        return ids, [True] * len(ids)
    if isinstance(text[0], str):
        prompt, response = _ids(tokenizer, text[0], special=True), _ids(tokenizer, str(text[1]), special=False)
        response += _end(tokenizer)
        ids, targets = prompt + response, [False] * len(prompt) + [True] * len(response)
    else:
        ids, targets = _chat(tokenizer, text)  # type: ignore[arg-type]
    return ids[:max_length], targets[:max_length]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=special, verbose=False)
    ids: list[int] = encoded["input_ids"]
    # The end comes where we put it; some tokenizers have put one after every text.
    while special and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Row:
    """What an assistant says is what the template adds to the chat before it, once it is the assistant's turn."""
    messages = [{"role": role, "content": content} for role, content in chat]
    whole = _templated(tokenizer, messages, opened=False)
    targets = [False] * len(whole)
    for place, (role, _) in enumerate(chat):
        if role == "assistant":
            before = _templated(tokenizer, messages[:place], opened=True)
            after = _templated(tokenizer, messages[: place + 1], opened=False)
            if after[: len(before)] != before or whole[: len(after)] != after:
                expected = "chats for whose tokenizer each message only adds to those before it; its template does more"
                raise InvalidJob.at("data.messages", f"{role}: {chat[place][1][:40]}", expected)
            targets[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, targets


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], opened: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidJob.at("data.messages", None, "a model whose tokenizer has a chat template; this one has none")
    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=opened, return_dict=True
        )
    except Exception as error:  # a template raises what it likes, such as for roles that do not take turns
        raise InvalidJob.at("data.messages", messages[-1], f"a chat that its template accepts ({error})") from None
    ids: list[int] = encoded["input_ids"]
    return ids
