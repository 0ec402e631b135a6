"""Ports of this machine on which a service, Ray or HAProxy listens to the network, for ``chainfed doctor``."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

import psutil

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
            name = " ".join(process.cmdline())[:_MOST_CHARACTERS].strip() or process.name()
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN and not _is_loopback(socket.laddr.ip):
                    found.add(OpenPort(socket.laddr.port, socket.laddr.ip, name))
    return sorted(found, key=lambda port: port.port)


def warnings(ports: Sequence[OpenPort]) -> list[str]:
    """A line for each open port."""
    return [
        f"open to the network: port {port.port} on {port.address}, of {port.process}; a firewall should close it, unless "
        "it is where the service answers"
        for port in ports
    ]


def _is_ours(process: psutil.Process) -> bool:
    if process.name() in _NAMES:
        return True
    command = process.cmdline()
    return bool(command) and (command[0].startswith(_TITLES) or SERVICE_OF in process.environ())


def _is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback
