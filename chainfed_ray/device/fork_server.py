"""The fork server: loads the libraries of our processes once, and forks a process for each program that is to run.

A process that loads torch and transformers takes seconds of CPU time and 190 MiB of its own. A fork takes a tenth of the time,
and shares that memory with its siblings until one of them writes to it. ``start_forked`` starts the server and asks it.

Each program runs in a process group of its own, with the environment, the folder and the standard streams of who asked. The
server ends when its owner has ended, or when it has had no process for a while.
"""

import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic

from chainfed_ray.device.lean_imports import load_models
from chainfed_ray.device.start_forked import EXIT_CODE, LENGTH, STARTED, is_own, received

_IDLE_SECONDS = 60.0
_STOPPED = 5  # times as long may a process be stopped, until it is ended: it hears nothing, and Ray takes it for gone
_ASK_SECONDS = 5.0  # how long a request that has begun may take to arrive


@dataclass(frozen=True)
class Program:
    """A program to run: ``arguments`` are its path, or ``-c`` and its code, and what follows.

    ``streams`` are its standard streams, as descriptors.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]


@dataclass(frozen=True)
class _Child:
    pid: int
    handle: int  # readable when the process has ended
    asker: socket.socket | None  # readable when who asked has ended; None afterwards

    def descriptors(self) -> tuple[int, ...]:
        return (self.handle, self.asker.fileno()) if self.asker else (self.handle,)


def main() -> None:
    """Serve on the socket that the command line gives, until nobody needs it; in each fork, run the program."""
    descriptor, owner, modules = sys.argv[1:]
    listener = socket.socket(fileno=int(descriptor))
    listener.listen()  # who connects from now on sees this process at the other end
    load_models()
    for module in modules.split(","):
        importlib.import_module(module)
    # What is loaded by now stays. The collector would write to its pages, and no fork could share them any more.
    gc.collect()
    gc.freeze()
    program = serve(listener, int(owner))
    if program is not None:
        run(program)


def serve(listener: socket.socket, owner: int, idle_seconds: float = _IDLE_SECONDS) -> Program | None:
    """Fork a process for each request that arrives on ``listener``.

    Returns in each of these processes, with the program that it is to run. In the server it returns None: when the process
    ``owner`` has ended, or when ``idle_seconds`` have passed without a process or a request.
    """
    try:
        owned = os.pidfd_open(owner)
    except ProcessLookupError:
        return None
    children: list[_Child] = []
    stopped: dict[int, float] = {}  # when a process was first seen so
    last = monotonic()
    while True:
        watched = select.poll()
        for descriptor in (owned, listener.fileno(), *(each for child in children for each in child.descriptors())):
            watched.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in watched.poll(1000 * idle_seconds)}
        left = [child for child in children if child.handle not in ready]
        for child in children:
            if child not in left:
                _tell_end(child)
        children = [_without_asker(child) if ready & set(child.descriptors()) else child for child in left]
        now = monotonic()
        stopped = {child.pid: stopped.get(child.pid, now) for child in children if _is_stopped(child.pid)}
        for hung, since in stopped.items():
            if now - since > _STOPPED * idle_seconds:
                os.kill(hung, signal.SIGKILL)
        if owned in ready:
            return None
        if listener.fileno() in ready:
            asked = _asked(listener)
            if asked is not None:
                program, asker = asked
                pid = _forked()
                if pid is None:  # no more processes may be made; who asked tries it himself
                    _close(program.streams)
                    asker.close()
                    continue
                if pid == 0:
                    _leave(listener, owned, asker, children)
                    return program
                children.append(_begun(pid, program, asker))
        if children:
            last = monotonic()
        elif monotonic() - last >= idle_seconds:
            return None


def run(program: Program) -> None:
    """Become ``program``, as if Python had been started with its arguments."""
    os.setpgid(0, 0)  # Ray ends the group of a process that it ends
    for stream, given in enumerate(program.streams):
        os.dup2(given, stream)
        os.close(given)
    os.environ.clear()
    os.environ.update(program.environment)
    os.chdir(program.folder)
    # The server counts on one thread. Who asks for more has set the variable that torch would have read.
    if (threads := program.environment.get("OMP_NUM_THREADS", "")).isdecimal() and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(threads))
    if program.arguments[0] == "-c":
        sys.argv[:] = ["-c", *program.arguments[2:]]
        exec(program.arguments[1], {"__name__": "__main__"})
        return
    sys.argv[:] = program.arguments
    sys.path.insert(0, str(Path(program.arguments[0]).parent))
    runpy.run_path(program.arguments[0], run_name="__main__")


def _asked(listener: socket.socket) -> tuple[Program, socket.socket] | None:
    """A request, and the connection of who asks; None if it is somebody else's, broke off, or is none."""
    asker, _ = listener.accept()
    asker.settimeout(_ASK_SECONDS)
    streams: list[int] = []
    try:
        if not is_own(asker):
            raise PermissionError("somebody else asks")
        head, streams, _, _ = socket.recv_fds(asker, LENGTH.size, 3)
        head += received(asker, LENGTH.size - len(head))
        document = json.loads(received(asker, *LENGTH.unpack(head)))
        return Program(document["arguments"], document["environment"], document["folder"], streams), asker
    except (OSError, ValueError, LookupError, TypeError):
        asker.close()
        _close(streams)
        return None


def _forked() -> int | None:
    with suppress(OSError):
        return os.fork()
    return None


def _begun(pid: int, program: Program, asker: socket.socket) -> _Child:
    _close(program.streams)
    with suppress(OSError):  # who asked has ended; the next look at the connection ends the process
        asker.sendall(STARTED)
    return _Child(pid, os.pidfd_open(pid), asker)


def _tell_end(child: _Child) -> None:
    """Tell who asked how a process has ended."""
    _, status = os.waitpid(child.pid, 0)
    os.close(child.handle)
    if child.asker:
        with suppress(OSError):  # nobody waits
            child.asker.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
        child.asker.close()


def _without_asker(child: _Child) -> _Child:
    """End a process, since who asked for it has ended."""
    os.kill(child.pid, signal.SIGKILL)
    if child.asker:
        child.asker.close()
    return replace(child, asker=None)


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal, and not yet told to go on."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def _leave(listener: socket.socket, owned: int, asker: socket.socket, children: list[_Child]) -> None:
    """In a new process: close what is the server's. Who asked would not see the server's end otherwise."""
    for connection in (listener, asker, *(child.asker for child in children if child.asker)):
        connection.close()
    _close([owned, *(child.handle for child in children)])


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    main()
