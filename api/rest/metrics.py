"""What Prometheus scrapes: jobs, clients' and the server's memory, read from the database when asked, so that any replica can
answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from chainfed_ray.api.rest.schemas import JobStatus
from chainfed_ray.api.rest.service import WithService
from chainfed_ray.cluster.jobs.store import FINISHED, Event, JobRecord, JobStore
from chainfed_ray.records.rounds import EarlyExit, Evaluation, JobFinished, JobStarted, Round, StageMemory

router = APIRouter(tags=["health"])

_RUNNING_JOBS = 100
FINISHED_JOBS = 10
PAGE = 1000
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


@router.get("/metrics", response_class=Response, responses={200: {"content": _TEXT}})
def metrics(service: WithService) -> Response:
    """In Prometheus's text format: jobs by status; rounds, accuracy and memory of those at work and the newest finished."""
    return Response(generate_latest(_Metrics(service.store)), media_type=CONTENT_TYPE_LATEST)


@dataclass
class _ClassTotals:
    """A class of clients: bytes in its newest round (or the plan, before its first), and turns of the whole job."""

    budget: int
    planned: int
    peak: int | None = None
    turns: int = 0
    failed_turns: int = 0
    over_budget: int = 0


@dataclass
class _JobTotals:
    """A job's events, added up as they are read: a job may have more rounds than fit into memory."""

    rounds: int = 0
    limit: int = 0
    validation: float | None = None
    test: float | None = None
    epsilon: float | None = None
    classes: dict[str, _ClassTotals] = field(default_factory=dict)
    early_exit: EarlyExit | None = None  # the newest
    whole: Evaluation | None = None  # the newest that was planned: one that failed took nothing that is known

    @classmethod
    def of(cls, store: JobStore, job: str) -> "_JobTotals":
        """The totals of a job."""
        totals, after = cls(), 0
        while found := store.events(job, after, PAGE):
            for event in found:
                totals._add(event)
            after = found[-1].seq
        return totals

    def _add(self, event: Event) -> None:
        match event.kind:
            case "started":
                self._add_opening(JobStarted.model_validate(event.data))
            case "round":
                self._add_round(Round.model_validate(event.data))
            case "finished":
                job_finished = JobFinished.model_validate(event.data)
                self.test = job_finished.accuracy
                self._add_evaluation(job_finished.evaluation)

    def _add_opening(self, job_started: JobStarted) -> None:
        self.limit = job_started.total_rounds
        for client in job_started.admitted:
            totals = self.classes.setdefault(client.client_class, _ClassTotals(client.budget_bytes, 0))
            totals.planned = max(totals.planned, client.planned_bytes)

    def _add_round(self, record: Round) -> None:
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
        for lost in record.failed_turns:
            self.classes[lost.client_class].failed_turns += 1
            self.classes[lost.client_class].over_budget += lost.over_budget

    def _add_evaluation(self, found: Evaluation | None) -> None:
        if found and found.planned_bytes is not None:
            self.whole = found


class _Metrics:
    """The metrics of the jobs in ``store``."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def collect(self) -> Iterator[Metric]:
        """Every metric, as it is now."""
        counts = self._store.count()
        jobs = GaugeMetricFamily("chainfed_jobs", "Jobs by status.", labels=["status"])
        for status in get_args(JobStatus):
            jobs.add_metric([status], counts.get(status, 0))
        yield jobs
        totals = {job.id: _JobTotals.of(self._store, job.id) for job in self._shown()}
        yield from _of_jobs(totals)
        yield from _of_classes(totals)
        yield _of_server(totals)

    def _shown(self) -> list[JobRecord]:
        """Jobs at work, and the newest of those that are over."""
        at_work = [
            *self._store.page(_RUNNING_JOBS, status="running"),
            *self._store.page(_RUNNING_JOBS, status="cancelling"),
        ]
        over = [job for status in FINISHED for job in self._store.page(FINISHED_JOBS, status=status)]
        newest = sorted(over, key=lambda job: job.finished_at or "", reverse=True)
        return at_work + newest[:FINISHED_JOBS]


def _of_jobs(totals: dict[str, _JobTotals]) -> Iterator[Metric]:
    done = CounterMetricFamily("chainfed_rounds", "Rounds that are done.", labels=["job"])
    limit = GaugeMetricFamily("chainfed_rounds_limit", "Rounds that the job has at most.", labels=["job"])
    accuracy = GaugeMetricFamily(
        "chainfed_accuracy", "Share of held-out rows classified right.", labels=["job", "rows"]
    )
    epsilon = GaugeMetricFamily("chainfed_epsilon", "ε that the job has spent, where it has privacy.", labels=["job"])
    for job, of_job in totals.items():
        done.add_metric([job], of_job.rounds)
        if of_job.epsilon is not None:
            epsilon.add_metric([job], of_job.epsilon)
        if of_job.limit:
            limit.add_metric([job], of_job.limit)
        for rows, value in (("validation", of_job.validation), ("test", of_job.test)):
            if value is not None:
                accuracy.add_metric([job, rows], value)
    yield from (done, limit, accuracy, epsilon)


def _of_server(totals: dict[str, _JobTotals]) -> Metric:
    memory = GaugeMetricFamily(
        "chainfed_server_memory_bytes",
        "What the server was planned to take, and took, as it last judged an early exit, or the whole model in each process.",
        labels=["job", "judged", "kind"],
    )
    for job, of_job in totals.items():
        for judged, took in (("early exit", of_job.early_exit), ("whole model", of_job.whole)):
            if took:
                process = took.process_bytes if isinstance(took, Evaluation) else None
                for kind, count in (("planned", took.planned_bytes), ("peak", took.peak_bytes), ("process", process)):
                    if count is not None:
                        memory.add_metric([job, judged, kind], count)
    return memory


def _of_classes(totals: dict[str, _JobTotals]) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "chainfed_client_memory_bytes",
        "What a client of the class may use, and the most that one was planned to take and took in the class's newest round.",
        labels=["job", "class", "kind"],
    )
    turns = CounterMetricFamily("chainfed_turns", "Clients' turns that counted.", labels=["job", "class"])
    lost = CounterMetricFamily("chainfed_failed_turns", "Clients' turns that did not count.", labels=["job", "class"])
    over = CounterMetricFamily(
        "chainfed_turns_over_budget",
        "Clients' turns that were stopped because they would have taken more memory than they may.",
        labels=["job", "class"],
    )
    for job, of_job in totals.items():
        for name, of_class in of_job.classes.items():
            for kind, count in (("budget", of_class.budget), ("planned", of_class.planned), ("peak", of_class.peak)):
                if count is not None:
                    memory.add_metric([job, name, kind], count)
            turns.add_metric([job, name], of_class.turns)
            lost.add_metric([job, name], of_class.failed_turns)
            over.add_metric([job, name], of_class.over_budget)
    yield from (memory, turns, lost, over)
