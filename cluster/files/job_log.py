"""The log of a job: what its coordinator did and logged, and what became of its clients' turns, a line of JSON each.

A line has no row of data: of an error it has the kind and the place where it was raised, and not the words, which are on the
job's record. A log that cannot be written costs the job nothing. ::

    jobs/<job>/log.jsonl
"""

import json
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from chainfed_ray.activity import Activity, Listener
from chainfed_ray.cluster.structured_logs import JOB_LINES
from chainfed_ray.cluster.tables import moment
from chainfed_ray.errors import BudgetExceeded, CoordinatorLost, InvalidJob
from chainfed_ray.records.log_line import LogLine
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.units import format_bytes, format_seconds

LOG = "log.jsonl"
COORDINATOR = "coordinator"
WITHHELD = {"withheld": True}
"""What ``extra`` of a record of Python's logging is, whose words may have rows: it is not in the log of the job."""
_MOST_BYTES = 64 * 2**20  # beyond it, only warnings and errors are logged
_MOST_CHARACTERS = 2000  # of a message
_MOST_TURNS = 50  # of a round that have a line each
_MOST_FRAMES = 8  # of a traceback
_OURS = "chainfed_ray"
_WORDS_OF_NUMBERS = (BudgetExceeded, CoordinatorLost)  # and of names in the code
_ERROR = re.compile(r"([A-Za-z_]\w*): ")


