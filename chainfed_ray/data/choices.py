"""Multiple choice, in the form of MMLU: which of its answers does a model hold for the likeliest after a question?

A row has a ``prompt`` (or, where no column is called so, a ``question``), a list of ``choices`` (in a file without lists, such
as CSV, as JSON) and the ``answer``: the choice itself, its place, counted from 0, or its letter, counted from A. A model's
choice is the one of which all tokens together are the likeliest.
"""

from dataclasses import dataclass
from numbers import Integral
from string import ascii_uppercase
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chainfed_ray.data.cells import as_list
from chainfed_ray.data.sources import read_table
from chainfed_ray.data.targets import Row, choice_examples
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.errors import InvalidJob

_KEY = "evaluation.choices"


@dataclass(frozen=True)
class Choices:
    """An example for each choice of each question; ``begins`` [q + 1] are the places where a question's examples begin."""

    examples: Examples
    begins: tuple[int, ...]
    answers: tuple[int, ...]  # [q], places within a question's choices

    def accuracy(self, losses: Tensor) -> float:
        """The share of questions whose answer has the least of ``losses``, the negative log-likelihoods [n] of all choices."""
        questions = zip(self.begins[:-1], self.begins[1:], self.answers, strict=True)
        right = [int(losses[first:end].argmin()) == answer for first, end, answer in questions]
        return sum(right) / len(right)


def read_choices(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Choices:
    """The test at ``source``: `path:…` or `hf:…`, of which the test split is read.

    Raises:
        InvalidJob: it cannot be read, or a row is no question with an answer.
    """
    table = read_table(_KEY, source, "test")
    asked = "prompt" if "prompt" in table.columns else "question"
    columns = (asked, "choices", "answer")
    if not set(columns) <= set(table.columns):
        expected = "a table with the columns prompt (or question), choices and answer; it has "
        raise InvalidJob.at(_KEY, source, expected + ", ".join(map(str, table.columns)))
    rows: list[Row] = []
    begins, answers = [0], list[int]()
    for number, (prompt, given, answer) in enumerate(zip(*(table[name] for name in columns), strict=True), start=1):
        if not isinstance(prompt, str) or not prompt:
            raise _wrong(source, number, asked, prompt, "a text")
        choices = _choices(given)
        if not choices:
            raise _wrong(source, number, "choices", given, "a list of two texts or more")
        place = _place(answer, choices)
        if place is None:
            expected = f"one of the {len(choices)} choices, its place from 0, or its letter from A,"
            raise _wrong(source, number, "answer", answer, expected)
        examples = choice_examples(tokenizer, prompt, choices, max_length)
        if examples is None:
            raise _wrong(source, number, asked, prompt, "a text with a token that none of its choices is joined to")
        rows += examples
        begins.append(len(rows))
        answers.append(place)
    ids = [np.array(ids, dtype=np.int32) for ids, _ in rows]
    targets = [np.array(wanted, dtype=bool) for _, wanted in rows]
    return Choices(ragged(ids, np.zeros(len(ids), dtype=np.int64), targets), tuple(begins), tuple(answers))


def _wrong(source: str, number: int, column: str, value: Any, expected: str) -> InvalidJob:
    shown = repr(value)[:80]
    return InvalidJob.at(_KEY, source, f"{expected} as the {column} of every row; that of row {number} is {shown}")


def _choices(cell: Any) -> list[str]:
    """The choices in a cell; none if they are not two or more texts."""
    given = as_list(cell) or []
    return given if len(given) > 1 and all(isinstance(item, str) and item for item in given) else []


def _place(answer: Any, choices: list[str]) -> int | None:
    """Where the answer is among the choices."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if answer.isdecimal():
            answer = int(answer)
        else:
            answer = ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else -1
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # a column of a table in which some cells are empty has no whole numbers
    if isinstance(answer, bool) or not isinstance(answer, Integral):
        return None
    place = int(answer)
    return place if 0 <= place < len(choices) else None
