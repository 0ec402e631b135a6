"""Promise: the check of a storage says which folder cannot be written to, and leaves nothing behind."""

from pathlib import Path

import pytest

from chainfed_ray.cluster.storage import Storage


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path / "data", scratch=tmp_path / "scratch")
    storage.check()
    storage.scratch_root.mkdir()
    storage.check()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    storage.root.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=str(storage.root)):
        storage.check()
    (tmp_path / "away").rename(storage.root)
    storage.scratch_root.rmdir()
    storage.scratch_root.write_text("a file where a folder is meant")
    with pytest.raises(NotADirectoryError, match=str(storage.scratch_root)):
        storage.check()
