"""Promises of ``chainfed backup`` and ``chainfed restore``: they act on the storage of the environment."""

import json
from pathlib import Path

import pytest

from chainfed_ray.api.operator.backup_command import backup, restore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import InvalidSetting
from tests.builders import SPEC


def test_back_and_forth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path / "storage"))
    database = Settings.from_environment().storage.database
    store = JobStore(database)
    job = store.submit(SPEC).id
    backup(tmp_path / "copy", as_json=True)
    made = json.loads(capfd.readouterr().out)
    assert (made["jobs"], made["uploads"], made["missing"]) == (1, 0, [])
    assert (tmp_path / "copy").stat().st_mode & 0o077 == 0, "it has secrets"
    store.move(job, "cancelled", before=("queued",))
    store.submit(SPEC)
    store.close()
    with pytest.raises(InvalidSetting, match="--replace"):
        restore(tmp_path / "copy")
    restore(tmp_path / "copy", replace=True)
    assert f"1 jobs and 0 uploads are as they were at {made['made_at']}" in capfd.readouterr().out
    store = JobStore(database, existing=True)
    assert [(found.id, found.status) for found in store.page()] == [(job, "queued")]
    store.close()


def test_what_is_not_there_is_not_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("CHAINFED_STORAGE", "CHAINFED_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        InvalidSetting, match=r"CHAINFED_STORAGE is '.*/chainfed-data'; expected a folder that is there"
    ):
        backup(tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "chainfed-data").mkdir()
    with pytest.raises(InvalidSetting, match=r"CHAINFED_DATABASE .*chainfed\.db'; expected a database that is there"):
        backup(tmp_path / "copy")
    assert list((tmp_path / "chainfed-data").iterdir()) == []
    assert not (tmp_path / "copy").exists()


def test_a_database_whose_path_has_signs_of_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path / "a b#c"))
    database = Settings.from_environment().storage.database
    store = JobStore(database)
    job = store.submit(SPEC).id
    store.close()
    backup(tmp_path / "copy")
    restore(tmp_path / "copy", replace=True)
    store = JobStore(database, existing=True)
    assert [found.id for found in store.page()] == [job], "SQLite takes # for the end of a path"
    store.close()


def test_a_database_that_is_damaged_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path))
    (tmp_path / "chainfed.db").write_text("this is no database of SQLite, but a text of some length")
    with pytest.raises(InvalidSetting, match=r"CHAINFED_DATABASE .*not a database"):
        backup(tmp_path / "copy")
