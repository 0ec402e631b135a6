"""Promise: a filesystem of fsspec is an object store only if what is created there is created once.

What holds of each object store, ``test_object_store`` has; also of files.
"""

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


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    for kind in (Keeping, WritingOver, LookingFirst, Away):
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
