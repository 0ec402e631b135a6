"""Promises of traces: one leads from a submission to its job's rounds and turns; and who asks for none, imports nothing."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from threading import Event

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.tracing import begin_tracing, carried, end_tracing, flush, open_span, trace_requests
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.records.rounds import JobStarted, Round
from tests.apps import an_app
from tests.builders import SPEC, a_round, a_start
from tests.project import ROOT


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    made = InMemorySpanExporter()
    begin_tracing(made)
    yield made
    end_tracing()


def paths(exporter: InMemorySpanExporter) -> list[str]:
    """Each span that has ended, with those above it, in the order in which they began."""
    flush()
    found = sorted(exporter.get_finished_spans(), key=lambda one: one.start_time or 0)
    named = {one.context.span_id: one for one in found}

    def path(one: ReadableSpan) -> str:
        return f"{path(named[one.parent.span_id])} → {one.name}" if one.parent else one.name

    return [path(one) for one in found]


@pytest.mark.slow
def test_one_trace_leads_from_a_submission_to_the_turns_of_its_rounds(
    exporter: InMemorySpanExporter, store: JobStore, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_job(*_: object, **__: object) -> Iterator[JobStarted | Round]:
        job_started = a_start()
        yield job_started
        for index, ended in ((0, None), (1, "round limit"), (2, None)):
            open_span("turn", client="phone-0").end()
            if index == 2:
                store.move(job, "pausing")
            yield a_round(index, job_started, stage=index // 2, ended=ended)

    monkeypatch.setattr("chainfed_ray.cluster.jobs.run.run_job", run_job)
    app = an_app(store)
    trace_requests(app)
    with TestClient(app, "http://localhost") as client:
        job = client.post("/v1/jobs", json=SPEC.document(), headers={"X-Request-ID": "request-7"}).json()["id"]
        client.get("/healthz")
    store.move(job, "validating")
    run_queued_job(job, storage, in_this_process)
    assert "coordinator" in {one.name for one in exporter.get_finished_spans()}, "a paused job's process may be ended"
    below = "POST /v1/jobs → coordinator"
    rounds = [f"{below} → stage → round", f"{below} → stage → round → turn"]
    assert paths(exporter) == [
        "POST /v1/jobs", below, f"{below} → stage", *rounds, *rounds, f"{below} → stage", *rounds
    ]  # fmt: skip
    spans = exporter.get_finished_spans()
    assert len({one.context.trace_id for one in spans}) == 1
    for one in spans:
        about = dict(one.attributes or {})
        assert about["chainfed.request"] == "request-7"
        assert one.name.startswith("POST") or (about["chainfed.job"], about["chainfed.tenant"]) == (job, "default")
    assert [dict(one.attributes or {})["chainfed.round"] for one in spans if one.name == "round"] == [1, 2, 3]
    (queued,) = store.of_kind(job, "queued")
    assert queued.data["traceparent"].split("-")[1] == f"{spans[0].context.trace_id:032x}"


def test_a_job_that_goes_on_has_no_second_span_of_a_round(
    exporter: InMemorySpanExporter, store: JobStore, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chainfed_ray.cluster.tracing import StagesAndRounds

    job_started = a_start()
    with StagesAndRounds(known=2) as spans:
        for record in (job_started, *(a_round(index, job_started) for index in range(3))):
            spans.told(record)
            spans.begin_next()
    assert paths(exporter) == ["stage", "stage → round", "stage → round"], "the third, and one that begins"


def test_a_collector_that_is_away_keeps_nobody_from_the_end() -> None:
    class Away(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            back.wait(60)
            return super().export(spans)

    back, away = Event(), Away()
    begin_tracing(away)
    try:
        open_span("request", {"request": "request-7"}).end()
        flush(seconds=0.01)
        assert not away.get_finished_spans()
    finally:
        back.set()
        end_tracing()
    (one,) = away.get_finished_spans()
    assert dict(one.attributes or {}) == {"chainfed.request": "request-7"}


@pytest.mark.slow
def test_who_asks_for_no_traces_imports_nothing_of_them() -> None:
    assert carried() == {}
    code = """
import sys
from chainfed_ray.cluster.structured_logs import about
from chainfed_ray.cluster.tracing import begin_tracing, carried, flush, note, span, trace_requests
begin_tracing()
with span("a", {"traceparent": "00-1-1-01"}, job="b"):
    note(request="c")
trace_requests(None)
flush()
assert carried() == {}
with about(request="d"):
    assert carried() == {"request": "d"}
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert not {name for name in done.stdout.split() if name.startswith("opentelemetry")}
