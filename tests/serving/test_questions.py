"""Questions that come together are answered together, each as if it had come alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.errors import InvalidJob
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.messages import ModelKey, Question
from chainfed_ray.serving.questions import answer_together
from tests.models import a_saved_stack

TEXTS = ["salt tide wave", "worm", "a longer text about ships and stars", "wind"]


def of_job(stacks: dict[str, SavedStack]) -> Callable[[ModelKey], SavedStack]:
    return lambda model: stacks[str(model.job)]


@pytest.fixture
def stacks(tiny_model_folder: Path) -> dict[str, SavedStack]:
    return {f"job-{seed}": a_saved_stack(tiny_model_folder, classes=3 + seed, seed=seed) for seed in range(3)}


def test_questions_to_many_stacks_are_answered_in_one_pass(
    tiny_model_folder: Path, stacks: dict[str, SavedStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, plain, passes = f"path:{tiny_model_folder}", Classifier.of_each, list[int]()

    def counted(self: Classifier, asked: Any) -> Any:
        passes.append(len(asked))
        return plain(self, asked)

    monkeypatch.setattr(Classifier, "of_each", counted)
    classifier = Classifier(base, torch.float32)
    questions = [
        Question(ModelKey(base, "float32", job), TEXTS[place % 2 :]) for place, job in enumerate([*stacks, *stacks])
    ]
    answers = answer_together(questions, of_job(stacks), lambda base, dtype: classifier)
    assert passes == [len(questions)]
    for question, answer in zip(questions, answers, strict=True):
        expected = classifier.probabilities(stacks[str(question.model.job)], question.texts)
        assert not isinstance(answer, Exception)
        torch.testing.assert_close(torch.tensor(answer), expected, rtol=0, atol=1e-6)


def test_what_one_question_lacks_is_its_own_error(tiny_model_folder: Path, stacks: dict[str, SavedStack]) -> None:
    def load(base: str, dtype: str) -> Classifier:
        return Classifier(base, getattr(torch, dtype))

    there = f"path:{tiny_model_folder}"
    questions = [
        Question(ModelKey(there, "float32", "job-0"), TEXTS),
        Question(ModelKey(there, "float32", "job-of-nobody"), TEXTS),
        Question(ModelKey("path:/nowhere", "float32", "job-1"), TEXTS),
        Question(ModelKey(there, "float32", "job-2"), TEXTS),
    ]
    first, no_stack, no_base, last = answer_together(questions, of_job(stacks), load)
    assert isinstance(no_stack, KeyError)
    assert isinstance(no_base, InvalidJob)
    assert isinstance(first, list)
    assert isinstance(last, list)
    assert (len(first), len(last)) == (len(TEXTS), len(TEXTS))
