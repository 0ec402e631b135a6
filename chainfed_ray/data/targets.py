"""Makes a language model's examples from rows: the tokens of each, and which of them the model learns to predict."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainfed_ray.activity import SILENT, Reporter
from chainfed_ray.data.chat_template import apply_template, assistant_spans, check_written
from chainfed_ray.data.messages import Chat
from chainfed_ray.data.sources import Text
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.errors import InvalidJob

Row = tuple[list[int], list[bool]]
"""Token ids, and for each token True if the model is to predict it."""


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    max_length: int,
    reporter: Reporter = SILENT,
    numbers: Sequence[int] = (),
) -> Examples:
    """Tokenise running texts, prompts with responses, or chats.

    Running texts and responses end with the end-of-text token. The model is to predict every token of a running text, of a
    response and of an assistant's turn, including the end; it is to predict none of a prompt. A prompt and its response are
    tokenised as one text, and a token belongs to the part that has its last character. An empty response, or a chat without an
    assistant's turn, has no tokens. Prompts with responses and chats are cut at ``max_length`` tokens; running texts are not,
    see ``packed``.

    The tokenizer must be a fast one unless all texts are running texts, and it needs a template for chats. ``numbers`` are
    those of the texts in their source, by which an error names one.

    Raises:
        InvalidJob: the template does not accept a chat, or does not write each turn at one place.
    """
    rows = list[Row]()
    for text in reporter.each(texts, len(texts), "rows"):
        with _in_row(numbers[len(rows)] if numbers else None):
            rows.append(_row(tokenizer, text, max_length))
    ids = [np.array(row, dtype=np.int32) for row, _ in rows]
    targets = [np.array(wanted, dtype=bool) for _, wanted in rows]
    for wanted in targets:
        wanted[:1] = False  # no token comes before it that could predict it
    return ragged(ids, np.zeros(len(ids), dtype=np.int64), targets)


@contextmanager
def _in_row(number: int | None) -> Iterator[None]:
    """Add to errors in which row they are, if it has a number."""
    try:
        yield
    except InvalidJob as error:
        if number is None:
            raise
        words = f"; this one is in row {number}"
        raise InvalidJob(tuple(each._replace(expected=each.expected + words) for each in error.problems)) from None


def packed(examples: Examples, length: int) -> Examples:
    """Join the tokens of all examples, and cut them into examples of ``length`` without padding.

    The rest is one more example, if it has at least two tokens.
    """
    offsets = np.arange(0, len(examples.ids) + length, length).clip(max=len(examples.ids))
    if len(offsets) > 2 and offsets[-1] - offsets[-2] < 2:
        offsets = offsets[:-1]
    kept = int(offsets[-1])
    whole = Examples(examples.ids[:kept], offsets, np.zeros(len(offsets) - 1, dtype=np.int64))
    return replace(whole, targets=whole.every_token)


def learnable(examples: Examples) -> np.ndarray:
    """The indices of the examples that have a token to predict, [n]."""
    assert examples.targets is not None, "only a language model's examples have targets"
    sums = np.concatenate([[0], np.cumsum(examples.targets)])
    return np.flatnonzero(np.diff(sums[examples.offsets]))


def choice_examples(
    tokenizer: PreTrainedTokenizerBase, prompt: str, choices: Sequence[str], max_length: int
) -> list[Row] | None:
    """A row for each choice, with the prompt's tokens and the choice's; only the choice's are to be predicted.

    If a row is longer than ``max_length``, the prompt loses its beginning. The result is None if the prompt has no token of its
    own, from which the first token of a choice could be predicted.
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
    """The tokens of a text that the model continues. They have the tokenizer's beginning-of-text token, if any, but no end."""
    encoded: Any = tokenizer(text, verbose=False)
    return _without_end(tokenizer, encoded["input_ids"])


def chat_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat, add_generation_prompt: bool, field: str) -> list[int]:
    """The tokens of a chat by the tokenizer's template, which must exist.

    ``add_generation_prompt`` opens an assistant's turn at the end. ``field`` names the chat in errors.

    Raises:
        InvalidJob: the template does not accept the chat, or leaves out a part of it.
    """
    text = apply_template(tokenizer, chat, add_generation_prompt, field)
    check_written(tokenizer, chat, text, add_generation_prompt, field)
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
    """The tokens of a prompt and its response, without an end. The response's tokens are to be predicted.

    Both are tokenised as one text. Some tokenizers begin every text with a space, which does not belong before the response.
    """
    ids, places = _placed(tokenizer, prompt + response, special=True)
    ids = _without_end(tokenizer, ids)
    return ids, [place >= len(prompt) for place in places[: len(ids)]]


def _chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Row:
    text, turns = assistant_spans(tokenizer, chat, field="data.messages")
    ids, places = _placed(tokenizer, text, special=False)
    return ids, [any(begin <= place < end for begin, end in turns) for place in places]


def _placed(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> tuple[list[int], list[int]]:
    """Token ids, and the position in the text of each token's last character."""
    encoded: Any = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    places, reached = [], 0
    for begin, end in encoded["offset_mapping"]:
        # For a token that is only a space, some tokenizers give an empty span at its end.
        places.append(end - 1 if begin < end or reached < end else end)
        reached = max(reached, end)
    return list(encoded["input_ids"]), places


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it to every text
        ids = ids[:-1]
    return ids


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
