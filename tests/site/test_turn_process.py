"""Promise: a worker of a site that hangs holds no slot for ever."""

import subprocess
import sys

from chainfed_ray.site.turn_process import killed_if_silent
from tests.watching import wait_for


def test_a_process_of_which_nothing_is_heard_is_killed_and_another_is_not() -> None:
    command = [sys.executable, "-c", "input()"]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as silent,
        subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as told,
        killed_if_silent(silent, 0.3),
        killed_if_silent(told, 0.3) as hear,
    ):

        def has_ended() -> bool:
            hear()
            return silent.poll() is not None

        wait_for(has_ended, "end of the silent one")
        assert told.poll() is None
        told.kill()
