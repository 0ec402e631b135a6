"""A service without Ray, for tests of its owner. It is a file of its own, so that each of its processes loads no torch."""

import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from chainfed_ray.api.command.service_process import RayAnswered, Ready
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.errors import InvalidSetting, ServiceNotStarted


class Healthy(BaseHTTPRequestHandler):
    """Answers everything with 200."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def without_ray(settings: Settings, _: dict[str, str], host: str, port: int, owner: "Connection[Any, Any]") -> None:
    """Fail as often as a file says, with the error that it names; then answer, with a "raylet" below, which may be "lost"."""
    os.setsid()  # as the service does
    starts, failures, error, lost = (settings.storage.root / name for name in ("starts", "failures", "error", "lost"))
    starts.write_text(starts.read_text() + "." if starts.exists() else ".")
    if len(starts.read_text()) <= int(failures.read_text()):
        wrong = InvalidSetting("TMPDIR", "/long", "a shorter path")
        owner.send(wrong if error.exists() else ServiceNotStarted("here", "a port was taken"))
        return
    server = HTTPServer((host, port), Healthy)
    Thread(target=server.serve_forever, daemon=True).start()
    # It hears nobody's end, and has none of the variables by which it could be known, like Ray's agents.
    with subprocess.Popen([sys.executable, "-c", "__import__('signal').pause()  # input()"], env={}) as raylet:
        owner.send(Ready({"raylet": raylet.pid}))
        owner.send(RayAnswered(hears_of_machine=not lost.exists()))
        owner.recv()
        raylet.kill()
