"""Programs that are forked from a process which has loaded the libraries: they run as if Python had been started for each."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from chainfed_ray.cluster.resources import runtime_env
from chainfed_ray.device import start_forked
from tests.watching import running, wait_for

_SERVER = """
import importlib, socket, sys
from chainfed_ray.device.fork_server import run, serve
descriptor, owner, seconds, *modules = sys.argv[1:]
listener = socket.socket(fileno=int(descriptor))
for module in modules:
    importlib.import_module(module)
program = serve(listener, int(owner), float(seconds))
if program is not None:
    run(program)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has an abstract space for names of sockets")


@pytest.fixture
def owner() -> Iterator[subprocess.Popen[bytes]]:
    """A process in place of Ray's."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def a_server(name: str, owner: int, *modules: str, seconds: float = 60.0) -> subprocess.Popen[bytes]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(start_forked.address(name, owner))
        listener.listen()
        descriptor = listener.fileno()
        command = [sys.executable, "-c", _SERVER, str(descriptor), str(owner), str(seconds), *modules]
        return subprocess.Popen(command, pass_fds=[descriptor], env=os.environ | {"OMP_NUM_THREADS": "1"})


def started(
    name: str, owner: int, program: Path | str, *arguments: str, folder: Path | None = None
) -> subprocess.Popen[str]:
    """A file for Ray's process, or code for one that is named."""
    is_file = isinstance(program, Path)
    what = [name, str(program)] if is_file else [f"{name}@{owner}", "-c", str(program)]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", start_forked.__file__, *what, *arguments],
        env=os.environ | {"RAY_RAYLET_PID": str(owner if is_file else os.getpid()), "WORD": "of its own"},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def a_program(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text)
    return path


@pytest.mark.slow
def test_a_program_has_the_arguments_streams_variables_and_folder_of_who_asks_and_he_its_exit_code(
    tmp_path: Path, owner: subprocess.Popen[bytes]
) -> None:
    program = a_program(
        tmp_path,
        "import os, sys\n"
        "print(__name__, sys.argv[1:], os.environ['WORD'], os.getcwd(), os.getpgrp() == os.getpid(), input())\n"
        "print('json' in sys.modules, os.getppid(), len(os.listdir('/proc/self/fd')))\n"
        "sys.exit(7)",
    )
    server = a_server("a", owner.pid, "json")
    with socket.socket(socket.AF_UNIX) as unclear:
        unclear.connect(start_forked.address("a", owner.pid))
        unclear.sendall(start_forked.LENGTH.pack(2) + b"{}")
        assert unclear.recv(1) == b"", "a request that is none is let go"
    for _ in range(2):
        asked = started("a", owner.pid, program, "one", "two words", folder=tmp_path)
        out, _ = asked.communicate("typed\n", timeout=60)
        first, second = out.splitlines()
        assert first == f"__main__ ['one', 'two words'] of its own {tmp_path} True typed"
        # Its standard streams and the folder that is read; none of the server's own.
        assert second == f"True {server.pid} 4"
        assert asked.returncode == 7
    owner.kill()
    assert server.wait(60) == 0, "it ends with its owner"


@pytest.mark.slow
def test_who_asks_and_the_program_end_together(tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
    code = "import os, sys\nprint(os.getpid(), flush=True)\ninput()\nassert sys.argv == ['-c', 'word']"
    server = a_server("b", owner.pid)
    first, second = started("b", owner.pid, a_program(tmp_path, code)), started("b", owner.pid, code, "word")
    assert first.stdout
    assert second.stdout
    one, other = psutil.Process(int(first.stdout.readline())), psutil.Process(int(second.stdout.readline()))
    first.kill()
    wait_for(lambda: not running([one]), "end of the program of who was ended")
    assert running([other])
    other.send_signal(signal.SIGKILL)
    assert second.wait(60) == 128 + signal.SIGKILL
    server.kill()
    for process in (first, second, server):
        process.communicate()


@pytest.mark.slow
def test_who_started_the_server_ends_with_his_own_program(owner: subprocess.Popen[bytes]) -> None:
    code = "import os\nprint(os.getpid(), flush=True)\ninput()"
    first = started("json", owner.pid, code)
    assert first.stdout
    one = int(first.stdout.readline())
    second = started("json", owner.pid, code)
    assert second.stdout
    assert second.stdout.readline()
    os.kill(one, signal.SIGKILL)
    assert first.wait(30) == 128 + signal.SIGKILL
    assert first.stdout.read() == "", "nobody holds its streams"
    assert second.poll() is None
    owner.kill()
    for process in (first, second):
        process.communicate(timeout=30)


@pytest.mark.slow
def test_processes_draw_numbers_of_their_own(tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
    """Ray would take two of its processes for one otherwise, and end them."""
    modules = shlex.split(runtime_env()["py_executable"])[-1].split(",")
    program = a_program(
        tmp_path,
        "import random, ray, uuid\n"
        "print(ray.ActorClassID.from_random().hex(), random.random(), uuid.uuid4())\n"
        "print(len(__import__('os').listdir('/proc/self/task')))",
    )
    server = a_server("c", owner.pid, "chainfed_ray.device.lean_imports", *modules)
    told = [started("c", owner.pid, program).communicate(timeout=120)[0].splitlines() for _ in range(2)]
    server.kill()
    server.wait()
    (one, threads), (other, _) = told
    assert not set(one.split()) & set(other.split())
    assert threads == "1", "a thread of the server would not be in its forks, nor let go what it held"


@pytest.mark.slow
def test_a_process_that_stays_stopped_is_ended(tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
    """It hears nobody who wants it to end, and would keep its memory as long as the server is there."""
    program = a_program(tmp_path, "import os\nprint(os.getpid(), flush=True)\nprint(input())")
    server = a_server("f", owner.pid, seconds=0.2)
    stopped, other = (started("f", owner.pid, program) for _ in range(2))
    assert stopped.stdout is not None
    os.kill(int(stopped.stdout.readline()), signal.SIGSTOP)
    assert stopped.wait(60) == 128 + signal.SIGKILL
    assert other.communicate("goes on", timeout=60)[0].splitlines()[1] == "goes on"
    server.kill()
    server.wait()
    stopped.communicate()


def test_a_server_without_processes_ends(owner: subprocess.Popen[bytes]) -> None:
    server = a_server("d", owner.pid, seconds=0.2)
    assert server.wait(60) == 0


def test_variables_that_libraries_read_once_make_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    address = start_forked.address("e", 1)
    monkeypatch.setenv("WORD", "of its own")
    assert start_forked.address("e", 1) == address
    monkeypatch.setenv("HF_HOME", "elsewhere")
    assert start_forked.address("e", 1) != address


@pytest.mark.slow
def test_without_a_server_the_program_runs_as_usual(tmp_path: Path, owner: subprocess.Popen[bytes]) -> None:
    program = a_program(tmp_path, "import sys\nprint(sys.argv[1:])\nsys.exit(3)")
    asked = started("no_such_module", owner.pid, program, "one")
    out, words = asked.communicate(timeout=120)
    assert out == "['one']\n"
    assert "no_such_module" in words
    assert asked.returncode == 3
