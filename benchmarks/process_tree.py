"""The memory and CPU time of a process and of all below it."""

from collections.abc import Iterable

import psutil


def held_bytes(root: psutil.Process) -> tuple[int, int]:
    """How many processes are below ``root``, and their memory in bytes.

    It is their proportional set size: a page that several processes share counts once in all.
    """
    sizes = []
    for process in root.children(recursive=True):
        try:
            sizes.append(process.memory_full_info().pss)
        except psutil.Error:  # it has just ended
            continue
    return len(sizes), sum(sizes)


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """The CPU seconds that ``processes`` have taken."""
    seconds = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        seconds += times.user + times.system
    return seconds
