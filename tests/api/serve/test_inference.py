"""Questions of many callers go to the process with models in one call, and each gets its own answer, or its own error."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.api.serve.asking import Together
from chainfed_ray.api.serve.inference import Inference
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.errors import ChainFedError
from chainfed_ray.model.saved_stack import save_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.messages import ModelKey, Question
from tests.models import a_saved_stack


def test_each_question_of_a_call_has_its_own_answer(tiny_model_folder: Path, tmp_path: Path) -> None:
    base, storage = f"path:{tiny_model_folder}", Storage.at(tmp_path)
    stacks = {f"job-{seed}": a_saved_stack(tiny_model_folder, classes=3 + seed, seed=seed) for seed in range(3)}
    for job, saved in stacks.items():
        save_stack(saved, storage.model(job))
    inference: Any = Inference.func_or_class(Settings(storage))
    calls = list[int]()

    async def called(questions: list[Question]) -> list[Any]:
        calls.append(len(questions))
        sent: list[Question] = pickle.loads(pickle.dumps(questions))  # as between processes
        return list(pickle.loads(pickle.dumps(await inference.classify(sent))))

    async def ask() -> list[Any]:
        together = Together(lambda questions: asyncio.ensure_future(called(questions)))
        keys = [ModelKey(base, "float32", job) for job in (*stacks, "none", *stacks)]
        broken = ModelKey(base, "float64x", "job-0")
        asked = [Question(key, ["salt tide", f"wave {place}"]) for place, key in enumerate([*keys, broken])]
        return await asyncio.gather(*(together.answer(one) for one in asked), return_exceptions=True)

    answers = asyncio.run(ask())
    assert calls == [8], "questions of the same moment need one call"
    classifier = Classifier(base, torch.float32)
    for place, job in ((0, "job-0"), (1, "job-1"), (2, "job-2"), (4, "job-0"), (5, "job-1"), (6, "job-2")):
        expected = classifier.probabilities(stacks[job], ["salt tide", f"wave {place}"])
        torch.testing.assert_close(torch.tensor(answers[place]), expected, rtol=0, atol=1e-6)
    assert isinstance(answers[3], ChainFedError), "an error of ours stays what it is"
    with pytest.raises(RuntimeError, match="AttributeError"):
        raise answers[7]
