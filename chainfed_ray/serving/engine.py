"""Answers with every model of one process: base models and stacks are loaded when they are asked for, and kept if used."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Condition, Thread

import torch

from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.generator import Emit, Generator
from chainfed_ray.serving.messages import Answer, ModelKey, Prompt, Question, Sampling
from chainfed_ray.serving.questions import answer_together

_MODELS_IN_MEMORY = 2  # for each of the two kinds of work
_STACKS_IN_MEMORY = 256


class Engine:
    """Classifies and writes with stacks; ``folder_of`` says where that of a model is.

    One thread may classify and one may begin texts, at the same time. A thread of its own writes the texts.
    """

    def __init__(self, folder_of: Callable[[ModelKey], Path]) -> None:
        torch.set_num_threads(1)
        self._stack = lru_cache(_STACKS_IN_MEMORY)(lambda model: load_stack(folder_of(model)))
        self._classifier = lru_cache(_MODELS_IN_MEMORY)(lambda base, dtype: Classifier(base, _dtype(dtype)))
        self._generator = lru_cache(_MODELS_IN_MEMORY)(lambda base, dtype: Generator(base, _dtype(dtype)))
        self._writing = list[Generator]()
        self._begun = Condition()
        Thread(target=self._write, name="writing", daemon=True).start()

    def classify(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        """See ``answer_together``."""
        return answer_together(questions, self._stack, self._classifier)

    def begin(
        self, model: ModelKey, prompt: Prompt, sampling: Sampling, emit: Emit, cancelled: Callable[[], bool]
    ) -> None:
        """Load what ``model`` needs, and begin a text with it. See ``Generator.begin``."""
        saved = self._stack(model) if model.job else None
        generator = self._generator(model.base, model.dtype)
        generator.begin(saved, prompt, sampling, emit, cancelled)
        with self._begun:
            if generator not in self._writing:
                self._writing.append(generator)
            self._begun.notify()

    def _write(self) -> None:
        """Let every text grow by a token, again and again; wait while there is none."""
        while True:
            with self._begun:
                self._begun.wait_for(lambda: self._writing)
                generators = list(self._writing)
            for generator in generators:
                if not generator.step():
                    self._rest(generator)

    def _rest(self, generator: Generator) -> None:
        """Leave a generator alone, unless a text was begun in the meantime."""
        with self._begun:
            if generator.is_idle:
                self._writing.remove(generator)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), "a job file's names are torch's"
    return dtype
