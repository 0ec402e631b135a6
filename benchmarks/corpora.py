"""The data sets of the accuracy benchmark: where the labelled texts are, and how long end-to-end training takes on them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SHARED = Path(__file__).parent.parent.parent / "shared" / "data"  # beside the checkout
_SUFFIXES = (".jsonl", ".csv", ".parquet")


class NoCorpus(ValueError):
    """The files of a data set do not exist."""


@dataclass(frozen=True)
class Corpus:
    """A data set. ``train`` and ``test`` are sources of rows as in a job; without ``test``, a tenth of the rows is for testing.

    ``max_length`` is the number of tokens that are kept of a text. ``client_steps`` are the optimizer steps of all clients in
    end-to-end training.
    """

    name: str
    train: str
    test: str | None
    max_length: int
    client_steps: int

    @property
    def sources(self) -> dict[str, Any]:
        """The keys of a job's section ``data`` that say where the rows are."""
        return {"train": self.train, **({"test": self.test} if self.test else {})}


NAMES = ("banking77", "ag_news", "docstrings")
_LENGTHS = {"banking77": (128, 1200), "ag_news": (64, 400), "docstrings": (128, 600)}
_OTHER = (64, 1200)


def named(name: str) -> Corpus:
    """The data set called ``name``, one of ``NAMES``.

    Raises:
        NoCorpus: its files do not exist.
    """
    if name == "docstrings":
        return Corpus(name, "builtin:docstrings", None, *_LENGTHS[name])
    return _in_folder(_SHARED / name, *_LENGTHS[name])


def at(folder: Path) -> Corpus:
    """The data set in ``folder``: a file ``train`` and a file ``test``, with the columns ``text`` and ``label``.

    Raises:
        NoCorpus: the folder or one of its files does not exist.
    """
    return _in_folder(folder, *_LENGTHS.get(folder.name, _OTHER))


def _in_folder(folder: Path, max_length: int, client_steps: int) -> Corpus:
    train, test = (_file(folder, split) for split in ("train", "test"))
    return Corpus(folder.resolve().name, f"path:{train}", f"path:{test}", max_length, client_steps)


def _file(folder: Path, split: str) -> Path:
    found = [folder / (split + suffix) for suffix in _SUFFIXES if (folder / (split + suffix)).is_file()]
    if not found:
        names = " or ".join(split + suffix for suffix in _SUFFIXES)
        raise NoCorpus(f"{folder} is a folder without {names}" if folder.is_dir() else f"{folder} does not exist")
    return found[0].resolve()
