"""Routes for operators: whether the process is alive, whether every part works, and what Prometheus scrapes.

Metrics are sums of what is in the database, so every replica gives the same answer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, get_args

from fastapi import APIRouter, Query, Response
from prometheus_client import CONTENT_TYPE_LATEST, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.service import Caller, Jobs, WithService
from chainfed_ray.api.schemas.monitoring import AuditEntry, AuditPage, Health
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.totals import JobTotals, TotalsOfJobs
from chainfed_ray.records.rounds import Evaluation
from chainfed_ray.records.states import AT_WORK, FINISHED, Status

router = APIRouter(tags=["health"], route_class=StrictRoute)

_RUNNING_JOBS = 100  # the most jobs at work that have metrics
FINISHED_JOBS = 10  # how many of the newest finished jobs have metrics
_TEXT = {"text/plain": {"schema": {"type": "string"}}}


@router.get("/healthz")
async def healthz() -> Health:
    """Answer that the process is alive."""
    return Health(status="ok", checks={})


@router.get("/readyz", responses={503: {"model": Health}})
async def readyz(response: Response, service: WithService) -> Health:
    """Check the database, the storage, the controller and inference. If one fails, the status is 503 and `checks` says why.

    What was found is told for two seconds.
    """
    checks = await service.health.states()
    works = all(state == "ok" for state in checks.values())
    response.status_code = 200 if works else 503
    return Health(status="ok" if works else "unavailable", checks=checks)


@router.get("/metrics", response_class=Response, responses={200: {"content": _TEXT}})
def metrics(service: WithService, jobs: Jobs, caller: Caller) -> Response:
    """Metrics in Prometheus's text format: jobs by status, and rounds, accuracy and memory of running and recent jobs.

    With an admin's key they are those of every tenant, and each has its tenant as a label.
    """
    totals = service.totals[None if caller.sees_everything else caller.tenant]
    found = _Metrics(jobs, totals, by_tenant=caller.sees_everything and bool(caller.key))
    return Response(generate_latest(found), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/audit")
def list_audit(
    service: WithService,
    limit: Annotated[int, Query(ge=1, le=1000, description="the most entries of a page")] = 100,
    before: Annotated[int | None, Query(ge=1, lt=2**63, description="return only entries with a lower number")] = None,
) -> AuditPage:
    """The audit log, the newest entries first: what was changed, by whom and from where, and who was refused."""
    found = service.audit.page(limit + 1, before) if service.audit else []
    entries = [AuditEntry.model_validate(entry, from_attributes=True) for entry in found[:limit]]
    return AuditPage(entries=entries, next=entries[-1].number if len(found) > limit else None)


class _Metrics:
    """Collects the metrics of ``jobs``, as the Prometheus client expects a registry to do."""

    def __init__(self, jobs: JobStore, totals: TotalsOfJobs, by_tenant: bool) -> None:
        self._jobs, self._totals, self._by_tenant = jobs, totals, by_tenant

    def collect(self) -> Iterator[Metric]:
        """Every metric, as it is now."""
        yield self._counts()
        tenants = self._shown()
        totals = self._totals.of(tenants)
        shown = _Shown(totals, tenants if self._by_tenant else None)
        yield from _job_metrics(shown)
        yield from _class_metrics(shown)
        yield _server_memory(shown)

    def _counts(self) -> Metric:
        names = ["tenant", "status"] if self._by_tenant else ["status"]
        jobs = GaugeMetricFamily("chainfed_jobs", "Jobs by status.", labels=names)
        counts = self._jobs.counts()
        if not self._by_tenant:
            counts = {"": {status: sum(of.get(status, 0) for of in counts.values()) for status in get_args(Status)}}
        for tenant, of_tenant in counts.items():
            for status in get_args(Status):
                jobs.add_metric([tenant, status] if self._by_tenant else [status], of_tenant.get(status, 0))
        return jobs

    def _shown(self) -> dict[str, str]:
        """The tenants of the jobs that have metrics of their own: those at work, and the newest finished ones."""
        at_work = self._jobs.lines(_RUNNING_JOBS, status=(*AT_WORK, "cancelling"))
        over = [job for status in FINISHED for job in self._jobs.lines(FINISHED_JOBS, status=status)]
        newest = sorted(over, key=lambda job: job.finished_at or "", reverse=True)
        return {job.id: job.tenant for job in at_work + newest[:FINISHED_JOBS]}


@dataclass(frozen=True)
class _Shown:
    """The sums of the jobs that are shown; and their tenants, if these are labels."""

    totals: dict[str, JobTotals]
    tenants: dict[str, str] | None

    @property
    def names(self) -> list[str]:
        """The names of the labels that each metric of a job has."""
        return ["job"] if self.tenants is None else ["tenant", "job"]

    def items(self) -> Iterator[tuple[list[str], JobTotals]]:
        """The values of these labels and the sums, job by job."""
        for job, sums in self.totals.items():
            yield [job] if self.tenants is None else [self.tenants[job], job], sums


def _job_metrics(shown: _Shown) -> Iterator[Metric]:
    done = CounterMetricFamily("chainfed_rounds", "Finished rounds.", labels=shown.names)
    limit = GaugeMetricFamily("chainfed_rounds_limit", "The most rounds that the job may have.", labels=shown.names)
    accuracy = GaugeMetricFamily(
        "chainfed_accuracy",
        "Accuracy on held-out rows; of a language model, on their tokens.",
        labels=[*shown.names, "rows"],
    )
    epsilon = GaugeMetricFamily(
        "chainfed_epsilon", "ε that a job with differential privacy has spent.", labels=shown.names
    )
    for job, sums in shown.items():
        done.add_metric(job, sums.rounds)
        if sums.epsilon is not None:
            epsilon.add_metric(job, sums.epsilon)
        if sums.limit:
            limit.add_metric(job, sums.limit)
        for rows, value in (("validation", sums.validation), ("test", sums.test)):
            if value is not None:
                accuracy.add_metric([*job, rows], value)
    yield from (done, limit, accuracy, epsilon)


def _server_memory(shown: _Shown) -> Metric:
    memory = GaugeMetricFamily(
        "chainfed_server_memory_bytes",
        "Planned and measured memory of the newest evaluation: of an early exit, or of the whole model (per process).",
        labels=[*shown.names, "evaluated", "kind"],
    )
    for job, sums in shown.items():
        for model, evaluation in (("early exit", sums.early_exit), ("whole model", sums.whole)):
            if evaluation:
                planned, peak = evaluation.planned_bytes, evaluation.peak_bytes
                process = evaluation.process_bytes if isinstance(evaluation, Evaluation) else None
                for kind, count in (("planned", planned), ("peak", peak), ("process", process)):
                    if count is not None:
                        memory.add_metric([*job, model, kind], count)
    return memory


def _class_metrics(shown: _Shown) -> Iterator[Metric]:
    memory = GaugeMetricFamily(
        "chainfed_client_memory_bytes",
        "A client's budget, and the largest planned and measured memory of a turn in the newest round of the class.",
        labels=[*shown.names, "class", "kind"],
    )
    turns = CounterMetricFamily("chainfed_turns", "Clients' turns that counted.", labels=[*shown.names, "class"])
    failed = CounterMetricFamily("chainfed_failed_turns", "Clients' turns that failed.", labels=[*shown.names, "class"])
    over = CounterMetricFamily(
        "chainfed_turns_over_budget",
        "Clients' turns that exceeded their memory plan, even if the second try then counted.",
        labels=[*shown.names, "class"],
    )
    for job, sums in shown.items():
        for name, members in sums.classes.items():
            for kind, count in (("budget", members.budget), ("planned", members.planned), ("peak", members.peak)):
                if count is not None:
                    memory.add_metric([*job, name, kind], count)
            turns.add_metric([*job, name], members.turns)
            failed.add_metric([*job, name], members.failed_turns)
            over.add_metric([*job, name], members.over_budget)
    yield from (memory, turns, failed, over)
