"""Questions that come together are answered together, each as if it had come alone."""

import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from chainfed_ray.errors import CorruptCommit, InvalidJob
from chainfed_ray.model.saved_stack import SavedStack, save_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.engine import Engine
from chainfed_ray.serving.messages import ModelKey, Question
from chainfed_ray.serving.questions import Answering, answer_together
from tests.models import a_saved_stack
from tests.watching import wait_for

TEXTS = ["salt tide wave", "worm", "a longer text about ships and stars", "wind"]


@pytest.fixture
def stacks(tiny_model_folder: Path) -> dict[str, SavedStack]:
    return {f"job-{seed}": a_saved_stack(tiny_model_folder, classes=3 + seed, seed=seed) for seed in range(3)}


@pytest.fixture
def engine(stacks: dict[str, SavedStack], tmp_path: Path) -> Engine:
    for job, saved in stacks.items():
        save_stack(saved, tmp_path / job)
    return Engine(lambda model: tmp_path / str(model.job), 2**30)


@pytest.mark.slow
def test_questions_to_many_stacks_are_answered_in_one_pass(
    tiny_model_folder: Path, stacks: dict[str, SavedStack], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, plain, passes = f"path:{tiny_model_folder}", Classifier.of_each, list[int]()

    def counted(self: Classifier, asked: Any) -> Any:
        passes.append(len(asked))
        return plain(self, asked)

    monkeypatch.setattr(Classifier, "of_each", counted)
    jobs = [*stacks, *stacks]
    questions = [Question(ModelKey(base, "float32", job), TEXTS[place % 2 :]) for place, job in enumerate(jobs)]
    answers = engine.classify(questions)
    assert passes == [len(questions)]
    classifier = Classifier(base, torch.float32)
    for question, answer in zip(questions, answers, strict=True):
        expected = classifier.probabilities(stacks[str(question.model.job)], question.texts)
        assert not isinstance(answer, Exception)
        torch.testing.assert_close(torch.tensor(answer), expected, rtol=0, atol=1e-6)


def test_what_one_question_lacks_is_its_own_error(tiny_model_folder: Path, engine: Engine) -> None:
    there = f"path:{tiny_model_folder}"
    questions = [
        Question(ModelKey(there, "float32", "job-0"), TEXTS),
        Question(ModelKey(there, "float32", "job-of-nobody"), TEXTS),
        Question(ModelKey("path:/nowhere", "float32", "job-1"), TEXTS),
        Question(ModelKey(there, "float32", "job-2"), TEXTS),
    ]
    first, no_stack, no_base, last = engine.classify(questions)
    assert isinstance(no_stack, CorruptCommit)
    assert isinstance(no_base, InvalidJob)
    assert isinstance(first, list)
    assert isinstance(last, list)
    assert (len(first), len(last)) == (len(TEXTS), len(TEXTS))


def test_a_text_with_a_token_that_the_model_has_not_is_refused_and_no_other(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    """Gemma 3 has such a token for pictures, of which its model of texts alone has no row."""
    folder, stack = tmp_path / "model", a_saved_stack(tiny_model_folder)
    shutil.copytree(tiny_model_folder, folder)
    words = AutoTokenizer.from_pretrained(folder)
    missing = [f"<extra-{place}>" for place in range(AutoConfig.from_pretrained(folder).vocab_size)]
    words.add_tokens(missing, special_tokens=True)
    words.save_pretrained(folder)
    save_stack(replace(stack, base=f"path:{folder}"), tmp_path / "job")
    engine = Engine(lambda model: tmp_path / str(model.job), 2**30)
    model = ModelKey(f"path:{folder}", "float32", "job")
    questions = [Question(model, TEXTS), Question(model, [f"a {missing[-1]} b"]), Question(model, TEXTS)]
    for work, field in ((engine.classify, "texts"), (engine.embed, "input")):
        first, refused, last = work(questions)
        assert isinstance(refused, InvalidJob)
        assert str(refused).startswith(f"{field} is '{missing[-1]}'; expected a text without it: the model has ")
        assert (len(first), len(last)) == (len(TEXTS), len(TEXTS))


def test_what_fails_all_is_not_tried_for_each() -> None:
    tries = list[int]()

    def answer(base: str, dtype: str, asked: Sequence[Any]) -> list[Any]:
        tries.append(len(asked))
        raise OSError("the disk is gone")

    questions = [Question(ModelKey("path:any", "float32", None), ["a text"])] * 3
    found = answer_together(questions, lambda model: None, answer)
    assert tries == [3]
    assert [str(error) for error in found] == ["the disk is gone"] * 3


def test_what_comes_while_another_is_answered_is_answered_together() -> None:
    """As many texts as may be, what nobody wants any more not at all, and an error is that of those it concerns."""
    answering, go_on, passes = Answering(most_texts=4), Event(), list[list[str]]()

    def lengths(questions: Sequence[Question]) -> list[int | Exception]:
        passes.append([question.texts[0] for question in questions])
        go_on.wait(30)
        if questions[0].texts == ["broken"]:
            raise OSError("broken")
        return [len(question.texts) for question in questions]

    def ask(*texts: str) -> "Future[int]":
        return answering.ask(lengths, Question(ModelKey("base", "float32"), list(texts)))

    first = ask("first")
    wait_for(lambda: passes, "the first pass")
    second, unwanted, third, fourth = ask("a", "a"), ask("b"), ask("c", "c"), ask("d")
    assert unwanted.cancel()
    go_on.set()
    assert [answer.result(30) for answer in (first, second, third, fourth)] == [1, 2, 2, 1]
    assert passes == [["first"], ["a", "c"], ["d"]]
    with pytest.raises(OSError, match="broken"):
        ask("broken").result(30)


def test_a_model_that_went_astray_says_so(
    tiny_model_folder: Path, stacks: dict[str, SavedStack], tmp_path: Path
) -> None:
    """And those who ask another one at the same time are answered."""
    with torch.no_grad():
        next(stacks["job-1"].stack.parameters()).fill_(torch.nan)
    for job, saved in stacks.items():
        save_stack(saved, tmp_path / job)
    engine = Engine(lambda model: tmp_path / str(model.job), 2**30)
    keys = [ModelKey(f"path:{tiny_model_folder}", "float32", job) for job in stacks]
    well, astray, also_well = engine.classify([Question(key, TEXTS) for key in keys])
    assert isinstance(astray, InvalidJob)
    assert isinstance(well, list)
    assert isinstance(also_well, list)


@pytest.mark.slow
@torch.no_grad()
def test_an_embedding_is_the_mean_of_the_models_output(tiny_model_folder: Path, engine: Engine) -> None:
    """Of the base model alone it is what Hugging Face's own code gives; a stack changes it, in the same pass."""
    base = f"path:{tiny_model_folder}"
    alone, tuned = engine.embed(
        [Question(ModelKey(base, "float32"), TEXTS), Question(ModelKey(base, "float32", "job-1"), TEXTS)]
    )
    assert isinstance(alone, list)
    assert isinstance(tuned, list)
    model, tokenizer = AutoModel.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)
    for text, found, other in zip(TEXTS, alone, tuned, strict=True):
        encoded = tokenizer(text, return_tensors="pt")
        mean = model.eval()(**encoded).last_hidden_state[0].mean(0)
        torch.testing.assert_close(torch.tensor(found.values), mean / mean.norm(), rtol=0, atol=1e-6)
        assert found.tokens == encoded["input_ids"].shape[1]
        assert torch.tensor(other.values).norm() == pytest.approx(1)
        assert other.values != found.values
    lone = engine.embed([Question(ModelKey(base, "float32", "job-1"), TEXTS)])[0]
    assert isinstance(lone, list)
    torch.testing.assert_close(torch.tensor([one.values for one in lone]), torch.tensor([one.values for one in tuned]))
