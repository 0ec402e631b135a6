"""What can be seen of a test's own processes from outside: tensors, processes, bytes; and waiting for what is to be seen."""

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

import psutil
from torch import Tensor


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """The first true value of ``condition``."""
    ends = monotonic() + seconds
    while not (found := condition()):
        assert monotonic() < ends, f"no {what} within {seconds:g} s"
        sleep(0.05)
    return found


def tensors_alive() -> list[Tensor]:
    """Every tensor that somebody still holds."""
    gc.collect()
    # By type, not isinstance: that would ask lazy proxies of libraries for their class, and make them load it.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def processes_below(*names: str, pid: int | None = None) -> list[psutil.Process]:
    """The processes below this one, or below ``pid``, whose command line has one of ``names``: those of a test's own Ray."""
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if any(name in command_of(process) for name in names)]


def command_of(process: psutil.Process) -> str:
    """Its command line; nothing once it has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def client_processes() -> list[psutil.Process]:
    """The processes of our client actors."""
    return processes_below("ClientActor")


def private_bytes(pid: int) -> int:
    """What a process holds of its own: not the pages of libraries, nor of the store that it shares."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched_from_outside(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """The most of their own that some processes held meanwhile, as this process sees it in /proc."""
    highest: dict[int, int] = {}
    over = Event()

    def look() -> None:
        while not over.wait(0.005):
            for pid in pids:
                with suppress(OSError, IndexError):  # it may end at any time
                    highest[pid] = max(private_bytes(pid), highest.get(pid, 0))

    watcher = Thread(target=look)
    watcher.start()
    try:
        yield highest
    finally:
        over.set()
        watcher.join()
