"""The jobs of ``benchmarks service``: one whose model is served, and any number beside it that are over."""

import csv
from contextlib import closing
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, delete, insert, select
from sqlalchemy.orm import Session

from benchmarks.random_stacks import RandomStacks
from chainfed_ray.cluster.database import open_database
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tables import TABLES, EventRow, JobRow
from chainfed_ray.data.docstrings import rows
from chainfed_ray.model.saved_stack import save_stack
from chainfed_ray.spec.parse import parse_job

_MODEL, _BOTTLENECK, _CLASSES = "builtin:minilm", 64, 8
SERVED = "minilm:served"
_AT_ONCE = 1000


class ManyJobs:
    """The database of a service, with as many jobs as a measurement needs. The model of the one ``served`` answers."""

    def __init__(self, storage: Storage) -> None:
        """Make a job whose model is served, as if it had been trained."""
        with closing(JobStore(storage.database)) as store:
            job = store.submit(parse_job(a_job("served", "builtin:docstrings"))).id
            store.move(job, "running")
            saved = RandomStacks(_MODEL, _BOTTLENECK).stack(0, _CLASSES)
            save_stack(saved, storage.model(job))
            store.move(job, "succeeded", result={"classes": list(saved.classes), "accuracy": 0.5})
        self._engine: Engine = open_database(storage.database, existing=True)
        self.served = job

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    def set(self, count: int) -> None:
        """Let the database have ``count`` jobs: copies of the first one, each with a model of its own and the same events."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(EventRow).where(EventRow.job.startswith("filler-")))
            session.execute(delete(JobRow).where(JobRow.id.startswith("filler-")))
            jobs, events = TABLES.tables["jobs"], TABLES.tables["events"]
            job = session.execute(select(jobs).where(JobRow.id == self.served)).mappings().one()
            told = session.execute(select(events).where(EventRow.job == self.served)).mappings().all()
            names = [f"filler-{place}" for place in range(count - 1)]
            for first in range(0, len(names), _AT_ONCE):
                some = names[first : first + _AT_ONCE]
                kept = {name: value for name, value in job.items() if name not in ("number", "id", "name", "model")}
                made = [{**kept, "id": name, "name": name, "model": f"minilm:{name}"} for name in some]
                session.execute(insert(jobs), made)
                session.execute(insert(events), [{**event, "job": name} for name in some for event in told])


def a_job(name: str, train: str) -> dict[str, Any]:
    """The document of a job that classifies."""
    data = {"train": train} | ({"text": "text", "label": "label"} if train.startswith("path:") else {})
    return {
        "name": name,
        "model": {"base": _MODEL, "task": "sequence-classification"},
        "data": data,
        "fleet": {"clients": [{"name": "phone", "count": 4, "memory": "64MiB"}]},
        "chain": {"window": 1, "start": 0},
        "rounds": {"total": 1, "clients": 2},
    }


def write_rows(path: Path, count: int) -> None:
    """Write so many rows of the built-in data set into a CSV file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(list(rows())[:count])
