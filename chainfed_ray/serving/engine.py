"""Answers with every model of one process: base models and stacks are loaded when they are asked for, within its memory.

A base model is in memory once, whatever is done with it: it classifies, embeds and writes, also with its lowest layers alone.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import isfinite
from pathlib import Path
from threading import Condition, Lock, Thread
from typing import NamedTuple

import torch

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.model.blocks import weight_bytes
from chainfed_ray.model.saved_stack import SavedStack, load_stack, stored_bytes
from chainfed_ray.model.source import weights_folder
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.generator import Emit, Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import Embedding, ModelKey, Probabilities, Prompt, Question, Sampling, no_numbers
from chainfed_ray.serving.questions import Asked, answer_together
from chainfed_ray.serving.shelf import Shelf

_FOR_ROWS = 8  # one part in so many of the memory is for the keys and values of the texts of one language model


class _Extent(NamedTuple):
    """How much of a base model is in memory: its lowest ``layers``, or all if that is None; and whether it ``writes``.

    A model that writes has its embeddings and its head in memory, too.
    """

    layers: int | None
    writes: bool = False

    @classmethod
    def of(cls, asked: Iterable[tuple[SavedStack | None, object]]) -> "_Extent":
        """What is needed to classify or embed with these stacks."""
        counts = [saved.run_layers if saved else None for saved, _ in asked]
        return cls(None if None in counts else max(count for count in counts if count is not None))

    def with_all(self, others: "Iterable[_Extent]") -> "_Extent":
        """What has all that this one and the ``others`` have."""
        found = [self, *others]
        counts = [extent.layers for extent in found if extent.layers is not None]
        return _Extent(max(counts) if len(counts) == len(found) else None, any(extent.writes for extent in found))

    def covers(self, other: "_Extent") -> bool:
        """True if nothing of the other one is missing here."""
        return self.with_all([other]) == self


class _Base:
    """The part ``extent`` of the base model ``base``.

    One thread may classify, and one begin texts, at the same time; a third one may write them. All texts together have
    ``row_bytes`` for their keys and values.

    Raises:
        InvalidJob: there is no such base model.
    """

    def __init__(self, base: str, dtype: torch.dtype, extent: _Extent, row_bytes: int) -> None:
        self._base, self._dtype, self._extent, self._row_bytes = base, dtype, extent, row_bytes
        self._writer = LanguageModel(base, dtype, extent.layers) if extent.writes else None
        self._generators: dict[int | None, Generator] = {}
        if self._writer is None:
            self.classifier  # noqa: B018  it is loaded now

    @cached_property
    def classifier(self) -> Classifier:
        """What classifies and embeds. It uses the layers of the language model, if there is one."""
        held = self._writer.layers if self._writer else None
        return Classifier(self._base, self._dtype, self._extent.layers, held)

    def generator(self, layers: int | None) -> Generator:
        """What writes with the lowest ``layers``, or with all."""
        if (found := self._generators.get(layers)) is None:
            assert self._writer is not None, "it was loaded to write"
            whole = layers == self._extent.layers
            model = self._writer if whole else LanguageModel(self._base, self._dtype, layers, self._writer)
            others = list(self._generators.values())
            found = Generator(model, row_bytes=self._row_bytes)
            for other in others:
                other.share_with(found)
            # A dictionary of its own: the thread that writes may be reading the other one.
            self._generators = {**self._generators, layers: found}
        return found

    @property
    def is_idle(self) -> bool:
        """True if no text is written."""
        return all(generator.is_idle for generator in self._generators.values())


class Engine:
    """Classifies, embeds and writes with models of ``most_bytes`` together; ``folder_of`` says where a model's stack is.

    One thread may classify and embed, and one may begin texts, at the same time. A thread of its own writes the texts.
    """

    def __init__(self, folder_of: Callable[[ModelKey], Path], most_bytes: int) -> None:
        torch.set_num_threads(1)
        self._folder_of = folder_of
        self._shelf = Shelf(most_bytes)
        self._row_bytes = most_bytes // _FOR_ROWS
        self._extents, self._choosing = defaultdict[tuple[str, str], set[_Extent]](set), Lock()
        self._writing = list[Generator]()
        self._begun = Condition()
        Thread(target=self._write, name="writing", daemon=True).start()

    @property
    def held_bytes(self) -> int:
        """The bytes of all base models and stacks in memory, and of the keys and values of texts, as far as they may grow."""
        return self._shelf.held_bytes

    @property
    def loads(self) -> int:
        """How often a base model or a stack was loaded."""
        return self._shelf.loaded

    def classify(self, questions: Sequence[Question]) -> list[Probabilities | Exception]:
        """The probability of each class for each text of each question. See ``answer_together``."""

        def answer(base: str, dtype: str, asked: Asked) -> list[Probabilities | Exception]:
            stacks = [(saved, texts) for saved, texts in asked if saved]
            assert len(stacks) == len(asked), "a base model alone has no classes"
            with self._base(base, dtype, _Extent.of(asked)) as held:
                found = held.classifier.of_each(stacks)
            return [each.tolist() if each.isfinite().all() else no_numbers() for each in found]

        return answer_together(questions, self._stack, answer)

    def embed(self, questions: Sequence[Question]) -> list[list[Embedding] | Exception]:
        """The embedding of each text of each question. See ``answer_together``."""

        def answer(base: str, dtype: str, asked: Asked) -> list[list[Embedding] | Exception]:
            with self._base(base, dtype, _Extent.of(asked)) as held:
                found = held.classifier.embeddings(asked)
            return [each if all(map(isfinite, each[0].values)) else no_numbers() for each in found]

        return answer_together(questions, self._stack, answer)

    def begin(
        self, model: ModelKey, prompt: Prompt, sampling: Sampling, emit: Emit, cancelled: Callable[[], bool]
    ) -> None:
        """Load what ``model`` needs, and begin a text with it. See ``Generator.begin``."""
        saved = self._stack(model)
        layers = saved.run_layers if saved else None
        with self._base(model.base, model.dtype, _Extent(layers, writes=True)) as held:
            generator = held.generator(layers)
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

    @contextmanager
    def _base(self, base: str, dtype: str, wanted: _Extent) -> Iterator[_Base]:
        """A base model, of which at least what is ``wanted`` is in memory.

        If less of it is there, it is loaded anew, with all that is used of it. Then the part goes, once nobody uses it.
        """
        with self._choosing:
            held = {extent for extent in self._extents[base, dtype] if self._shelf.holds((base, dtype, extent))}
        chosen = next((extent for extent in held if extent.covers(wanted)), None) or wanted.with_all(held)
        if chosen not in held and self._bytes(base, dtype, chosen) > self._shelf.most_bytes:
            chosen = wanted  # what is there makes room
        with self._choosing:
            self._extents[base, dtype].add(chosen)
        with self._shelf.using(
            (base, dtype, chosen),
            lambda: self._bytes(base, dtype, chosen),
            lambda: _Base(base, _dtype(dtype), chosen, self._row_bytes),
        ) as found:
            with self._choosing:  # others may have been chosen at the same time
                others = self._extents[base, dtype] - {chosen}
            for extent in others:
                if chosen.covers(extent):
                    self._shelf.let_go((base, dtype, extent))
            yield found

    def _bytes(self, base: str, dtype: str, extent: _Extent) -> int:
        return weight_bytes(weights_folder(base), _dtype(dtype), extent.layers) + self._row_bytes * extent.writes

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
