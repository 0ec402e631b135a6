"""Answers questions to encoders that come at about the same time in one pass for each base model, whatever their stacks."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.messages import ModelKey, Question

Answer = TypeVar("Answer")
Asked = list[tuple[SavedStack | None, list[str]]]
"""Texts, each part of them with its stack, or for the base model alone."""


def answer_together(
    questions: Sequence[Question],
    stack_of: Callable[[ModelKey], SavedStack | None],
    answer: Callable[[str, str, Asked], Sequence[Answer | Exception]],
) -> list[Answer | Exception]:
    """The answer to each question, or the error because of which it has none.

    ``stack_of`` loads the stack of a model, and ``answer`` answers with a base model in a dtype. What they raise fails the
    questions that need it, and no others.
    """
    answers: dict[int, Answer | Exception] = {}
    loaded = defaultdict[tuple[str, str], dict[int, SavedStack | None]](dict)
    for place, question in enumerate(questions):
        try:
            loaded[question.model.base, question.model.dtype][place] = stack_of(question.model)
        except Exception as error:
            answers[place] = error
    for (base, dtype), stacks in loaded.items():
        asked = [(saved, questions[place].texts) for place, saved in stacks.items()]
        try:
            answers |= zip(stacks, answer(base, dtype, asked), strict=True)
        except Exception as error:
            answers |= dict.fromkeys(stacks, error)
    return [answers[place] for place in range(len(questions))]
