"""Reads a job's rows and tokenises them, with labels for a classifier or targets for a language model."""

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from chainfed_ray.activity import SILENT, Listener, Reporter, no_listener
from chainfed_ray.data.chat_template import broken_template
from chainfed_ray.data.choices import Choices, read_choices
from chainfed_ray.data.sources import ColumnSelection, Corpus, Split, check_labels, hold_out, load, read_split, said_in
from chainfed_ray.data.targets import learnable, packed, tokenize_texts
from chainfed_ray.data.tokens import NO_EXAMPLES, ExampleCounts, Examples, tokenize
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import kind_and_line
from chainfed_ray.problem import Problem
from chainfed_ray.reading import reading_from
from chainfed_ray.seeds import derive
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import DataSpec, EvaluationSpec, ModelSpec

_FEWEST = 10


@dataclass(frozen=True)
class JobExamples:
    """The rows of a job and their tokens.

    In ``train`` each row is one example. Running text is packed into examples later, separately for each client: see
    ``of_client``.
    """

    corpus: Corpus
    train: Examples
    validation: Examples
    test: Examples
    choices: Choices | None
    pack_length: int | None  # the tokens of an example of running text; None if each row is an example

    def of_client(self, rows: np.ndarray) -> Examples:
        """The examples of a client that has ``rows`` of the training rows.

        Raises:
            InvalidJob: the client's rows have a single token in all.
        """
        examples = self.train.take(rows)
        if self.pack_length is None:
            return examples
        if len(examples.ids) < 2:
            expected = "more text, or fewer clients: one of them gets a single token"
            raise InvalidJob.at("data.train", self.corpus.train.texts[rows[0]], expected)
        return packed(examples, self.pack_length)

    @property
    def held_out(self) -> tuple[Examples, ...]:
        """The held-out examples that the server evaluates stacks on."""
        return (self.validation, self.test, *([self.choices.examples] if self.choices else []))


def examples_of(
    spec: JobSpec,
    tokenizer: PreTrainedTokenizerBase,
    listen: Listener = no_listener,
    elsewhere: Collection[str] | None = (),
) -> JobExamples:
    """Read a job's rows and tokenise them. ``elsewhere`` are the classes of training rows that are at sites (see ``load``).

    Raises:
        InvalidJob: the rows cannot be read, or they have too little to learn from.
    """
    Reporter("reading the data", listen).begin()
    with about_the_rows(spec.data):
        return _examples_of(spec, tokenizer, listen, elsewhere)


@contextmanager
def about_the_rows(data: DataSpec) -> Iterator[None]:
    """Say of whatever goes wrong in the block that it is about the rows of ``data``: they are the user's, and may be anything.

    Raises:
        InvalidJob: with the cause in words.
        MemoryError: there is not enough memory for them.
        OSError: a disk or a connection has trouble, which is no fault of the rows.
    """

    def refusal(error: Exception) -> InvalidJob:
        return InvalidJob.at("data.train", data.train, f"rows that can be used ({kind_and_line(error)})")

    with reading_from(data.train or "the rows", refusal):
        yield


def _examples_of(
    spec: JobSpec, tokenizer: PreTrainedTokenizerBase, listen: Listener, elsewhere: Collection[str] | None
) -> JobExamples:
    if spec.model.task == "causal-lm":
        return _of_language(spec, tokenizer, listen)
    corpus = _load(spec, classes=True, elsewhere=elsewhere)
    train, validation, test = (
        _classified(tokenizer, split, corpus.classes, spec.data.max_length, _tokenizing(name, listen))
        for name, split in corpus.splits
    )
    return JobExamples(corpus, train, validation, test, choices=None, pack_length=None)


def rows_of_site(model: ModelSpec, data: DataSpec, source: str) -> Split:
    """The training rows of ``source``, a ``path:`` at the site where this process runs.

    Raises:
        InvalidJob: the file cannot be read, or its rows cannot be used.
    """
    label = None if model.task == "causal-lm" else data.label
    split = read_split("data", source, "train", ColumnSelection(data.columns, label))
    if data.classes is not None:
        check_labels("data", split, data.classes)
    return split


