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
