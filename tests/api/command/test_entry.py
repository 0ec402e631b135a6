"""Promise: Ctrl-C ends a command quietly at any moment, also while Python still imports it."""

import signal
import subprocess
import sys
from contextlib import suppress
from random import Random
from threading import Event

import pytest

from chainfed_ray.api.command.local_service import free_port
from tests.project import ROOT

# A shell's background job, such as these tests may be, is started to ignore Ctrl-C.
BEGIN = "import os, signal; signal.signal(signal.SIGINT, signal.{}); from chainfed_ray.api.command.entry import main; "
CHOICES = Random(28)
MOMENTS = [(number % 3, CHOICES.uniform(0.005, 1.0)) for number in range(15)]


def begun(how: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A command that has begun just now, and has not imported anything of its own yet."""
    code = BEGIN.format(how) + "os.write(2, b'begun\\n'); main()"
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert process.stderr.readline() == b"begun\n"
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("which", "moment"), MOMENTS)
def test_ctrl_c_in_the_first_second_ends_a_command_without_a_traceback(which: int, moment: float) -> None:
    nobody = f"http://127.0.0.1:{free_port('127.0.0.1')}"
    commands = [("plan", f"{ROOT}/examples/demo.yaml"), ("list", "--address", nobody), ("--help",)]
    process = begun("default_int_handler", *commands[which])
    with suppress(subprocess.TimeoutExpired):
        process.wait(moment)
    process.send_signal(signal.SIGINT)
    _, words = process.communicate(timeout=60)
    said = words.decode()
    assert not [mark for mark in ("Traceback", "KeyboardInterrupt", "Exception ignored", "File ") if mark in said], said
    assert process.returncode in (130, -signal.SIGINT, *([] if which == 0 else [0, 1])), said


@pytest.mark.slow
def test_a_command_that_is_to_ignore_ctrl_c_is_not_ended_by_it() -> None:
    process = begun("SIG_IGN", "--version")
    done = Event()
    while not done.wait(0.02) and process.poll() is None:
        process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=60)[1], process.returncode) == (b"", 0)
