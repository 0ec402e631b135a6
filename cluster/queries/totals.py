"""Adds up the events of jobs as they come, for metrics: each event is read once in a process."""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

from chainfed_ray.cluster.tables import Event, Latest
from chainfed_ray.errors import JobNotFound
from chainfed_ray.records.fleet import AdmittedClients
from chainfed_ray.records.result import StageMemory
from chainfed_ray.records.rounds import EarlyExit, Evaluation, JobFinished, JobStarted, Round

_log = logging.getLogger(__name__)
PAGE = 1000  # how many events are read at a time


@dataclass
class ClassTotals:
    """A class of clients: bytes of its newest round (the plan, before its first round), and turns of the whole job."""

    budget: int
    planned: int
    peak: int | None = None
    turns: int = 0
    failed_turns: int = 0
    over_budget: int = 0


@dataclass
class JobTotals:
    """The sums of a job's events. ``last`` is the number of the newest event among them."""

    last: int = 0
    rounds: int = 0
    limit: int = 0
    validation: float | None = None
    test: float | None = None
    epsilon: float | None = None
    classes: dict[str, ClassTotals] = field(default_factory=dict)
    early_exit: EarlyExit | None = None  # the newest
    whole: Evaluation | None = None  # the newest with known memory: one that failed has none

    def add(self, event: Event) -> None:
        """Add the job's next event."""
        match event.kind:
            case "started":
                self._add_start(JobStarted.model_validate(event.data))
            case "round":
                self._add_round(Round.model_validate(event.data))
            case "finished":
                job_finished = JobFinished.model_validate(event.data)
                self.test = job_finished.accuracy
                self._add_evaluation(job_finished.evaluation)
        self.last = event.seq

    def _add_start(self, job_started: JobStarted) -> None:
        self.limit = job_started.total_rounds
        self._add_clients(job_started.admitted)

    def _add_clients(self, admitted: Iterable[AdmittedClients]) -> None:
        for client in admitted:
            totals = self.classes.setdefault(client.client_class, ClassTotals(client.budget_bytes, 0))
            totals.planned = max(totals.planned, client.planned_bytes)

    def _add_round(self, record: Round) -> None:
        for site in record.late:
            self._add_clients(site.admitted)
        self.rounds = record.index + 1
        self.validation = record.accuracy if record.accuracy is not None else self.validation
        self.epsilon = record.epsilon
        self.early_exit = record.early_exit or self.early_exit
        self._add_evaluation(record.evaluation)
        for memory in StageMemory.of([record]):
            totals = self.classes[memory.client_class]
            totals.planned, totals.peak = memory.planned_bytes, memory.peak_bytes
            totals.turns += memory.turns
            totals.over_budget += memory.exceeded
        for failed in record.failed_turns:
            self.classes[failed.client_class].failed_turns += 1
            self.classes[failed.client_class].over_budget += failed.over_budget

    def _add_evaluation(self, evaluation: Evaluation | None) -> None:
        if evaluation and evaluation.planned_bytes is not None:
            self.whole = evaluation


class Events(Protocol):
    """Whoever has the events of jobs, such as ``JobStore``."""

    def latest(self, jobs: Collection[str]) -> Mapping[str, Latest]: ...

    def events(self, job: str, after: int, limit: int) -> Sequence[Event]: ...


class TotalsOfJobs:
    """The totals of jobs whose events ``store`` has. They are kept, so the next call reads only the events that are new."""

    def __init__(self, store: Events) -> None:
        self._store = store
        self._known: dict[str, JobTotals] = {}
        self._lock = Lock()

    def of(self, jobs: Iterable[str]) -> dict[str, JobTotals]:
        """The totals of ``jobs``, as they are now. Those of other jobs are forgotten."""
        with self._lock:
            self._known = {job: self._known.get(job) or JobTotals() for job in jobs}
            newest = self._store.latest(self._known)
            for job, totals in list(self._known.items()):
                if job in newest and newest[job].seq == totals.last:
                    continue
                try:
                    self._add_new(job, totals)
                except (JobNotFound, KeyError, ValueError) as error:  # it was deleted, or its records cannot be read
                    _log.warning("job %s has no metrics: %s", job, error)
                    del self._known[job]
            return dict(self._known)

    def _add_new(self, job: str, totals: JobTotals) -> None:
        while found := self._store.events(job, totals.last, PAGE):
            for event in found:
                totals.add(event)
