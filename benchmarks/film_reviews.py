"""``python -m benchmarks film-reviews``: makes a data set for ``accuracy --data`` from a package of the Python package index.

The source package of vaderSentiment holds snippets of film reviews, each rated by twenty people (Hutto and Gilbert, 2014).
"""

import argparse
import io
import json
import random
import tarfile
from pathlib import Path
from typing import IO

_INNER, _RATED = "hutto_ICWSM_2014.tar.gz", "movieReviewSnippets_GroundTruth.txt"
_CLEAR = (
    0.5  # ratings go from -4 to 4; a snippet with a mean rating nearer to 0 than this is neither positive nor negative
)
_TEST = 5  # one row in five is for testing


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("package", type=Path, help="vaderSentiment-3.3.2.tar.gz, from the Python package index")
    parser.add_argument(
        "folder", type=Path, help="the folder for train.jsonl and test.jsonl; its name is the data set's name"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the two files, and print how many rows they have."""
    try:
        rows = labelled(_text(options.package))
    except (OSError, tarfile.TarError, KeyError) as error:
        said = str(error).splitlines()[0].rstrip(":")
        raise SystemExit(f"{options.package} is not the source package of vaderSentiment 3.3.2: {said}") from None
    random.Random(0).shuffle(rows)
    test = len(rows) // _TEST
    options.folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", rows[:test]), ("train", rows[test:])):
        lines = (json.dumps({"text": text, "label": label}) + "\n" for text, label in part)
        (options.folder / f"{name}.jsonl").write_text("".join(lines))
    print(f"{len(rows) - test} rows for training and {test} for testing in {options.folder}")


def labelled(text: str) -> list[tuple[str, str]]:
    """The snippets with a clear rating, each once, in order, as pairs of the snippet and ``positive`` or ``negative``.

    ``text`` has a line for each snippet: its number, its mean rating and the snippet, separated by tabs.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, rating, snippet = line.split("\t", 2)
        if abs(float(rating)) >= _CLEAR:
            found.setdefault(snippet.strip(), "positive" if float(rating) > 0 else "negative")
    return list(found.items())


def _text(package: Path) -> str:
    with tarfile.open(package) as outer, tarfile.open(fileobj=_member(outer, _INNER)) as inner:
        return io.TextIOWrapper(_member(inner, _RATED), "utf-8").read()


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    member = archive.extractfile(next((path for path in archive.getnames() if Path(path).name == name), name))
    assert member, "the name is that of a file, not of a folder"
    return member
