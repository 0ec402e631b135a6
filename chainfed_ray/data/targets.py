"""What a language model reads of a row, and which of its tokens it is to predict."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.data.chat_template import spoken, written
from chainfed_ray.data.chats import Chat
from chainfed_ray.data.sources import Text
from chainfed_ray.data.tokens import Examples, ragged

Row = tuple[list[int], list[bool]]
"""Token ids, and which of them are to be predicted."""


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], max_length: int, reporter: Reporter = SILENT
) -> Examples:
    """The examples of running texts, of prompts with their responses, or of chats.

    Running texts, and responses, end with the end-of-text token. Of a response and of what an assistant says every token is
    to be predicted, and the end after it; of a prompt none. A prompt and its response are read as one text: a token belongs to
    where its last character is. Of an empty response, and of a chat in which no assistant speaks, there are no tokens. What
    comes after ``max_length`` tokens is cut off; running texts stay whole: see ``packed``.

    The tokenizer has to be a fast one, unless all texts are running texts, and for chats it needs a template.

    Raises:
        InvalidJob: the template does not accept a chat, or does not write each turn at one place.
    """
    rows = [_row(tokenizer, text, max_length) for text in reporter.each(texts, len(texts), "rows")]
    ids = [np.array(row, dtype=np.int32) for row, _ in rows]
    targets = [np.array(wanted, dtype=bool) for _, wanted in rows]
    for wanted in targets:
        wanted[:1] = False  # there is nothing by which it could be predicted
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
) -> list[Row] | None:
    """A question with each of its answers, of which the answer's tokens are to be predicted; a long prompt loses its begin.

    None if the prompt has no token of its own, by which an answer's first one could be predicted.
    """
    rows = []
    for choice in choices:
        ids, wanted = _joined(tokenizer, prompt, choice)
        begin = wanted.index(True) if True in wanted else len(ids)
        if not 0 < begin < len(ids):
            return None
        answer = ids[begin:][: max_length - 1]
        kept = ids[:begin][-(max_length - len(answer)) :]
        rows.append((kept + answer, [False] * len(kept) + [True] * len(answer)))
    return rows


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before it, and without an end."""
    encoded: Any = tokenizer(text, verbose=False)
    return _without_end(tokenizer, encoded["input_ids"])


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, opened: bool, field: str) -> list[int]:
    """The tokens of a chat by the tokenizer's template, which there has to be; ``opened`` for the assistant's turn.

    Raises:
        InvalidJob: the template does not accept the chat, which ``field`` names.
    """
    text = written(tokenizer, chat, opened, field)
    encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
    return list(encoded["input_ids"])


def _row(tokenizer: PreTrainedTokenizerBase, text: Text, max_length: int) -> Row:
    if isinstance(text, str):
        ids = prompt_ids(tokenizer, text) + _end(tokenizer)
        return ids, [True] * len(ids)
    if not text:
        return [], []
    ids, targets = (
        _answered(tokenizer, text[0], str(text[1])) if isinstance(text[0], str) else _chat(tokenizer, text)  # type: ignore[arg-type]
    )
    return ids[:max_length], targets[:max_length]


def _answered(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Row:
    if not response.strip():
        return [], []
    ids, targets = _joined(tokenizer, prompt, response)
    end = _end(tokenizer)
    return ids + end, targets + [True] * len(end)


def _joined(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Row:
    """The tokens of both, read as one text without an end; those of the response are to be predicted.

    Some tokenizers begin every text with a space: a response read by itself would get one that is not its own.
    """
    ids, places = _placed(tokenizer, prompt + response, special=True)
    ids = _without_end(tokenizer, ids)
    return ids, [place >= len(prompt) for place in places[: len(ids)]]


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Row:
    text, turns = spoken(tokenizer, chat, field="data.messages")
    ids, places = _placed(tokenizer, text, special=False)
    return ids, [any(begin <= place < end for begin, end in turns) for place in places]


def _placed(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> tuple[list[int], list[int]]:
    """Token ids, and where in the text the last character of each is."""
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    places, reached = [], 0
    for begin, end in encoded["offset_mapping"]:
        # Of a token that is nothing but a space some tokenizers leave only the end.
        places.append(end - 1 if begin < end or reached < end else end)
        reached = max(reached, end)
    return list(encoded["input_ids"]), places


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    return ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
