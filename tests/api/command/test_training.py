"""Promises of ``chainfed run`` where its Ray has failed: it ends with all that is below it, whoever reads what it says."""

import json
import os
import subprocess
import sys

import psutil
import pytest

# Another thread waits for Ray for ever, as the main one does in a run.
FAILS = """
import os, subprocess, sys
from threading import Event, Thread
from chainfed_ray.api.command import training

training._WORDS_SECONDS = 0.5
below = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
os.write(int(sys.argv[2]), str(below.pid).encode())
if sys.argv[1] == "closed":
    os.close(2)
if sys.argv[1] == "none":
    sys.stderr = None
if sys.argv[1] == "full":
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, bytes(4096))
    except BlockingIOError:
        os.set_blocking(2, True)
Thread(target=training._end_at_once, args=["job", True, "Ray has gone"]).start()
Event().wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["read", "closed", "none", "full"])
def test_a_run_whose_ray_fails_ends_whether_its_words_are_read_or_not(how: str) -> None:
    told, tell = os.pipe()
    command = [sys.executable, "-c", FAILS, how, str(tell)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=[tell]) as run:
        try:
            assert run.wait(timeout=60) == 1
            below = int(os.read(told, 20))
            assert not psutil.pid_exists(below) or psutil.Process(below).status() == psutil.STATUS_ZOMBIE
            assert run.stdout is not None
            assert run.stderr is not None
            said = run.stdout.read()
            assert how == "full" or json.loads(said)["status"] == "failed"
            assert how != "read" or "job was ended" in run.stderr.read().decode()
        finally:
            run.kill()
            for end in (told, tell):
                os.close(end)
