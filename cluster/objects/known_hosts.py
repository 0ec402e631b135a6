"""Which servers of SFTP are believed: those whose key the known hosts of OpenSSH have.

fsspec takes any server's key unless it is told otherwise, so whoever is between would get what is stored, and the password.
"""

from pathlib import Path
from typing import Any

_FILES = ("~/.ssh/known_hosts", "/etc/ssh/ssh_known_hosts")
_SETTING = "host_key_policy"


class UnknownHost(PermissionError):
    """The key that a server shows is not that of a known host."""


def host_key_options(scheme: str) -> dict[str, Any]:
    """What fsspec is told of keys of servers: nothing if the filesystem has none, or if its own configuration says it.

    ``reject`` there is the same as nothing: fsspec reads no known hosts, and would refuse every server.
    """
    from fsspec import get_filesystem_class
    from fsspec.config import conf

    kind = get_filesystem_class(scheme)
    if kind.__module__ != "fsspec.implementations.sftp":
        return {}
    said = [conf[name][_SETTING] for name in kind.protocol if _SETTING in conf.get(name, {})]
    return {} if said and said[-1] != "reject" else {_SETTING: _policy()}


def _policy() -> Any:
    from paramiko import HostKeys, MissingHostKeyPolicy

    class KnownHosts(MissingHostKeyPolicy):  # type: ignore[misc]
        """Asked for each connection, since fsspec gives paramiko no known hosts."""

        def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
            known = HostKeys()
            for path in (Path(file).expanduser() for file in _FILES):
                if path.is_file():
                    known.load(str(path))
            if not known.check(hostname, key):
                what = "is another one in" if known.lookup(hostname) else "is not in"
                raise UnknownHost(
                    f"the {key.get_name()} key of {hostname} {what} {' or '.join(_FILES)}; if `ssh-keyscan` shows the key that "
                    "the server's operator names, add its line there"
                )

    return KnownHosts()
