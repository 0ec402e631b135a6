"""Runs the cells of the accuracy benchmark in an order that their needs allow, some at a time, and prints each result."""

from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from statistics import fmean
from threading import Event
from time import perf_counter
from typing import Any

from benchmarks.accuracy_cells import Cell, Run, Study
from benchmarks.accuracy_rows import Row, Rows
from benchmarks.accuracy_runs import Runner

Say = Callable[[str], None]
_POLL_SECONDS = 0.5  # between two looks for an interruption


def complete(study: Study, rows: Rows, runner: Runner, jobs: int, say: Say, interrupted: Event | None = None) -> None:
    """Add to ``rows`` the row of every cell that was asked for, and of those that they need; make ``jobs`` runs at a time.

    If a cell fails, so do the cells that need it; the others go on. An interruption ends the runs that are being made.

    Raises:
        KeyboardInterrupt: ``interrupted`` was set. A signal's handler sets it, and raises nothing: an exception that is raised
            anywhere may leave a lock of the threads taken for ever.
    """
    schedule = _Schedule(study, rows, runner, jobs, say)
    with ThreadPoolExecutor(jobs) as threads:
        try:
            while schedule.waiting or schedule.running:
                schedule.start(threads)
                schedule.collect(interrupted or Event())
        except BaseException:
            runner.stop()
            raise


class _Schedule:
    def __init__(self, study: Study, rows: Rows, runner: Runner, jobs: int, say: Say) -> None:
        self._study, self._rows, self._runner, self._jobs = study, rows, runner, jobs
        self.waiting = [cell for cell in study.with_needs() if not rows.find(study.key(cell))]
        self.running: dict[Future[tuple[dict[str, Any], float]], tuple[Cell, Run]] = {}
        self._failed: set[Cell] = set()
        self._progress = _Progress(self.waiting, jobs, say)

    def start(self, threads: ThreadPoolExecutor) -> None:
        """Start the waiting cells whose needs are met, unless an equal run is being made: its row will serve both."""
        for cell in list(self.waiting):
            if len(self.running) == self._jobs:
                return
            needs = self._study.needs(cell)
            if failed := next((need for need in needs if need in self._failed), None):
                self._fail(cell, f"it needs {described(failed)}")
            elif all(self._rows.find(self._study.key(need)) for need in needs):
                found = self._study.next(cell, self._rows)
                if isinstance(found, Row):
                    self.waiting.remove(cell)
                    self._add(cell, found, None)
                elif all(found != run for _, run in self.running.values()):
                    self.waiting.remove(cell)
                    self.running[threads.submit(_timed, self._runner, found)] = (cell, found)

    def collect(self, interrupted: Event) -> None:
        """Wait until a run ends, and keep its row."""
        done = set[Future[tuple[dict[str, Any], float]]]()
        while self.running and not done:
            if interrupted.is_set():
                raise KeyboardInterrupt
            done = wait(self.running, _POLL_SECONDS, FIRST_COMPLETED).done
        for future in done:
            cell, _ = self.running.pop(future)
            try:
                found, seconds = future.result()
            except Exception as error:  # any error in a run costs its own row only
                self._fail(cell, str(error))
            else:
                key = self._study.key(cell)
                self._add(cell, Row(**key.names._asdict(), options=key.options, **found), seconds)

    def _add(self, cell: Cell, row: Row, seconds: float | None) -> None:
        self._rows.add(row)
        self._progress.done(cell, row, seconds)

    def _fail(self, cell: Cell, reason: str) -> None:
        if cell in self.waiting:
            self.waiting.remove(cell)
        self._failed.add(cell)
        self._progress.failed(cell, reason)


def _timed(runner: Runner, run: Run) -> tuple[dict[str, Any], float]:
    started = perf_counter()
    return runner(run), perf_counter() - started


class _Progress:
    """Prints the result of each cell, and an estimate of the time that is left."""

    def __init__(self, cells: list[Cell], jobs: int, say: Say) -> None:
        self._left, self._jobs, self._say = Counter(cell.protocol for cell in cells), jobs, say
        self._seconds = defaultdict[str, list[float]](list)

    def done(self, cell: Cell, row: Row, seconds: float | None) -> None:
        """Print a row. ``seconds`` is the time of its run; None if the row follows from others."""
        self._left[cell.protocol] -= 1
        if seconds is not None:
            self._seconds[cell.protocol].append(seconds)
        self._say(f"{described(cell)}: {_result(row)}; {self._time_left()}")

    def failed(self, cell: Cell, reason: str) -> None:
        """Print why a cell has no row."""
        self._left[cell.protocol] -= 1
        self._say(f"{described(cell)} failed: {reason}; {self._time_left()}")

    def _time_left(self) -> str:
        """The time left, by the mean of each protocol's runs, or of all runs for a protocol that has none yet."""
        every = [seconds for group in self._seconds.values() for seconds in group]
        usual = fmean(every) if every else 0.0
        means = {"target": 0.0} | {protocol: fmean(group) for protocol, group in self._seconds.items()}
        seconds = sum(count * means.get(protocol, usual) for protocol, count in self._left.items()) / self._jobs
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{self._left.total()} cells left, about {hours} h {minutes} min"


def described(cell: Cell) -> str:
    """A cell in words."""
    alpha = "IID" if cell.alpha is None else f"α={cell.alpha:g}"
    rates = f" at {cell.rates[0]:g}:{cell.rates[1]:g}" if cell.rates else ""
    return f"{cell.dataset} {alpha} seed {cell.seed}  {cell.protocol}  {cell.method}{rates}"


def _result(row: Row) -> str:
    if row.client_steps is None or row.client_cpu_seconds is None:
        return "not reached"
    accuracy = f"{row.accuracy:.1%}" if row.accuracy is not None else f"{row.validation_accuracy:.1%} (validation)"
    return f"{accuracy}, {row.client_steps} client-steps, {row.client_cpu_seconds:.0f} CPU s"
