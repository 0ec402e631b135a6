"""Promise: Ctrl-C ends a command quietly, also while it imports its libraries, and while Python ends it."""

import signal
import subprocess
import sys
from contextlib import suppress
from random import Random
from time import monotonic

import pytest

from chainfed_ray.api.command.local_service import free_port
from tests.project import ROOT

DEMO = f"{ROOT}/examples/demo.yaml"
# A shell's background job, such as these tests may be, is started to ignore Ctrl-C.
BEGIN = "import os, signal; signal.signal(signal.SIGINT, signal.{}); from chainfed_ray.api.command.entry import main; "
# Where a library waits in a destructor, Python prints an interruption, and goes on.
WAITS = """
import atexit, sys, time

def wait():
    os.write(2, b"waiting\\n")
    for _ in range(600):
        time.sleep(0.1)

class Waiting:
    def __del__(self):
        wait()

class Finder:
    def find_spec(self, name, *_):
        if name == moment:
            Waiting()
            os._exit(3)

moment = sys.argv.pop(1)
sys.meta_path.insert(0, Finder())
if moment == "the end":
    atexit.register(wait)
"""
CHOICES = Random(28)
MOMENTS = [(number % 3, CHOICES.uniform(0.005, 1.0)) for number in range(15)]


def begun(how: str, *arguments: str, first: str = "") -> "subprocess.Popen[bytes]":
    """A command that has begun just now, and has not imported anything of its own yet. Its process does ``first`` before."""
    code = f"{BEGIN.format(how)}{first}\nos.write(2, b'begun\\n'); main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"begun\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "arguments", "code"),
    [
        ("chainfed_ray.api.command.cli", ["--version"], 130),
        ("chainfed_ray.api.command.training", ["run", DEMO], 130),
        ("chainfed_ray.planning.dry_run", ["plan", DEMO], 130),
        ("the end", ["--version"], -signal.SIGINT),
    ],
)
def test_ctrl_c_while_a_library_is_imported_or_python_ends(moment: str, arguments: list[str], code: int) -> None:
    process = begun("default_int_handler", moment, *arguments, first=WAITS)
    assert process.stderr is not None
    assert process.stderr.readline() == b"waiting\n"
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=120)[1], process.returncode) == (b"", code)


@pytest.mark.slow
@pytest.mark.parametrize(("which", "moment"), MOMENTS)
def test_ctrl_c_in_the_first_second_ends_a_command_without_a_traceback(which: int, moment: float) -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    arguments, done = [(["plan", DEMO], []), (["list", "--address", nobody], [1]), (["--help"], [0])][which]
    process = begun("default_int_handler", *arguments)
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    said = words.decode()
    assert not [mark for mark in ("Traceback", "KeyboardInterrupt", "Exception ignored", "File ") if mark in said], said
    assert process.returncode in (130, -signal.SIGINT, *done), said


@pytest.mark.slow
def test_a_command_that_is_to_ignore_ctrl_c_is_not_ended_by_it() -> None:
    process, ends = begun("SIG_IGN", "--version"), monotonic() + 60
    try:
        while process.poll() is None and monotonic() < ends:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        assert process.poll() == 0
    finally:
        process.kill()
        _, words = process.communicate(timeout=60)
    assert words == b""


@pytest.mark.slow
def test_a_command_that_an_earlier_version_has_installed_does_not_run_without_utf_8() -> None:
    code = "from chainfed_ray.api.command.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TypeError: main() missing 1 required positional argument" in done.stderr
