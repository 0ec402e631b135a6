"""Reads a job's rows from files, the hub or the built-in set, and splits them into training and held-out rows."""

import os
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from chainfed_ray.data import docstrings
from chainfed_ray.data.cells import as_list, labels, texts
from chainfed_ray.data.chats import chat
from chainfed_ray.data.messages import Message
from chainfed_ray.data.tables import FORMS, Table, from_arrow, read_path, read_upload, shown
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import asking_the_hub, hub_is_reachable
from chainfed_ray.problem import some_of
from chainfed_ray.reading import OWN_UPLOAD, NotAllowed, check_repository, reading_from
from chainfed_ray.spec.sections import DataSpec

_FORMS = "builtin:docstrings, path:<file or folder>, upload:<id> or hf:<dataset>[:<configuration>][@<revision>]"
_IN_ROOTS = "a file or folder in one of CHAINFED_DATA_ROOTS, the folders whose data a job of this service may read"
_FEWEST = 10
_ANY_CLASSES = ("one", "other")
# Columns that belong to the chats beside them, and are not read. To leave them out would teach something else.
_OF_CHATS = ("tools", "functions", "system")


_MOST_CHARACTERS = 10_000_000  # of a row: a tokenizer takes 12 bytes of memory for each, also if most are cut off
Text = str | tuple[str, str] | tuple[Message, ...]
"""What a row is to a model: a text, a (prompt, response) pair, or a chat."""


@dataclass(frozen=True)
class Split:
    """The rows of a split: texts, their labels, and their values of the column that the partition keeps together.

    ``labels`` is empty if the job has no classes; ``groups`` is empty if no column is kept together. ``numbers`` are the rows'
    own in their source, from 1 on, by which errors name them.
    """

    texts: tuple[Text, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...] = ()
    numbers: Sequence[int] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: np.ndarray) -> "Split":
        """The rows at ``indices``."""
        texts = tuple(self.texts[index] for index in indices)
        labels, groups = (
            tuple(values[index] for index in indices) if values else () for values in (self.labels, self.groups)
        )
        # An array of them takes a quarter of the memory of a tuple.
        return Split(texts, labels, groups, array("q", (self.numbers[index] for index in indices if self.numbers)))


@dataclass(frozen=True)
class ColumnSelection:
    """The columns that a job uses. ``texts`` has (key, column) pairs; label and group columns are None if the job has none."""

    texts: tuple[tuple[str, str], ...]
    label: str | None
    group: str | None = None

    @property
    def columns(self) -> list[tuple[str, str]]:
        """Every column as a (key, column) pair."""
        label = [("data.label", self.label)] if self.label is not None else []
        group = [("fleet.partition.column", self.group)] if self.group is not None else []
        return [*self.texts, *label, *group]


@dataclass(frozen=True)
class Corpus:
    """The three splits, and the classes: the job's own, or those of the training rows in alphabetical order.

    ``classes`` is empty if no labels are read. ``train`` is empty if the job has no training rows of its own.
    """

    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def splits(self) -> tuple[tuple[str, Split], ...]:
        """The three splits with their names."""
        return ("train", self.train), ("validation", self.validation), ("test", self.test)


