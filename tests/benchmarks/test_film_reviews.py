"""``python -m benchmarks film-reviews``: the texts of a package of others, as the accuracy benchmark takes them."""

import argparse
import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import corpora, film_reviews

RATED = "1\t2.25\tA joy .\r\n2\t-0.6\tToo tepid\r\n3\t0.4\tNeither\r\n4\t3.0\tA joy .\r\n5\t-2.5\tDull\ttwice\r\n"


def packed(folder: Path, rated: str, path: str) -> Path:
    """A source package with an archive in it, in which the ratings are at ``path``."""
    inner = archive({path: rated.encode()})
    package = folder / "package.tar.gz"
    package.write_bytes(archive({"package-1/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    return package


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as into:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            into.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def test_clear_snippets_are_kept_once_with_their_label() -> None:
    assert film_reviews.labelled(RATED) == [
        ("A joy .", "positive"),
        ("Too tepid", "negative"),
        ("Dull\ttwice", "negative"),
    ]


def test_a_fifth_is_for_testing_and_the_benchmark_finds_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = "".join(f"{index}\t{1 if index % 2 else -1}\ttext {index}\n" for index in range(50))
    package = packed(tmp_path, rated, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
    folder = tmp_path / "sentiment"
    for _ in range(2):  # the same rows whenever it is run
        film_reviews.run(argparse.Namespace(package=package, folder=folder))
    corpus = corpora.at(folder)
    assert corpus.name == "sentiment"
    assert corpus.test
    train, test = (
        [json.loads(line) for line in Path(source.removeprefix("path:")).read_text().splitlines()]
        for source in (corpus.train, corpus.test)
    )
    assert (len(train), len(test)) == (40, 10)
    assert {row["text"] for row in train + test} == {f"text {index}" for index in range(50)}
    said = f"40 rows for training and 10 for testing in {folder}\n"
    assert capsys.readouterr().out == 2 * said


@pytest.mark.parametrize("package", ["nothing", "text", "another"])
def test_what_is_not_that_package_is_named(package: str, tmp_path: Path) -> None:
    path = tmp_path / "absent.tar.gz"
    if package == "text":
        path.write_text("no archive")
    elif package == "another":
        path = packed(tmp_path, RATED, "hutto_ICWSM_2014/others.txt")
    with pytest.raises(SystemExit, match=f"{path.name} is not the source package of vaderSentiment 3.3.2: .") as caught:
        film_reviews.run(argparse.Namespace(package=path, folder=tmp_path / "rows"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "rows").exists()
