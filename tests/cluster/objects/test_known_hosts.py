"""Promise: a server of SFTP whose key is not that of a known host is refused, unless fsspec's configuration says otherwise.

paramiko need not be installed: a stand-in has what is asked of it.
"""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.config import conf

from chainfed_ray.cluster.objects.known_hosts import UnknownHost, host_key_options


class KnownKeys(dict[str, str]):
    """Hosts and their keys, a line each."""

    def load(self, path: str) -> None:
        self.update(line.split() for line in Path(path).read_text().splitlines())  # type: ignore[arg-type]

    def lookup(self, host: str) -> str | None:
        return self.get(host)

    def check(self, host: str, key: Any) -> bool:
        return self.get(host) == key.text


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    paramiko: Any = ModuleType("paramiko")
    paramiko.HostKeys, paramiko.MissingHostKeyPolicy = KnownKeys, object
    monkeypatch.setitem(sys.modules, "paramiko", paramiko)
    files = SimpleNamespace(__module__="fsspec.implementations.sftp", protocol=("sftp", "ssh"))
    monkeypatch.setattr(fsspec, "get_filesystem_class", lambda scheme: files)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def shown(key: str) -> None:
    """What is done when a server shows a key."""
    policy = host_key_options("sftp")["host_key_policy"]
    policy.missing_host_key(None, "host", SimpleNamespace(text=key, get_name=lambda: "ssh-ed25519"))


def test_a_known_host_is_believed_and_no_other(home: Path) -> None:
    with pytest.raises(UnknownHost, match=r"ssh-ed25519 key of host is not in ~/\.ssh/known_hosts .*ssh-keyscan"):
        shown("right")
    (home / ".ssh" / "known_hosts").write_text("host right\n")
    shown("right")
    with pytest.raises(UnknownHost, match="is another one in"):
        shown("wrong")


def test_the_configuration_of_fsspec_may_say_otherwise(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(conf, "sftp", {"host_key_policy": "warning"})
    assert host_key_options("sftp") == {}
    monkeypatch.setitem(conf, "sftp", {"host_key_policy": "reject"})
    with pytest.raises(UnknownHost):
        shown("right")
