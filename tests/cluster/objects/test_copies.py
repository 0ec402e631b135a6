"""Promises of copies for readers: one that is there is whole, one that is used stays, and what does not change is kept once."""

import os
from pathlib import Path
from time import time

import pytest

from chainfed_ray.cluster.objects.copies import Copies
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Snapshots, StoredFile
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.storage import Storage


class Job:
    """A job that commits files to ``objects``."""

    def __init__(self, objects: ObjectStore, name: str, folder: Path) -> None:
        self._folder, self._copy = folder / name, WorkingCopy(objects, name, folder / name)
        self._copy.begin()

    def commit(self, **files: str) -> None:
        """Commit these files, named with ``_`` in place of a dot."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (self._folder / name.replace("_", ".")).write_text(text)
        self._copy.commit()


@pytest.fixture
def objects(far: Storage) -> ObjectStore:
    assert far.objects is not None
    return far.objects


def age(*folders: Path) -> None:
    """Make it so that nobody has asked for these copies for a day."""
    for folder in folders:
        os.utime(folder, 2 * (time() - 86400,))


@pytest.mark.slow
def test_a_copy_that_is_used_stays_and_others_make_room(objects: ObjectStore, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        Job(objects, name, tmp_path).commit(model=1000 * name, finished_json="{}")
    copies = Copies(objects, tmp_path / "copies", most_bytes=1500)
    used, unused = copies.folder("a"), copies.folder("b")
    left = [used.with_name(name) for name in ("new-x", "gone-x")]
    for folder in left:
        folder.mkdir()
    age(used, unused, *left)
    assert copies.folder("a") == used
    newest = copies.folder("c")
    assert [folder.exists() for folder in (used, unused, newest)] == [True, False, True]
    assert sorted(tmp_path.glob("copies/*/*")) == sorted([used, newest]), "nor does anything half-deleted stay"


@pytest.mark.slow
def test_a_copy_goes_as_a_whole(objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        Job(objects, name, tmp_path).commit(model=1000 * name, finished_json="{}")
    copies = Copies(objects, tmp_path / "copies", most_bytes=100)
    first = copies.folder("a")
    age(first)
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: (Path(path) / "model").unlink(missing_ok=True))  # is killed
    copies.folder("b")
    monkeypatch.undo()
    assert not first.exists()
    assert (Copies(objects, tmp_path / "copies").folder("a") / "model").read_text() == 1000 * "a"


def test_a_commit_of_the_same_number_after_a_restore_is_another_one(objects: ObjectStore, tmp_path: Path) -> None:
    """What a machine has copied before need not be deleted by hand."""
    Job(objects, "a", tmp_path / "before").commit(model="before", finished_json="{}", log_jsonl="one\ntwo\n")
    assert (Copies(objects, tmp_path / "copies").folder("a") / "model").read_text() == "before"
    objects.delete_below("jobs/a")
    Job(objects, "a", tmp_path / "after").commit(model="after", finished_json="{}", log_jsonl="1\n")
    assert (Copies(objects, tmp_path / "copies").folder("a") / "model").read_text() == "after"
    Job(objects, "a", tmp_path / "before")  # its coordinator works there again
    assert {(tmp_path / "before" / "a" / name).read_text() for name in ("model", "log.jsonl")} == {"after", "1\n"}


@pytest.mark.slow
def test_what_did_not_change_is_neither_fetched_nor_kept_again(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, copies, fetched, fetch = Job(objects, "a", tmp_path), Copies(objects, tmp_path / "copies"), [], Snapshots.fetch

    def noted(self: Snapshots, name: str, file: StoredFile, path: Path) -> None:
        fetched.append(name)
        fetch(self, name, file, path)

    monkeypatch.setattr(Snapshots, "fetch", noted)
    job.commit(stack="1", log_jsonl="one\n")
    first = copies.folder("a", at_once=True)
    job.commit(log_jsonl="one\ntwo\n")
    age(first)
    second = copies.folder("a", at_once=True)
    assert fetched == ["log.jsonl", "stack", "log.jsonl"]
    assert ((second / "stack").read_text(), (second / "log.jsonl").read_text()) == ("1", "one\ntwo\n")
    assert not first.exists(), "nobody reads in it"
    job.commit(log_jsonl="three\n")
    assert (copies.folder("a", at_once=True) / "stack").read_text() == "1"


@pytest.mark.slow
def test_a_reader_finds_a_commit_however_fast_others_come(
    objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, copies, fetch = Job(objects, "a", tmp_path), Copies(objects, tmp_path / "copies"), Snapshots.fetch
    for number in range(3):
        job.commit(stack=f"{number}")

    def late(self: Snapshots, name: str, file: StoredFile, path: Path) -> None:
        monkeypatch.setattr(Snapshots, "fetch", fetch)
        for number in range(3, 6):  # what was listed is deleted by now
            job.commit(stack=f"{number}")
        fetch(self, name, file, path)

    monkeypatch.setattr(Snapshots, "fetch", late)
    assert (copies.folder("a") / "stack").read_text() == "5"