def load(
    spec: DataSpec, seed: int, column: str | None = None, classes: bool = True, elsewhere: Collection[str] | None = ()
) -> Corpus:
    """Read the job's rows. A validation or test split that is not given is a tenth of ``train``, drawn with ``seed``.

    ``column`` is the column by which training rows are partitioned, if any. Without ``classes`` no labels are read.
    ``elsewhere`` are the classes of training rows that are at sites; None if the sites were not asked yet. The classes are
    then those of all rows that are here, or any two: enough to check the job.

    Raises:
        InvalidJob: a source cannot be read, or its rows cannot be used.
        OSError: a disk or a connection does not work.
    """
    selection = ColumnSelection(spec.columns, spec.label if classes else None, column)
    train = Split((), ()) if spec.train is None else read_split("data.train", spec.train, "train", selection)
    if spec.train is not None and len(train) < _FEWEST:
        raise InvalidJob.at("data.train", spec.train, f"{_FEWEST} rows or more; there are {len(train)}")
    held_out: list[Split] = []
    # Held-out rows go to no client, so they need no groups.
    ungrouped = replace(selection, group=None)
    left = np.random.default_rng(seed).permutation(len(train))
    tenth = max(len(train) // 10, 1)
    for name, source in (("validation", spec.validation), ("test", spec.test)):
        if source is None:
            drawn, left = hold_out(left, tenth, train.labels)
            held_out.append(train.take(np.sort(drawn)))
        else:
            held_out.append(read_split(f"data.{name}", source, name, ungrouped))
    train = train.take(np.sort(left))
    found = spec.classes if spec.classes is not None else tuple(sorted({*train.labels, *(elsewhere or ())}))
    if elsewhere is None and spec.classes is None:
        known = {label for split in (train, *held_out) for label in split.labels}
        found = tuple(sorted(known)) if len(known) > 1 else _ANY_CLASSES
    if selection.label is not None:
        check_labels("data.train", train, found)
        _check_classes(selection.label, found, held_out)
    return Corpus(train, held_out[0], held_out[1], found)


def check_labels(field: str, split: Split, classes: Collection[str]) -> None:
    """Check that the rows which ``field`` names have no label but ``classes``.

    Raises:
        InvalidJob: a row has another one.
    """
    if unknown := sorted(set(split.labels) - set(classes)):
        raise InvalidJob.at(field, unknown[0], "only labels that data.classes lists")


def read_table(field: str, source: str, split: str, wanted: Collection[str] | None = None) -> Table:
    """The rows of ``source``, which the key ``field`` names: their ``wanted`` columns, or all. On the hub it reads the split
    called ``split``.

    Raises:
        InvalidJob: the source cannot be read, or it has no rows.
        OSError: a disk or a connection does not work.
    """
    scheme, _, name = source.partition(":")
    if source == "builtin:docstrings":
        rows = docstrings.rows()
        table = Table(("text", "label"), {"text": [text for text, _ in rows], "label": [label for _, label in rows]})
    elif scheme == "path" and name:
        table = _read_file(field, source, lambda: read_path(Path(name), wanted), _IN_ROOTS)
    elif scheme == "upload" and name:
        table = _read_file(field, source, lambda: read_upload(name, wanted), OWN_UPLOAD)
    elif scheme == "hf" and name:
        table = _read_hub(field, source, name, split, wanted)
    else:
        raise InvalidJob.at(field, source, _FORMS)
    if not table.names or (table.columns and not len(table)):
        raise InvalidJob.at(field, source, "one row or more; there are none")
    return table


def hold_out(order: np.ndarray, count: int, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The first ``count`` rows of ``order``, and the others. A row is passed over if it is the last of its class that is left.

    So every class keeps a row to be learnt from. Rows without ``labels`` are all alike.
    """
    if not labels:
        return order[:count], order[count:]
    rows_left = Counter(labels[row] for row in order)
    drawn, left = list[int](), list[int]()
    for row in order.tolist():
        if len(drawn) < count and rows_left[labels[row]] > 1:
            rows_left[labels[row]] -= 1
            drawn.append(row)
        else:
            left.append(row)
    return np.array(drawn, dtype=np.int64), np.array(left, dtype=np.int64)


def _check_classes(label: str, classes: tuple[str, ...], held_out: list[Split]) -> None:
    if len(classes) < 2:
        only = f"; every training row has {classes[0]!r}" if classes else ", in data.classes or at the sites"
        raise InvalidJob.at("data.label", label, f"two classes or more{only}")
    for name, split in (("validation", held_out[0]), ("test", held_out[1])):
        if unknown := sorted(set(split.labels) - set(classes)):
            hidden = "; those of this split seem to be hidden" if unknown == ["-1"] else ""
            raise InvalidJob.at(f"data.{name}", unknown[0], f"only labels that the training rows have{hidden}")


def read_split(field: str, source: str, split: str, selection: ColumnSelection) -> Split:
    """The rows of ``source``, which the key ``field`` names. On the hub it reads the split called ``split``.

    Raises:
        InvalidJob: the source cannot be read, or it has no rows, or they lack a column or a value.
        OSError: a disk or a connection does not work.
    """
    wanted = {name for _, name in selection.columns}
    beside = set(_OF_CHATS) - wanted if selection.texts[0][0] == "data.messages" else set()
    table = read_table(field, source, split, wanted | beside)
    for key, name in selection.columns:
        if name not in table.columns:
            raise InvalidJob.at(key, name, f"a column of {source}: {some_of(table.names)}")
    for name in sorted(beside & table.columns.keys()):
        _check_empty(table, name, selection.texts[0][1], source)
    named, groups = (
        _filled(labels(table, key, column, source), key, column, source) if column is not None else ()
        for key, column in (("data.label", selection.label), ("fleet.partition.column", selection.group))
    )
    return Split(_texts(table, selection, source), named, groups, range(1, len(table) + 1))


def _check_empty(table: Table, beside: str, column: str, source: str) -> None:
    """Check that no row has anything in the column ``beside`` that of the chats."""
    for row, cell in enumerate(table.columns[beside], start=1):
        listed = as_list(cell) if isinstance(cell, str) else None
        said = cell if listed is None else listed
        if said and not (isinstance(said, str) and not said.strip()):
            expected = (
                f"chats without {beside} beside them, which are not read; row {row} of {source} has {shown(cell)}"
            )
            raise InvalidJob.at("data.messages", column, expected)


def _filled(values: Sequence[str | None], key: str, column: str, source: str) -> tuple[str, ...]:
    """The values, if every row has one."""
    for row, value in enumerate(values, start=1):
        if value is None:
            raise InvalidJob.at(key, column, f"a value in every row of {source}; row {row} has none")
    return tuple(value for value in values if value is not None)


def _texts(table: Table, selection: ColumnSelection, source: str) -> tuple[Text, ...]:
    found = _any_texts(table, selection, source)
    key, first = selection.texts[0]
    for row, text in enumerate(found, start=1):
        if (length := sum(map(len, said_in(text)))) > _MOST_CHARACTERS:
            expected = f"texts of at most {_MOST_CHARACTERS:,} characters; row {row} of {source} has {length:,}"
            raise InvalidJob.at(key, first, expected)
    return found


def said_in(text: Text) -> list[str]:
    """A text, a prompt and its response, or what the messages of a chat say."""
    if isinstance(text, str):
        return [text]
    return [part if isinstance(part, str) else part.content for part in text]


def _any_texts(table: Table, selection: ColumnSelection, source: str) -> tuple[Text, ...]:
    (key, first), *others = selection.texts
    if key == "data.messages":
        cells = enumerate(table.columns[first], start=1)
        return tuple(chat(cell, first, f"row {row} of {source}") for row, cell in cells)
    found = _filled(texts(table, key, first, source), key, first, source)
    if others:
        # A row without a response is dropped later.
        responses = texts(table, *others[0], source)
        return tuple((prompt, response or "") for prompt, response in zip(found, responses, strict=True))
    return found


def _read_file(field: str, source: str, read: Callable[[], Table], allowed: str) -> Table:
    """What ``read`` gives. ``allowed`` says in words what the rules of this process allow it to read."""

    def refusal(error: Exception) -> InvalidJob:
        reason = " ".join(str(error).split()) or type(error).__name__
        expected = reason if isinstance(error, ValueError) else f"a readable {FORMS} ({reason})"
        return InvalidJob.at(field, source, expected)

    try:
        with reading_from(source, refusal):
            return read()
    except NotAllowed:
        raise InvalidJob.at(field, source, allowed) from None
    except MemoryError:
        raise InvalidJob.at(
            field, source, "rows that fit into the memory that a process may take to read them"
        ) from None


def _read_hub(field: str, source: str, name: str, split: str, wanted: Collection[str] | None) -> Table:
    import datasets  # its import takes a second, and only hub sources need it

    address, _, revision = name.partition("@")
    repository, _, configuration = address.partition(":")
    try:
        check_repository(repository)
    except NotAllowed:
        raise InvalidJob.at(field, source, "a data set on the hub that CHAINFED_HUB_ALLOW names") from None
    offline = os.environ.get("HF_DATASETS_OFFLINE") == "1" or os.environ.get("HF_HUB_OFFLINE") == "1"
    if not offline and not hub_is_reachable():
        raise InvalidJob.at(field, source, "a network, or HF_HUB_OFFLINE=1 and a data set that was downloaded before")

    def refusal(error: Exception) -> InvalidJob:  # of the hub, or of the data set's builder
        reason = " ".join(str(error).split())
        return InvalidJob.at(field, source, f"a data set on the hub with a {split} split ({reason})")

    with reading_from(source, refusal), asking_the_hub():
        rows = datasets.load_dataset(repository, configuration or None, split=split, revision=revision or None)
        return from_arrow(rows.with_format("arrow")[:], wanted)
