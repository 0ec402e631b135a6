"""Multiple choice, in the form of MMLU: which of its answers does a model hold for the likeliest after a question?

A row has a ``prompt``, a list of ``choices`` (in a file without lists, such as CSV, as JSON) and the ``answer``: its place,
counted from 0, or the choice itself. A model's choice is the one of which all tokens together are the likeliest.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from chainfed_ray.cells import as_list
from chainfed_ray.data import read_table
from chainfed_ray.errors import InvalidJob
from chainfed_ray.targets import Row, choice_examples
from chainfed_ray.tokens import Examples, ragged

_KEY = "evaluation.choices"
_COLUMNS = ("prompt", "choices", "answer")


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
    for name in _COLUMNS:
        if name not in table.columns:
            expected = f"a table with the columns {', '.join(_COLUMNS)}; it has {', '.join(map(str, table.columns))}"
            raise InvalidJob.at(_KEY, source, expected)
    rows: list[Row] = []
    begins, answers = [0], list[int]()
    columns = (table[name] for name in _COLUMNS)
    for number, (prompt, given, answer) in enumerate(zip(*columns, strict=True), start=1):
        choices = _choices(given)
        place = _place(answer, choices) if choices else None
        if not choices or place is None or not isinstance(prompt, str) or not prompt:
            expected = "a `prompt`, two or more `choices` and an `answer` that is one of them, or its place from 0"
            raise InvalidJob.at(_KEY, source, f"{expected}, in every row; not so in row {number}")
        rows += choice_examples(tokenizer, prompt, choices, max_length)
        begins.append(len(rows))
        answers.append(place)
    ids = [np.array(ids, dtype=np.int32) for ids, _ in rows]
    targets = [np.array(wanted, dtype=bool) for _, wanted in rows]
    return Choices(ragged(ids, np.zeros(len(ids), dtype=np.int64), targets), tuple(begins), tuple(answers))


def _choices(cell: Any) -> list[str]:
    """The choices in a cell; none if they are not two or more texts."""
    given = as_list(cell) or []
    return given if len(given) > 1 and all(isinstance(item, str) and item for item in given) else []


def _place(answer: Any, choices: list[str]) -> int | None:
    """Where the answer is among the choices."""
    if isinstance(answer, str):
        if answer in choices:
            return choices.index(answer)
        answer = int(answer) if answer.isdecimal() else -1
    whole = int(answer) if float(answer).is_integer() else -1
    return whole if 0 <= whole < len(choices) else None
