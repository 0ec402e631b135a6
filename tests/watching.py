"""Watches a test's own processes: counts slices, lists tensors and processes, measures memory, and waits for a condition."""

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any

import psutil
import torch
from torch import Tensor

from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.matrices import SliceReader


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until ``condition`` gives a true value, and give that value. Fail after ``seconds``: there was no ``what``.

    What took long is looked at less often: to look takes time from what is waited for, on a machine of two cores.
    """
    begun = monotonic()
    while not (found := condition()):
        waited = monotonic() - begun
        assert waited < seconds, f"no {what} within {seconds:g} s"
        sleep(min(0.25, max(0.05, waited / 20)))
    return found


def tensors_alive() -> list[Tensor]:
    """Every tensor in this process that is still referenced."""
    gc.collect()
    # isinstance would ask the libraries' lazy proxies for their class, and make them load their modules.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


class CountedSlices:
    """A reader that counts the slices of each matrix."""

    def __init__(self, reader: SliceReader) -> None:
        self.reader, self.counts = reader, Counter[str]()

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for piece in self.reader.slices(name):
            self.counts[name] += 1
            yield piece

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        return self.reader.numbers(name, first, count)


class CountedReads(Checkpoint):
    """A checkpoint that counts the bytes of the slices read from it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read_bytes = 0

    def slice(self, name: str, first: int, count: int, buffer: Tensor, dtype: torch.dtype) -> Tensor:
        self.read_bytes += count * self.row_bytes(name)
        return super().slice(name, first, count, buffer, dtype)


def processes_below(*names: str, pid: int | None = None) -> list[psutil.Process]:
    """The descendants of this process, or of ``pid``, whose command line has one of ``names``.

    Processes of another Ray cluster on the machine are not among them.
    """
    below = psutil.Process(pid).children(recursive=True)
    return [process for process in below if any(name in command_of(process) for name in names)]


def command_of(process: psutil.Process) -> str:
    """The command line of a process; empty if the process has ended."""
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of ``processes`` that still run. One that has ended is listed until its parent asks for it."""

    def runs(process: psutil.Process) -> bool:
        with suppress(psutil.NoSuchProcess):
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        return False

    return [process for process in processes if runs(process)]


def client_processes() -> list[psutil.Process]:
    """The processes of client actors below this one."""
    return processes_below("ClientActor")


def private_bytes(pid: int) -> int:
    """The resident bytes of a process, without the pages of libraries and of shared memory."""
    return int(Path(f"/proc/{pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@contextmanager
def watched_from_outside(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """The peak of ``private_bytes`` of each process during the block, as read from /proc every 5 ms."""
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
