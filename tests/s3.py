"""Starts a real S3 server for the tests, moto's, in a process of its own: it needs packages of other versions than ours."""

import os
import select
import shutil
import signal
import socket
import socketserver
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

from tests.project import ROOT

_DEADLINE = 60.0
_BUCKET = "chainfed"
_AWAY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def installed() -> Path | None:
    """The server's program, which `make .venv-s3/.installed` installs; None if it is not there."""
    found = [ROOT / ".venv-s3" / "bin" / "moto_server", Path(shutil.which("moto_server") or "")]
    return next((path for path in found if path.is_file()), None)


class Server:
    """The server, with an empty bucket. What asks it goes through a door, which can be shut: the store is away then.

    With a ``recording``, a file, it has what it had when it is started again: all that it was asked is in there.
    """

    def __init__(self, program: Path, recording: Path | None = None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.door = _Door(self.port)
        self._command = [program, "-p", str(self.port)]
        kept = {"MOTO_ENABLE_RECORDING": "1", "MOTO_RECORDER_FILEPATH": str(recording)} if recording else {}
        self._environment = os.environ | kept
        self._start()

    def wait(self) -> None:
        """Wait until it answers, make the bucket, and open the door."""
        self._ask_until_it_answers("PUT", _BUCKET)
        self.door.start()

    def _start(self) -> None:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet, env=self._environment)

    def stop(self) -> None:
        """Stop the process, as an operator does."""
        self._process.terminate()
        self._process.wait(_DEADLINE)

    def start_again(self) -> None:
        """Start another one, with what the one before had."""
        self._start()
        self._ask_until_it_answers("POST", "moto-api/recorder/replay-recording")

    def freeze(self) -> None:
        """Let it not run, as on a machine that hangs."""
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)

    def _ask_until_it_answers(self, method: str, path: str) -> None:
        ends = monotonic() + _DEADLINE
        while True:
            try:
                return self.ask(method, path)
            except OSError:
                assert monotonic() < ends, "moto's server did not start"
                sleep(0.05)

    def ask(self, method: str, path: str) -> None:
        """Send a request of one's own."""
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}/{path}", method=method)
        urllib.request.urlopen(asked, timeout=_DEADLINE).close()

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the store is found, as an operator sets them."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.door.port}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "tests",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def url(self, prefix: str) -> str:
        """The URL of a store with this prefix."""
        return f"s3://{_BUCKET}/{prefix}"

    def end(self) -> None:
        """End the process, and wait for that."""
        self.door.shutdown()
        self.door.server_close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(_DEADLINE)


class _Door(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine. While it is ``shut``, each request is answered with 503.

    What callers send is ``heard`` before it is passed on.
    """

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Passing)
        self.port, self.behind, self.shut = self.server_address[1], port, False
        self.heard: Callable[[bytes], None] = _nothing

    def start(self) -> None:
        """Let connections in."""
        Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()


class _Passing(socketserver.BaseRequestHandler):
    """One connection: pieces of requests are passed on as they come, and pieces of answers back."""

    def handle(self) -> None:
        """See ``BaseRequestHandler``."""
        door = self.server
        assert isinstance(door, _Door)
        with suppress(OSError), socket.create_connection(("127.0.0.1", door.behind)) as onward:
            while piece := _either(self.request, onward):
                come, of_caller = piece
                if of_caller:
                    door.heard(come)
                if of_caller and door.shut:
                    self.request.sendall(_AWAY)
                    return
                (onward if of_caller else self.request).sendall(come)


def _nothing(_: bytes) -> None:
    pass


def _either(caller: socket.socket, onward: socket.socket) -> tuple[bytes, bool] | None:
    """The next bytes of either side, and whether they are the caller's; None at the end."""
    ready, _, _ = select.select([caller, onward], [], [])
    come = ready[0].recv(65536)
    return (come, ready[0] is caller) if come else None


@contextmanager
def server(program: Path, recording: Path | None = None) -> Iterator[Server]:
    """Start a server. Meanwhile the environment of this process leads to it."""
    started = Server(program, recording)
    before = {name: os.environ.get(name) for name in started.environment}
    try:
        started.wait()
        os.environ |= started.environment
        yield started
    finally:
        started.end()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
