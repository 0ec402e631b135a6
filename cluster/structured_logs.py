"""Logs as lines of JSON, for those who collect them: ``CHAINFED_LOG=json``. Otherwise lines are text, and of warnings alone.

A line says what it is about, as far as that is known: a job, its tenant, a stage, a round, a client, a request.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

LOG = "CHAINFED_LOG"
JOB_LINES = logging.getLogger("chainfed_jobs")
"""Lines of the logs of jobs (see ``cluster/files/job_log``). They are told here as well if lines are JSON."""
JOB_LINES.propagate = False
JOB_LINES.addHandler(logging.NullHandler())

_OURS = "chainfed_ray"
_NOTHING: Mapping[str, str | int] = {}
_ABOUT: ContextVar[Mapping[str, str | int]] = ContextVar("what lines are about", default=_NOTHING)


@contextmanager
def about(**what: str | int) -> Iterator[None]:
    """Within it, each line that this thread or task logs has these fields, such as ``job`` and ``tenant``."""
    token = _ABOUT.set({**_ABOUT.get(), **what})
    try:
        yield
    finally:
        _ABOUT.reset(token)


def what_lines_are_about() -> Mapping[str, str | int]:
    """The fields that each line of this thread or task has now."""
    return _ABOUT.get()


def log_as_asked(environment: Mapping[str, str] = os.environ) -> None:
    """Let this process log as ``CHAINFED_LOG`` says, which all processes of a service have. Each calls this as it starts."""
    if environment.get(LOG) == "json":
        log_as_json()


def log_as_json(stream: TextIO | None = None) -> None:
    """Let this process log lines of JSON to ``stream``, by default its standard error."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_JsonLine())
    logging.getLogger().handlers = [handler]
    logging.getLogger(_OURS).setLevel(logging.INFO)
    JOB_LINES.handlers = [handler]
    JOB_LINES.setLevel(logging.INFO)


class _JsonLine(logging.Formatter):
    """Makes a line of a record. What it is about is in the record's attribute ``about``, or was said by ``about``."""

    def format(self, record: logging.LogRecord) -> str:
        """See ``logging.Formatter``."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_ABOUT.get(),
            **getattr(record, "about", _NOTHING),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
