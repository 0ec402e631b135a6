"""A job's rows as tokens, each split by its task: classes, or what a language model is to predict."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainfed_ray.choices import Choices, read_choices
from chainfed_ray.config import JobSpec
from chainfed_ray.data import Corpus, Split, load
from chainfed_ray.errors import InvalidJob
from chainfed_ray.seeds import derive
from chainfed_ray.targets import learnable, packed, tokenize_texts
from chainfed_ray.tokens import Examples, tokenize

_FEWEST = 10


@dataclass(frozen=True)
class JobExamples:
    """The rows of a job, and their tokens. Of ``train`` an example is a row, until it is a client's: see ``of_client``."""

    corpus: Corpus
    train: Examples
    validation: Examples
    test: Examples
    choices: Choices | None
    packs: int | None  # tokens to which running text is cut; None where rows stay what they are

    def of_client(self, rows: np.ndarray) -> Examples:
        """The examples of a client that was dealt ``rows`` of the training rows."""
        examples = self.train.take(rows)
        return examples if self.packs is None else packed(examples, self.packs)

    @property
    def held_out(self) -> tuple[Examples, ...]:
        """What the server judges stacks on."""
        return (self.validation, self.test, *([self.choices.examples] if self.choices else []))


def examples_of(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> JobExamples:
    """Read a job's rows and make tokens of them.

    Raises:
        InvalidJob: they cannot be read, or there is too little to learn from.
    """
    if spec.model.task == "causal-lm":
        return _of_language(spec, tokenizer)
    corpus = _load(spec, classes=True)
    number = {name: place for place, name in enumerate(corpus.classes)}
    train, validation, test = (
        tokenize(tokenizer, _texts(split), [number[label] for label in split.labels], spec.data.max_length)
        for split in (corpus.train, corpus.validation, corpus.test)
    )
    return JobExamples(corpus, train, validation, test, choices=None, packs=None)


def _of_language(spec: JobSpec, tokenizer: PreTrainedTokenizerBase) -> JobExamples:
    length, running = spec.data.max_length, spec.data.columns[0][0] == "data.text"
    corpus = _load(spec, classes=spec.fleet.partition.scheme == "dirichlet")
    splits = []
    for name, split in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test)):
        examples = tokenize_texts(tokenizer, split.texts, length)
        if running and name != "train":
            examples = packed(examples, length)
        kept = learnable(examples)
        if len(kept) < (_FEWEST if name == "train" else 1):
            expected = f"more: of {len(split)} {name} rows, {len(kept)} have something to learn within so many tokens"
            raise InvalidJob.at("data.max_length", length, expected)
        if name == "train":
            corpus = Corpus(split.take(kept), corpus.validation, corpus.test, corpus.classes)
        splits.append(examples.take(kept))
    train, validation, test = splits
    if corpus.classes:
        number = {name: place for place, name in enumerate(corpus.classes)}
        train = replace(train, labels=np.array([number[label] for label in corpus.train.labels]))
    source = spec.evaluation.choices
    choices = read_choices(source, tokenizer, length) if source is not None else None
    return JobExamples(corpus, train, validation, test, choices, packs=length if running else None)


def _load(spec: JobSpec, classes: bool) -> Corpus:
    return load(spec.data, derive(spec.seed, "split"), spec.fleet.partition.column, classes)


def _texts(split: Split) -> Sequence[str]:
    return [text for text in split.texts if isinstance(text, str)]
