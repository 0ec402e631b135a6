"""How far the turn of this process is, for whoever asks while it runs: what it does, and how long it has worked.

Another thread of the process may ask (``progress``). A process takes one turn at a time.
"""

from time import process_time, sleep
from typing import NamedTuple

from chainfed_ray.activity import Activity, Reporter
from chainfed_ray.device.cap import enter_phase


class Progress(NamedTuple):
    """``doing`` is the turn's phase, ``worked`` the seconds that the process has worked: CPU time, and simulated slowness.

    A turn that works is not lost, however slow it is. One that waits in vain, for a disk or for a lock, does not work.
    """

    doing: Activity
    worked: float


class _Turn:
    """The turn of this process."""

    doing = Activity(what="getting ready")
    simulated = 0.0  # seconds


def progress() -> Progress:
    """How far the turn of this process is."""
    return Progress(_Turn.doing, process_time() + _Turn.simulated)


def begin(phase: str) -> Reporter:
    """Begin a phase of the turn, such as ``training``. The reporter counts its parts, if they are known."""
    enter_phase(phase)
    reporter = Reporter(phase, _hear)
    reporter.begin()
    return reporter


def simulate(seconds: float) -> None:
    """Sleep for ``seconds``, in which a slower machine would still work."""
    whole = int(seconds)
    for _ in begin("working as slowly as its machine").each(range(whole), whole, "seconds"):
        sleep(1)
        _Turn.simulated += 1
    sleep(seconds - whole)


def _hear(activity: Activity) -> None:
    _Turn.doing = activity
