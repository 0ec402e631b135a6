"""Multiple-choice tests in the form of MMLU: how often does a model find the right answer the most likely?

A row has a ``prompt`` (or a ``question``, if no column is called prompt), a list of ``choices`` (as JSON in files such as CSV)
and the ``answer``: the choice itself, its index from 0, or its letter from A. The model's choice is the one whose tokens have
the highest joint probability after the prompt.
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
from chainfed_ray.data.tables import shown
from chainfed_ray.data.targets import Row, choice_examples
from chainfed_ray.data.tokens import Examples, ragged
from chainfed_ray.errors import InvalidJob
from chainfed_ray.problem import some_of

_KEY = "evaluation.choices"
_MOST_DIGITS = 9  # of an answer's place: with so many it is beyond all choices, and Python reads no number of thousands


@dataclass(frozen=True)
class Choices:
    """The examples of a multiple-choice test: one for each choice of each question.

    Question i has the examples ``begins[i]`` … ``begins[i + 1] - 1``; ``begins`` is [q + 1].
    """

    examples: Examples
    begins: tuple[int, ...]
    answers: tuple[int, ...]  # [q], indices within a question's choices

    def accuracy(self, losses: Tensor) -> float:
        """The share of questions whose answer has the lowest loss. ``losses`` [n] are the negative log-likelihoods of all
        choices.
        """
        questions = zip(self.begins[:-1], self.begins[1:], self.answers, strict=True)
        right = [int(losses[first:end].argmin()) == answer for first, end, answer in questions]
        return sum(right) / len(right)


def read_choices(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Choices:
    """Read the test at ``source``, a `path:…` or `hf:…`; from the hub it reads the test split.

    Raises:
        InvalidJob: the source cannot be read, or a row is not a question with choices and an answer.
    """
    table = read_table(_KEY, source, "test")
    prompt_column = "prompt" if "prompt" in table.names else "question"
    columns = (prompt_column, "choices", "answer")
    if not set(columns) <= set(table.names):
        expected = "a table with the columns prompt (or question), choices and answer; it has "
        raise InvalidJob.at(_KEY, source, expected + some_of(table.names))
    rows: list[Row] = []
    begins, answers = [0], list[int]()
    for number, (prompt, given, answer) in enumerate(
        zip(*(table.columns[name] for name in columns), strict=True), start=1
    ):
        if not isinstance(prompt, str) or not prompt:
            raise _wrong(source, number, prompt_column, prompt, "a text")
        choices = _choices(given)
        if not choices:
            raise _wrong(source, number, "choices", given, "a list of two texts or more")
        place = _answer_index(answer, choices)
        if place is None:
            expected = f"one of the {len(choices)} choices, its place from 0, or its letter from A,"
            raise _wrong(source, number, "answer", answer, expected)
        examples = choice_examples(tokenizer, prompt, choices, max_length)
        if examples is None:
            raise _wrong(
                source, number, prompt_column, prompt, "a text with a token of its own, not merged with a choice's"
            )
        rows += examples
        begins.append(len(rows))
        answers.append(place)
    ids = [np.array(ids, dtype=np.int32) for ids, _ in rows]
    targets = [np.array(wanted, dtype=bool) for _, wanted in rows]
    return Choices(ragged(ids, np.zeros(len(ids), dtype=np.int64), targets), tuple(begins), tuple(answers))


def _wrong(source: str, number: int, column: str, value: Any, expected: str) -> InvalidJob:
    return InvalidJob.at(
        _KEY, source, f"{expected} as the {column} of every row; that of row {number} is {shown(value)}"
    )


def _choices(cell: Any) -> list[str]:
    """The choices in a cell, or an empty list unless the cell holds two or more texts."""
    given = as_list(cell) or []
    return given if len(given) > 1 and all(isinstance(item, str) and item for item in given) else []


def _answer_index(answer: Any, choices: list[str]) -> int | None:
    """The index of the answer among the choices, or None if it is not one of them."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        if answer.isdecimal():
            answer = int(answer[:_MOST_DIGITS])
        else:
            answer = ascii_uppercase.index(answer) if len(answer) == 1 and answer in ascii_uppercase else -1
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, Integral):
        return None
    place = int(answer)
    return place if 0 <= place < len(choices) else None
