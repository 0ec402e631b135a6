"""Promise: a filesystem of fsspec is an object store only if what is created there is created once.

What holds of each object store, ``test_object_store`` has; also of files.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from errno import ENOTCONN
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest
from fsspec import register_implementation
from fsspec.implementations.local import LocalFileSystem

from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.errors import InvalidSetting


class Keeping(LocalFileSystem):  # type: ignore[misc]
    """Files of this machine. Each connection of ours can be cut, once."""

    protocol = "keeping"
    cut = 0  # connections that break when they are asked next
    away = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        """Earlier fsspec takes only ``file://`` off, so that the files would lie in a folder ``keeping:`` of this one."""
        own = f"{cls.protocol}://"
        return super()._strip_protocol(path.removeprefix(own) if isinstance(path, str) else path)

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        self.ask()
        return super().open(path, mode, **how)

    def ask(self) -> None:
        if self.away or Keeping.cut > 0:
            Keeping.cut -= 1
            raise EOFError("the connection is gone")


class WritingOver(Keeping):
    """It knows no mode but to write."""

    protocol = "writing-over"

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        return super().open(path, mode.replace("x", "w"), **how)


class LookingFirst(Keeping):
    """It looks whether there is a file, and writes then; two of those who look at the same time find none."""

    protocol = "looking-first"
    together = Barrier(2)

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        if "x" in mode:
            if self.exists(path):
                raise FileExistsError(path)
            with suppress(BrokenBarrierError):
                self.together.wait(0.2)
        return super().open(path, mode.replace("x", "w"), **how)


class Away(Keeping):
    """Nobody answers."""

    protocol = "away"
    away = True


class Tearing(Keeping):
    """A connection that is cut takes half of what it is given."""

    protocol = "tearing"

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        file = LocalFileSystem.open(self, path, mode, **how)
        if Keeping.cut > 0 and mode != "rb":
            file.write(b"who")
            file.write = self.broken
        return file

    def put_file(self, path1: str, path2: str, callback: Any = None, **how: Any) -> None:
        if Keeping.cut <= 0:
            return super().put_file(path1, path2, callback, **how)
        self.makedirs(self._parent(path2), exist_ok=True)
        Path(path2).write_bytes(b"who")
        self.broken()

    def rm_file(self, path: str) -> None:
        if Keeping.cut > 0:
            raise EOFError("the connection is gone")
        super().rm_file(path)

    def broken(self, *_: object) -> None:
        self.ask()


class AuthenticationException(Exception):
    """As paramiko has one."""


class Closed(Keeping):
    """It knows another password."""

    protocol = "closed"

    def __init__(self, **how: Any) -> None:
        raise AuthenticationException("Authentication failed.")


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    for kind in (Keeping, WritingOver, LookingFirst, Away, Tearing, Closed):
        register_implementation(kind.protocol, kind, clobber=True)
    yield
    Keeping.cut = 0


@pytest.mark.parametrize("kind", [WritingOver, LookingFirst])
def test_a_filesystem_that_breaks_the_promise_is_refused(kind: type[Keeping], tmp_path: Path) -> None:
    with pytest.raises(
        InvalidSetting, match=r"CHAINFED_STORAGE is '\S+:///\S+'; .*only if there is none.*[234] succeeded"
    ):
        ObjectStore.at(f"{kind.protocol}://{tmp_path}/data")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_connection_that_was_closed_is_made_again(tmp_path: Path) -> None:
    objects = ObjectStore.at(f"keeping://{tmp_path}/data")
    objects.put("there", b"x")
    Keeping.cut = 1
    assert objects.get("there") == b"x"
    Keeping.cut = 2
    with pytest.raises(OSError, match=r"does not answer \(the connection is gone\)") as caught:
        objects.get("there")
    assert caught.value.errno == ENOTCONN


def test_one_that_is_away_is_waited_for_and_its_password_is_not_told() -> None:
    objects = ObjectStore.at("away://service:secret@host/data?token=secret")
    with pytest.raises(OSError, match=r"does not answer .*service:\*\*\*@host/data'$") as caught:
        objects.create("commit", b"x")
    assert caught.value.errno == ENOTCONN
    assert "secret" not in str(caught.value)
    with pytest.raises(InvalidSetting, match=r"nope://service:\*\*\*@host/data'"):
        ObjectStore.at("nope://service:secret@host/data")


def test_a_file_that_a_broken_connection_tore_is_written_again(tmp_path: Path) -> None:
    objects = ObjectStore.at(f"tearing://{tmp_path}/data")
    Keeping.cut = 1
    objects.create("list", b"whole list")
    assert objects.get("list") == b"whole list"
    Keeping.cut = 2
    with pytest.raises(OSError, match="does not answer"):
        objects.create("next", b"whole list")
    with pytest.raises(FileExistsError):
        objects.create("next", b"another list")
    objects.create("next", b"whole list")  # the same call, once the storage is back
    assert objects.get("next") == b"whole list"


def test_a_file_that_another_process_has_just_created_is_left_alone(tmp_path: Path) -> None:
    objects = ObjectStore.at(f"keeping://{tmp_path}/data")
    objects.put("list", b"")
    Keeping.cut = 1  # before anything was created
    with pytest.raises(FileExistsError):
        objects.create("list", b"whole list")
    assert objects.get("list") == b""


def test_half_a_file_is_never_found_and_goes_after_a_day(tmp_path: Path) -> None:
    objects = ObjectStore.at(f"tearing://{tmp_path}/data")
    (tmp_path / "file").write_bytes(b"whole file")
    Keeping.cut = 2
    with pytest.raises(OSError, match="does not answer"):
        objects.put("uploads/tenant/digest", tmp_path / "file")
    Keeping.cut = 0
    assert not objects.exists("uploads/tenant/digest")
    assert objects.folders("") == ["parts"]
    (old,) = (tmp_path / "data" / "parts").iterdir()
    os.utime(old, (0, 0))
    new = old.with_name("of a put that goes on")
    new.touch()
    ObjectStore.at(f"keeping://{tmp_path}/data")
    assert list((tmp_path / "data" / "parts").iterdir()) == [new]
    objects.put("uploads/tenant/digest", tmp_path / "file")
    assert objects.get("uploads/tenant/digest") == b"whole file"


def test_what_is_tried_with_is_deleted(tmp_path: Path) -> None:
    ObjectStore.at(f"keeping://{tmp_path}/data")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_wrong_password_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"closed:///\S+'; .*written to \(Authentication failed\.\)"):
        ObjectStore.at(f"closed://{tmp_path}/data")


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file in place of the folder")
    with pytest.raises(InvalidSetting, match=r"opened and written to \("):
        ObjectStore.at(f"keeping://{tmp_path}/data")