class JobLog(logging.Handler):
    """Writes the log in a job's ``folder``. A context manager: within it, what our code logs in this process goes there too.

    A job that resumes tells its records again; what is in the log already is not logged twice.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.INFO)
        self._path, self._doing, self._round = folder / LOG, "", 0

    def __enter__(self) -> Self:
        summaries = (line.round or 0 for line in lines_of(self._path) if line.source == COORDINATOR)
        self._round = max(summaries, default=0)
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        logging.getLogger(_OURS).addHandler(self)
        self.note("info", COORDINATOR, "the process of the coordinator begins")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logging.getLogger(_OURS).removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        if not getattr(record, "withheld", False):
            raised = f" ({_raised(record.exc_info[1])})" if record.exc_info and record.exc_info[1] else ""
            self._append(record.levelname.lower(), COORDINATOR, _message(record) + raised)

    def with_activities(self, listen: Listener) -> Listener:
        """A listener that also logs what the job begins to do."""

        def heard(activity: Activity) -> None:
            if activity.what != self._doing:
                self._doing = activity.what
                self.note("info", COORDINATOR, activity.what)
            listen(activity)

        return heard

    def tell(self, record: JobStarted | Round | JobFinished) -> None:
        """Log a record of the job, with the turns of a round."""
        match record:
            case JobStarted():
                message = f"{record.taking_part} clients take part, {record.left_out} cannot; {record.layers} layers"
                self.note("info", COORDINATOR, f"{message}, the chain starts at layer {record.start_layer}")
            case Round() if record.index >= self._round:
                self._round = record.index + 1
                self._turns(record)
            case JobFinished():
                accuracy = f"accuracy {record.accuracy:.4f} on the test rows"
                self.note("info", COORDINATOR, f"the job is done after {record.rounds} rounds: {accuracy}")

    def failed(self, error: Exception) -> None:
        """Log that the job has failed."""
        words = "the words are in the job's `error`"
        self.note("error", COORDINATOR, f"the job has failed: {_raised(error)}; {words}")

    def note(self, level: str, source: str, message: str, of: Round | None = None) -> None:
        """Append a line, which may be ``of`` a round, and tell it to those who collect logs."""
        what: dict[str, str | int] = {} if source == COORDINATOR else {"client": source}
        if of:
            what |= {"stage": of.stage + 1, "round": of.index + 1}
        words = message[:_MOST_CHARACTERS]
        JOB_LINES.log(logging.getLevelNamesMapping()[level.upper()], words, extra={"about": what})
        self._append(level, source, words, of.index + 1 if of else None)

    def _append(self, level: str, source: str, message: str, round_: int | None = None) -> None:
        line = LogLine(at=moment(), level=level, source=source, round=round_, message=message[:_MOST_CHARACTERS])
        try:
            with self._path.open("ab") as file:
                if level == "info" and file.tell() > _MOST_BYTES:
                    return
                if file.tell() and not _ends_a_line(self._path):  # who wrote it was killed
                    file.write(b"\n")
                file.write(line.model_dump_json().encode() + b"\n")
        except OSError:  # the job itself notices that its disk is full or gone
            return

    def _turns(self, record: Round) -> None:
        number = record.index + 1
        for turn in record.turns if len(record.turns) <= _MOST_TURNS else ():
            peak = "" if turn.peak_bytes is None else f", peak {format_bytes(turn.peak_bytes)}"
            words = f"{turn.steps} steps on {turn.examples} examples in {format_seconds(turn.seconds)}{peak}"
            self.note("info", turn.client, words, record)
        for turn in record.turns:
            if turn.exceeded:
                why = _without_words(turn.exceeded)
                self.note("warning", turn.client, f"its turn ran again with a smaller plan: {why}", record)
        for failed in record.failed_turns:
            self.note("warning", failed.client, f"its turn failed: {_without_words(failed.reason)}", record)
        ended = f"; the stage ends: {record.ended}" if record.ended else ""
        counted = "" if record.counted else ", too few to count"
        updates = f"{len(record.turns)} updates{counted}, {len(record.failed_turns)} failed turns"
        took = format_seconds(record.seconds)
        self.note("info", COORDINATOR, f"round {number} has {updates}, in {took}{ended}", record)


def page_of(path: Path, after: int, limit: int) -> tuple[list[LogLine], int]:
    """At most ``limit`` lines of a log from the byte ``after`` on, and the byte at which the next ones begin."""
    found = list[LogLine]()
    try:
        with path.open("rb") as file:
            file.seek(after)
            while len(found) < limit and (text := file.readline()).endswith(b"\n"):
                after += len(text)
                if line := _parsed(text):
                    found.append(line)
    except FileNotFoundError:
        pass
    return found, after


def lines_of(path: Path) -> Iterator[LogLine]:
    """Every line of a log."""
    with suppress(OSError), path.open("rb") as file:
        for text in file:
            if line := _parsed(text):
                yield line


def _parsed(text: bytes) -> LogLine | None:
    """The line; None if who wrote it was killed before its end."""
    try:
        return LogLine.model_validate_json(text)
    except (ValidationError, json.JSONDecodeError):
        return None


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def _message(record: logging.LogRecord) -> str:
    """The message of a record. Of an error in it the kind alone, unless it is of the operating system."""
    if not isinstance(record.args, tuple):
        return record.getMessage()
    with_words = (str, int, float, Path, OSError)
    return str(record.msg) % tuple(
        argument if isinstance(argument, with_words) else type(argument).__name__ for argument in record.args
    )


def _raised(error: BaseException) -> str:
    """The kind of an error, and its fields or where it was raised, without its words, which may have a row."""
    kind = type(error).__name__
    if isinstance(error, _WORDS_OF_NUMBERS):
        return f"{kind}: {error}"
    if isinstance(error, InvalidJob):
        return f"{kind}: {', '.join(problem.field for problem in error.problems)}"
    frames: list[Any] = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}" for frame in frames[-_MOST_FRAMES:]]
    return " < ".join([kind, *reversed(places)])


def _without_words(reason: str) -> str:
    """Why a turn failed. Where that is an error, the kind alone, unless its words are numbers."""
    kind = _ERROR.match(reason)
    known = {error.__name__ for error in _WORDS_OF_NUMBERS}
    return reason if kind is None or kind[1] in known else f"{kind[1]} (the words are in the record of the round)"
