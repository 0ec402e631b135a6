"""The worker of a site as its parent sees it: a process that is asked, and that can be ended at any time."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

from pydantic import ValidationError

from chainfed_ray.device import start_forked
from chainfed_ray.device.peak import ENVIRONMENT
from chainfed_ray.wire.envelope import KEPT_ANSWER, Answer, NotDone, Order

_END_SECONDS = 5.0
# Without a word of a worker. Once it has loaded its libraries, it says each second how far it is.
_SILENCE_SECONDS = 300.0
_LOOKS = 60  # in that time
_LOADED = "chainfed_ray.site.worker"
_WORK = (  # where it is no fork, the worker's own imports would load all of transformers
    "from chainfed_ray.device.lean_imports import load_models; load_models();"
    " from chainfed_ray.site.worker import main; main()"
)


class TurnProcess:
    """Starts a worker (``worker.py``) when an order comes, and keeps it for the next one.

    ``settings`` are the worker's arguments. Workers are forked from a process that has loaded the libraries: it ends with this
    one, or when it has had no worker for a minute.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self._process: subprocess.Popen[str] | None = None

    def carry_out(
        self,
        order: Order,
        document: Path,
        tensors: Path | None,
        sent: Path,
        heard: Callable[[Mapping[str, Any]], None],
    ) -> Answer:
        """Have ``order`` carried out. ``heard`` is told how far the turn is; if it raises, the process is ended."""
        process = self._started()
        files = {"document": str(document), "tensors": tensors and str(tensors), "sent": str(sent)}
        asked = {"order": order.model_dump(mode="json"), **files}
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            with killed_if_silent(process) as hear:
                for line in process.stdout:
                    hear()
                    said = _said(line)
                    if "heartbeat" in said:
                        heard(said["heartbeat"])
                    if "answer" in said:
                        return KEPT_ANSWER.validate_json(json.dumps(said["answer"]))
        except (OSError, ValidationError):
            self.end()
            return NotDone(reason="error", kind="WorkerDied")
        except BaseException:
            self.end()
            raise
        self.end()
        return NotDone(reason="error", kind="WorkerDied")

    def end(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()

    def _started(self) -> subprocess.Popen[str]:
        if self._process and self._process.poll() is not None:
            self.end()
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", start_forked.__file__, f"{_LOADED}@{os.getpid()}"),
                    *("-c", _WORK, json.dumps(self._settings)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # Ctrl-C is for the parent, which ends this process in its own time
            )
        return self._process


@contextmanager
def killed_if_silent(
    process: "subprocess.Popen[str]", seconds: float = _SILENCE_SECONDS
) -> Iterator[Callable[[], None]]:
    """Kill ``process`` if nothing is heard of it for so long in the block: it hangs, and would hold its slot for ever.

    What this yields is called when something is heard. Looks are counted, since this process may have been stopped, too.
    """
    heard, over = Event(), Event()

    def watch() -> None:
        quiet = 0
        while not over.wait(seconds / _LOOKS):
            quiet = 0 if heard.is_set() else quiet + 1
            heard.clear()
            if quiet > _LOOKS:
                process.kill()
                return

    Thread(target=watch, daemon=True).start()
    try:
        yield heard.set
    finally:
        over.set()


def _said(line: str) -> dict[str, Any]:
    """What a line says; nothing if it is not the worker's: a library may print as well."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
