"""Promise: a port of a service that other machines reach is told, with who listens, and none that they do not reach."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from chainfed_ray.api.operator.open_ports import SERVICE_OF, open_ports, warning

_LISTENS = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
input()
"""


@contextmanager
def listening(address: str, folder: Path | None) -> Iterator[int]:
    """The port of a process that listens on ``address``; of the service in a folder, or of nobody's."""
    environment = {**os.environ, **({SERVICE_OF: str(folder)} if folder else {})}
    command = [sys.executable, "-c", _LISTENS, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.parametrize(("address", "is_open"), [("0.0.0.0", True), ("127.0.0.1", False), ("127.1.2.3", False)])
def test_an_open_port_of_a_service_is_told(tmp_path: Path, address: str, is_open: bool) -> None:
    with listening(address, tmp_path) as port:
        found = [one for one in open_ports() if one.port == port]
    assert bool(found) == is_open
    if is_open:
        assert found[0].process.startswith("python")
        assert found[0].document() == {"port": port, "address": "0.0.0.0", "process": found[0].process}
        said = StringIO()
        Console(file=said, width=80).print(*warning(found), sep="\n")
        assert re.search(rf"{port} +0\.0\.0\.0 +python", said.getvalue())
    assert warning([]) == []


def test_a_port_of_another_program_is_its_own(tmp_path: Path) -> None:
    with listening("0.0.0.0", None) as port:
        assert port not in {one.port for one in open_ports()}
