"""The report of a finished job, made from its records when it is first asked for: its result as text and JSON, and plots."""

import io
import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from pydantic import ValidationError
from rich.console import Console

from chainfed_ray.api.report.pictures import draw_if_possible
from chainfed_ray.api.report.results import results
from chainfed_ray.cluster.files.artifacts import REPORT
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.errors import InvalidJob, JobNotFound
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.parse import parse_job

_WIDTH = 110  # characters of a line


def ensure_report(jobs: JobStore, record: JobRecord, folder: Path) -> None:
    """Make the report of a job that has succeeded, unless it is there. It is there as a whole, whoever else makes it now.

    Of a job whose records are of an earlier version none is made.

    Raises:
        JobNotFound: the job's folder was deleted meanwhile.
    """
    started, finished = jobs.newest(record.id, "started"), jobs.newest(record.id, "finished")
    if (folder / REPORT).exists() or not folder.exists() or started is None or finished is None:
        return
    try:
        spec, job_started = parse_job(record.spec), JobStarted.model_validate(started.data)
        rounds = [Round.model_validate(event.data) for event in jobs.of_kind(record.id, "round")]
        job_finished = JobFinished.model_validate(finished.data)
    except (InvalidJob, ValidationError):
        return
    made = None
    try:
        made = Path(mkdtemp(prefix=f"{REPORT}-", suffix=".partial", dir=folder))
        text = io.StringIO()
        Console(file=text, width=_WIDTH, highlight=False, markup=False).print(
            results(spec, job_started, rounds, job_finished)
        )
        (made / "report.txt").write_text(text.getvalue(), encoding="utf-8")
        (made / "report.json").write_text(json.dumps(record.result, indent=2), encoding="utf-8")
        draw_if_possible(made, job_started, rounds, job_finished, spec.chain.cka_threshold)
        if not (made / "report.json").exists():  # the folder is gone, and drawing has made it again
            shutil.rmtree(made, ignore_errors=True)
            with suppress(OSError):  # it is not empty
                folder.rmdir()
            raise JobNotFound(record.id)
        made.chmod(0o755)
        with suppress(OSError):  # another process was faster
            made.rename(folder / REPORT)
    except FileNotFoundError:
        if folder.exists():
            raise
        raise JobNotFound(record.id) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
