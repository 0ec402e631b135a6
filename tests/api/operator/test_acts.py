"""Promise: what operators do with commands is in the audit log."""

from pathlib import Path

import pytest

from chainfed_ray.api.operator.backup_command import backup, restore
from chainfed_ray.api.operator.database_command import migrate_tables, version
from chainfed_ray.api.operator.keys_command import create
from chainfed_ray.api.operator.sites_command import add, revoke
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.storage import Settings


@pytest.mark.slow
def test_it_is_put_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CHAINFED_STORAGE", str(tmp_path / "storage"))
    create("alice", "read")
    add("hospital", "alice")
    revoke("hospital", "alice")
    revoke("hospital", "alice")
    database = Settings.from_environment().storage.database
    keys = KeyStore(database, existing=True)
    reads, joins = (key.id for key in keys.keys("alice"))
    keys.close()
    migrate_tables("0002", yes=True)
    backup(tmp_path / "copy")
    version(as_json=True)
    assert '"database": "0002"' in capfd.readouterr().out, "no command brings tables forward by what it puts down"
    migrate_tables()
    restore(tmp_path / "copy", replace=True)
    log = AuditLog(database, existing=True)
    entries = log.page()[::-1]
    log.close()
    backed_up = entries[-1].target.rpartition(" ")[2]
    assert [(entry.action, entry.target) for entry in entries] == [
        ("chainfed keys create", f"{reads} of alice: read"),
        ("chainfed sites add", f"{joins} of alice: site hospital"),
        ("chainfed sites revoke", f"{joins} of alice: site hospital"),
        ("chainfed database migrate", "0005 to 0002"),
        ("chainfed backup", str(tmp_path / "copy")),
        ("chainfed database migrate", "0002 to 0005"),
        ("chainfed restore", f"{tmp_path / 'copy'}, of {backed_up}"),
    ]
    assert entries[0].address.endswith("at the service's machine")
    migrate_tables("0001", yes=True)  # which has no log