class SiteSplits(NamedTuple):
    """The rows of a client at a site: those that it trains on, and those that it holds out."""

    train: Split
    validation: Split
    test: Split


def splits_of_site(evaluation: EvaluationSpec, seed: int, rows: Split) -> SiteSplits:
    """Hold out a tenth of ``rows`` for validation and a tenth for the test, if the sites evaluate; nothing otherwise.

    ``seed`` is the job's.
    """
    left = np.arange(len(rows))
    if evaluation.rows == "server":
        return SiteSplits(rows, rows.take(left[:0]), rows.take(left[:0]))
    left = np.random.default_rng(derive(seed, "split")).permutation(len(rows))
    tenth = max(len(rows) // 10, 1)
    first, left = hold_out(left, tenth, rows.labels)
    second, left = hold_out(left, tenth, rows.labels)
    return SiteSplits(*(rows.take(np.sort(part)) for part in (left, first, second)))


def spelled_out(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, token: int) -> Problem | None:
    """What is wrong with the first row that spells out a ``token`` which the model has not; None if no row does.

    Some tokenizers have tokens beside their vocabulary that their models have not. One of the vocabulary itself is not the
    row's fault: the tokenizer is another model's.
    """
    if token not in tokenizer.added_tokens_decoder:
        return None
    word = str(tokenizer.convert_ids_to_tokens(token))
    for name, split in corpus.splits:
        own: str | None = {"train": spec.train, "validation": spec.validation, "test": spec.test}[name]
        for number, text in zip(split.numbers, split.texts, strict=False):
            if any(word in said for said in said_in(text)):
                expected = f"rows without this token, which the model has not; row {number} has it"
                return Problem("data.train" if own is None else f"data.{name}", word, expected)
    return None


def most_held_out(model: ModelSpec, data: DataSpec, counts: ExampleCounts) -> int:
    """The most predictions that a client at a site can make on rows that it holds out; it trains on ``counts``.

    A classifier makes one for each row, and a tenth of the rows is an eighth of those that are left for training. A language
    model predicts tokens. One text may be much longer than all others, so it is allowed a hundred times the tokens that it
    trains on.
    """
    if model.task == "causal-lm":
        return 100 * max(counts.tokens, data.max_length)
    return max(counts.examples // 8, 1)


def examples_of_site(
    model: ModelSpec, data: DataSpec, evaluation: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, rows: Split
) -> Examples:
    """The tokenised ``rows`` of a client at a site, as a client with the same rows has them that the server deals.

    All labels are 0: which number a class has is the job's to say. Of a language model's rows, some may have nothing to learn.
    """
    if model.task != "causal-lm":
        return tokenize(tokenizer, _texts(rows), [0] * len(rows), data.max_length)
    _check_tokenizer(model, data, evaluation, tokenizer)
    length, running = data.max_length, _is_running(data)
    examples = tokenize_texts(tokenizer, rows.texts, length, numbers=rows.numbers)
    if not running:
        return examples.take(learnable(examples))
    examples = examples.take(np.flatnonzero(examples.lengths))
    return packed(examples, length) if len(examples.ids) > 1 else examples.take(np.arange(0))


def _classified(
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    classes: Sequence[str],
    max_length: int,
    reporter: Reporter = SILENT,
) -> Examples:
    """The rows of a classifier's ``split`` as tokens, with the numbers of their ``classes``."""
    number = {name: place for place, name in enumerate(classes)}
    labels = [number[label] for label in split.labels]
    return tokenize(tokenizer, _texts(split), labels, max_length, reporter)


def _of_language(spec: JobSpec, tokenizer: PreTrainedTokenizerBase, listen: Listener) -> JobExamples:
    _check_tokenizer(spec.model, spec.data, spec.evaluation, tokenizer)
    length, running = spec.data.max_length, _is_running(spec.data)
    corpus = _load(spec, classes=spec.fleet.partition.scheme == "dirichlet")
    splits = []
    for name, split in corpus.splits:
        if not len(split) and (name == "train" or spec.evaluation.rows == "sites"):  # the rows are at sites
            splits.append(NO_EXAMPLES)
            continue
        examples = tokenize_texts(tokenizer, split.texts, length, _tokenizing(name, listen), split.numbers)
        if running and name != "train":
            examples = packed(examples, length)
        # Running text is joined before it is cut, so in training rows every token counts.
        kept = np.flatnonzero(examples.lengths) if running and name == "train" else learnable(examples)
        if len(kept) < _fewest(name):
            raise _too_little(spec.data, tokenizer, name, split, len(kept))
        if name == "train":
            corpus = Corpus(split.take(kept), corpus.validation, corpus.test, corpus.classes)
        splits.append(examples.take(kept))
    train, validation, test = splits
    if corpus.classes:
        number = {name: place for place, name in enumerate(corpus.classes)}
        train = replace(train, labels=np.array([number[label] for label in corpus.train.labels]))
    source = spec.evaluation.choices
    choices = read_choices(source, tokenizer, length) if source is not None else None
    return JobExamples(corpus, train, validation, test, choices, pack_length=length if running else None)


def _tokenizing(name: str, listen: Listener) -> Reporter:
    return Reporter(f"making tokens of the {name} rows", listen)


def _is_running(data: DataSpec) -> bool:
    """Whether the rows are running text, which is joined and cut; otherwise each row is one example."""
    return data.columns[0][0] == "data.text"


def _check_tokenizer(
    model: ModelSpec, data: DataSpec, evaluation: EvaluationSpec, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that the tokenizer has what the job needs.

    Chats need a template. Rows that are learnt in part need a fast tokenizer, which says where in a text each token is.
    """
    if data.messages is not None and not tokenizer.chat_template:
        expected = "a model whose tokenizer has a chat template, for the chats of data.messages; this one has none"
        raise InvalidJob.at("model.base", model.base, expected)
    if data.messages is not None and (wrong := broken_template(tokenizer)):
        raise InvalidJob.at("model.base", model.base, f"a model with a chat template that can be used ({wrong})")
    if not tokenizer.is_fast and not (_is_running(data) and evaluation.choices is None):
        expected = "a model with a fast tokenizer, which says where in a text its tokens are; this one does not"
        raise InvalidJob.at("model.base", model.base, expected)


def _fewest(name: str) -> int:
    return _FEWEST if name == "train" else 1


def _too_little(data: DataSpec, tokenizer: PreTrainedTokenizerBase, name: str, split: Split, kept: int) -> InvalidJob:
    """The error for a split in which only ``kept`` rows have something to learn.

    Either ``max_length`` cuts off what the other rows have, or there are too few such rows.
    """
    whole = kept
    if not _is_running(data):
        whole = len(learnable(tokenize_texts(tokenizer, split.texts, max_length=sys.maxsize)))
    if whole >= _fewest(name):
        expected = f"more tokens: of {whole} {name} rows with something to learn, {kept} keep some of it"
        return InvalidJob.at("data.max_length", data.max_length, expected)
    own: str | None = {"train": data.train, "validation": data.validation, "test": data.test}[name]
    key, source = ("data.train", data.train) if own is None else (f"data.{name}", own)
    held_out = ", once others are held out" if key == "data.train" and None in (data.validation, data.test) else ""
    expected = f"{_fewest(name)} {name} rows or more with something to learn{held_out}; of {len(split)}, {whole} have"
    return InvalidJob.at(key, source, expected)


def _load(spec: JobSpec, classes: bool, elsewhere: Collection[str] | None = ()) -> Corpus:
    return load(spec.data, derive(spec.seed, "split"), spec.fleet.partition.column, classes, elsewhere)


def _texts(split: Split) -> Sequence[str]:
    return [text for text in split.texts if isinstance(text, str)]
