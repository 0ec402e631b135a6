"""Answers questions to classifiers that come at about the same time in one pass for each base model, whatever their stacks."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.messages import Answer, ModelKey, Question


def answer_together(
    questions: Sequence[Question],
    stack_of: Callable[[ModelKey], SavedStack],
    classifier_on: Callable[[str, str], Classifier],
) -> list[Answer | Exception]:
    """The answer to each question, or the error because of which it has none.

    ``stack_of`` loads the stack of a model, and ``classifier_on`` a base model in a dtype. What they raise fails the questions
    that need it, and no others.
    """
    answers: list[Answer | Exception] = [[] for _ in questions]
    loaded = defaultdict[tuple[str, str], dict[int, SavedStack]](dict)
    for place, question in enumerate(questions):
        try:
            loaded[question.model.base, question.model.dtype][place] = stack_of(question.model)
        except Exception as error:
            answers[place] = error
    for (base, dtype), stacks in loaded.items():
        asked = [(saved, questions[place].texts) for place, saved in stacks.items()]
        try:
            found = classifier_on(base, dtype).of_each(asked)
        except Exception as error:
            answers = [error if place in stacks else answer for place, answer in enumerate(answers)]
            continue
        for place, probabilities in zip(stacks, found, strict=True):
            answers[place] = probabilities.tolist()
    return answers
