"""Answers with every model of one process: base models and stacks are loaded when they are asked for, within its memory."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import isfinite
from pathlib import Path
from threading import Condition, Thread

import torch

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.hub import resolve
from chainfed_ray.model.blocks import weight_bytes
from chainfed_ray.model.saved_stack import SavedStack, load_stack, stored_bytes
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.generator import Emit, Generator
from chainfed_ray.serving.messages import Embedding, ModelKey, Probabilities, Prompt, Question, Sampling, no_numbers
from chainfed_ray.serving.questions import Asked, answer_together
from chainfed_ray.serving.shelf import Shelf

_FOR_ROWS = 8  # one part in so many of the memory is for the keys and values of the texts of one language model


class Engine:
    """Classifies, embeds and writes with models of ``most_bytes`` together; ``folder_of`` says where a model's stack is.

    One thread may classify and embed, and one may begin texts, at the same time. A thread of its own writes the texts.
    """

    def __init__(self, folder_of: Callable[[ModelKey], Path], most_bytes: int) -> None:
        torch.set_num_threads(1)
        self._folder_of = folder_of
        self._shelf = Shelf(most_bytes)
        self._row_bytes = most_bytes // _FOR_ROWS
        self._writing = list[Generator]()
        self._begun = Condition()
        Thread(target=self._write, name="writing", daemon=True).start()

    def classify(self, questions: Sequence[Question]) -> list[Probabilities | Exception]:
        """The probability of each class for each text of each question. See ``answer_together``."""

        def answer(base: str, dtype: str, asked: Asked) -> list[Probabilities | Exception]:
            stacks = [(saved, texts) for saved, texts in asked if saved]
            assert len(stacks) == len(asked), "a base model alone has no classes"
            with self._encoder(base, dtype) as encoder:
                found = encoder.of_each(stacks)
            return [each.tolist() if each.isfinite().all() else no_numbers() for each in found]

        return answer_together(questions, self._stack, answer)

    def embed(self, questions: Sequence[Question]) -> list[list[Embedding] | Exception]:
        """The embedding of each text of each question. See ``answer_together``."""

        def answer(base: str, dtype: str, asked: Asked) -> list[list[Embedding] | Exception]:
            with self._encoder(base, dtype) as encoder:
                found = encoder.embeddings(asked)
            return [each if all(map(isfinite, each[0].values)) else no_numbers() for each in found]

        return answer_together(questions, self._stack, answer)

    def begin(
        self, model: ModelKey, prompt: Prompt, sampling: Sampling, emit: Emit, cancelled: Callable[[], bool]
    ) -> None:
        """Load what ``model`` needs, and begin a text with it. See ``Generator.begin``."""
        saved = self._stack(model)
        with self._generator(model.base, model.dtype) as generator:
            generator.begin(saved, prompt, sampling, emit, cancelled)
        with self._begun:
            if generator not in self._writing:
                self._writing.append(generator)
            self._begun.notify()

    def _stack(self, model: ModelKey) -> SavedStack | None:
        """The stack of a model, as it is now: the folder of a job that trains is replaced after each round."""
        if model.job is None:
            return None
        try:
            return self._loaded(self._folder_of(model))
        except CorruptCommit:  # it was replaced while it was read
            return self._loaded(self._folder_of(model))

    def _loaded(self, folder: Path) -> SavedStack:
        version = folder.stat().st_mtime_ns if folder.exists() else None
        with self._shelf.using((folder, version), lambda: stored_bytes(folder), lambda: load_stack(folder)) as saved:
            found: SavedStack = saved
            return found

    def _encoder(self, base: str, dtype: str) -> AbstractContextManager[Classifier]:
        return self._shelf.using(
            ("encoder", base, dtype),
            lambda: weight_bytes(resolve(base), _dtype(dtype)),
            lambda: Classifier(base, _dtype(dtype)),
        )

    def _generator(self, base: str, dtype: str) -> AbstractContextManager[Generator]:
        return self._shelf.using(
            ("generator", base, dtype),
            lambda: weight_bytes(resolve(base), _dtype(dtype)) + self._row_bytes,
            lambda: Generator(base, _dtype(dtype), row_bytes=self._row_bytes),
        )

    def _write(self) -> None:
        """Let every text grow by a token, again and again; wait while there is none."""
        while True:
            with self._begun:
                self._begun.wait_for(lambda: self._writing)
            self._step()  # a function of its own, which holds no model while this one waits

    def _step(self) -> None:
        with self._begun:
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
