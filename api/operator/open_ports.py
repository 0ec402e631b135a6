"""Ports of this machine on which a service, Ray or HAProxy listens to the network, for ``chainfed doctor``."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

import psutil
from rich.console import RenderableType
from rich.table import Column, Table

SERVICE_OF = "CHAINFED_SERVICE_OF"
"""The variable that each process of `chainfed serve` has: the folder of its storage."""
_NAMES = ("raylet", "gcs_server", "haproxy")
_TITLES = ("ray::", "ray:")  # what Ray's processes write in place of their command line
_MOST_CHARACTERS = 60


@dataclass(frozen=True)
class OpenPort:
    """A port that other machines reach; ``address`` is the one that it listens on."""

    port: int
    address: str
    process: str

    def document(self) -> dict[str, Any]:
        """The port as JSON."""
        return asdict(self)


def open_ports() -> list[OpenPort]:
    """The open ports of our processes, Ray's and HAProxy's, as far as this user may look at them."""
    found = set[OpenPort]()
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # it has ended, or belongs to another user
            if not _is_ours(process):
                continue
            title = " ".join(process.cmdline())[:_MOST_CHARACTERS].strip()
            name = title if title.startswith(_TITLES) else process.name()
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN and not _is_loopback(socket.laddr.ip):
                    found.add(OpenPort(socket.laddr.port, socket.laddr.ip, name))
    return sorted(found, key=lambda port: port.port)


def warning(ports: Sequence[OpenPort]) -> list[RenderableType]:
    """Says which ports are open, if any is: a firewall should close them, unless it is where the service answers."""
    if not ports:
        return []
    table = Table("open port", "address", Column("process", overflow="fold"), box=None, header_style="bold")
    for port in ports:
        table.add_row(str(port.port), port.address, port.process)
    return ["", "Other machines reach these. A firewall should close all but the service's own.", table]


def _is_ours(process: psutil.Process) -> bool:
    if process.name() in _NAMES:
        return True
    command = process.cmdline()
    return bool(command) and (command[0].startswith(_TITLES) or SERVICE_OF in process.environ())


def _is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback
