"""Promises of the object store: what is created is created once, and a store that is away is a disk that is away."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from errno import ENOTCONN
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from threading import Barrier

import pytest

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.pieces import Pieces
from chainfed_ray.errors import InvalidSetting, PackageMissing
from tests.s3 import Server

# Other stores are tried where one is: CHAINFED_TEST_STORES='az://container/prefix sftp://user@host/folder'.
STORES = ("s3", "files", *os.environ.get("CHAINFED_TEST_STORES", "").split())


@pytest.fixture
def s3_objects(s3: Server, tmp_path: Path) -> ObjectStore:
    return ObjectStore.at(s3.url(f"objects/{tmp_path.name}"))


@pytest.fixture(params=STORES)
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "s3":
        yield request.getfixturevalue("s3_objects")
    elif request.param == "files":
        yield ObjectStore.at(f"local://{tmp_path}/objects")
    else:
        there = ObjectStore.at(f"{request.param.rstrip('/')}/{token_hex(8)}")
        yield there
        there.delete_below("")


UNKNOWN = ("nope://host/data", "s3://", "memory://x", "simplecache::sftp://host/data")
READ_ONLY = ("http://host/data", "data://x", "zip://x/y", "tar://x/y")
OF_ANOTHER = ("reference://x/y", "cached://x/y", "dir://x/y")  # filesystems that are told which other one they are on


@pytest.mark.parametrize("url", [*UNKNOWN, *READ_ONLY, *OF_ANOTHER])
def test_what_is_no_store_is_refused(url: str) -> None:
    with pytest.raises(InvalidSetting, match="CHAINFED_STORAGE"):
        ObjectStore.at(url)


@pytest.mark.parametrize("url", ["sftp://user:se[cret@host/data", "sftp://user:se/cret@host/data"])
def test_a_url_that_cannot_be_read_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidSetting, match=r"'sftp://\*\*\*'; expected a URL that can be read") as caught:
        ObjectStore.at(url)
    assert "cret" not in str(caught.value)


def test_a_store_needs_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(PackageMissing, match=r"obstore.*pip install 'chainfed-ray\[s3\]'"):
        ObjectStore.at("s3://never/asked")


def test_of_many_who_create_an_object_one_succeeds(objects: ObjectStore) -> None:
    together = Barrier(8)

    def create(number: int) -> bool:
        together.wait(60)
        try:
            objects.create("commit", f"of {number}".encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        succeeded = list(threads.map(create, range(8)))
    assert succeeded.count(True) == 1
    winner = f"of {succeeded.index(True)}".encode()
    assert objects.get("commit") == winner
    objects.create("commit", winner)  # whose answer was lost asks again
    with pytest.raises(FileNotFoundError):
        objects.get("another")


@pytest.mark.slow
def test_objects_by_name(objects: ObjectStore, tmp_path: Path) -> None:
    large = bytes(range(256)) * 40_000  # more than a part
    (tmp_path / "file").write_bytes(large)
    objects.put("a/file", tmp_path / "file")
    objects.put("a/b/small", b"small")
    objects.put("ab/other", b"other")
    assert objects.download("a/file", tmp_path / "copy", len(large)) == sha256(large).hexdigest()
    assert (tmp_path / "copy").read_bytes() == large
    assert b"".join(objects.parts("a/file")) == large
    assert [found.name for found in objects.below("a")] == ["a/b/small", "a/file"]
    assert [found.name for found in objects.below("a", after="a/b/small")] == ["a/file"]
    assert (objects.folders("a"), objects.files("a")) == (["b"], ["file"])
    assert objects.exists("a/file")
    objects.delete_below("a")
    objects.delete(["a/file"])  # need not be there
    objects.delete_below("a")
    assert (objects.folders("a"), objects.files("a")) == ([], [])
    assert not objects.exists("a/file")
    assert [found.name for found in objects.below("")] == ["ab/other"]


def test_a_store_that_is_away_is_a_disk_that_is_away(s3_objects: ObjectStore, s3: Server) -> None:
    s3_objects.put("there", b"x")
    s3.door.shut = True
    try:
        with pytest.raises(OSError, match="does not answer") as caught:
            s3_objects.get("there")
    finally:
        s3.door.shut = False
    assert caught.value.errno == ENOTCONN
    assert s3_objects.get("there") == b"x"


def test_pieces_make_a_file_from_whoever_sends_them(objects: ObjectStore) -> None:
    pieces = Pieces(objects, "file.partial")
    assert (pieces.received(), pieces.newest()) == (0, 0)
    pieces.put(0, b"first ")
    pieces.put(100, b"nobody asked for this one")
    Pieces(objects, "file.partial").put(6, b"second")
    with pytest.raises(FileExistsError):
        pieces.put(6, b"another second")
    assert pieces.received() == 12
    assert b"".join(pieces.read()) == b"first second"
    assert pieces.newest() > 0
    pieces.clear()
    assert objects.below("file.partial") == []
