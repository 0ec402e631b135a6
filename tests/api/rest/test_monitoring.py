"""Promises of ``GET /metrics``: Prometheus can read it, and it says what is on record, whichever process answers."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from chainfed_ray.api.rest.monitoring import FINISHED_JOBS
from chainfed_ray.api.rest.service import Parts, Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.totals import TotalsOfJobs
from chainfed_ray.cluster.tables import Event
from chainfed_ray.record import Record
from chainfed_ray.records.rounds import EarlyExit, Evaluation, FailedTurn, JobStarted
from tests.builders import FINISHED, MIB, SPEC, a_round, a_start

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    made = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    yield made
    made.close()


def scraped(store: JobStore) -> Samples:
    """Every sample, as a new process of the API gives it to Prometheus."""
    service = cast(
        "Service", SimpleNamespace(store=store, totals={None: TotalsOfJobs(store)})
    )  # it asks for nothing else
    with TestClient(create_app(service), "http://localhost") as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: Samples = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, "a series is told once"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float | None:
    # `class` is a word of Python's, so it is written `class_` here.
    return samples.get((name, tuple(sorted((label.rstrip("_"), text) for label, text in labels.items()))))


def a_running_job(store: JobStore, job_started: JobStarted | None = None) -> str:
    job = store.submit(SPEC).id
    store.move(job, "running")
    publish(store, job, "started", job_started or a_start())
    return job


def publish(store: JobStore, job: str, key: str, record: Record) -> None:
    store.publish(job, key, key.partition("-")[0], record.model_dump(mode="json"))


def test_parts_are_checked_at_the_same_time_and_once_for_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [100.0], Counter[str]()
    monkeypatch.setattr("chainfed_ray.api.rest.service.monotonic", lambda: now[0])

    async def story() -> None:
        both = asyncio.Barrier(2)

        async def first() -> None:
            calls["first"] += 1
            await both.wait()

        async def second() -> None:
            calls["second"] += 1
            await both.wait()
            raise OSError

        parts = Parts({"first": first, "second": second})
        leaves = asyncio.create_task(parts.states())
        await asyncio.sleep(0)
        leaves.cancel()
        found = await asyncio.gather(*(parts.states() for _ in range(20)))
        assert found == [{"first": "ok", "second": "OSError; the service's log says more"}] * 20
        for passed, times in ((1.9, 1), (0.2, 2)):
            now[0] += passed
            assert await parts.states() == found[0]
            assert calls == {"first": times, "second": times}

    asyncio.run(story())


def test_a_check_belongs_to_no_caller_and_a_part_that_gives_up_ends_it_for_nobody() -> None:
    """Ray Serve takes what follows in a request's context for a part of it, and cancels that with the request."""
    request: ContextVar[str | None] = ContextVar("request", default=None)
    seen: list[str | None] = []

    async def gives_up() -> None:
        seen.append(request.get())
        raise asyncio.CancelledError

    async def asked() -> dict[str, str]:
        request.set("one")
        return await Parts({"models": gives_up}).states()

    assert asyncio.run(asked()) == {"models": "gave up its answer"}
    assert seen == [None]


def test_without_a_job_every_status_is_zero(store: JobStore) -> None:
    samples = scraped(store)
    assert {labels[0][1] for _, labels in samples} == {
        "queued", "validating", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled",
    }  # fmt: skip
    assert set(samples.values()) == {0}


@pytest.mark.slow
def test_a_running_job_from_round_to_round(store: JobStore) -> None:
    job_started = a_start()
    job = a_running_job(store, job_started)
    store.submit(SPEC)
    samples = scraped(store)
    assert (value(samples, "chainfed_jobs", status="running"), value(samples, "chainfed_jobs", status="queued")) == (
        1,
        1,
    )
    assert value(samples, "chainfed_rounds_total", job=job) == 0
    assert value(samples, "chainfed_rounds_limit", job=job) == job_started.total_rounds
    assert memory(samples, job, "phone") == (64 * MIB, 30 * MIB, None)

    first, *others = a_round(0, job_started).turns
    again = first.model_copy(update={"exceeded": "BudgetExceeded", "planned_bytes": 20 * MIB, "peak_bytes": 18 * MIB})
    lost = (
        FailedTurn(client="phone-5", client_class="phone", reason="BudgetExceeded", over_budget=True),
        FailedTurn(client="silo-0", client_class="silo", reason="died"),
    )
    publish(store, job, "round-0", a_round(0, job_started, turns=(again, *others), failed_turns=lost))
    publish(store, job, "round-1", a_round(1, job_started, turns=(again,), accuracy=None))
    samples = scraped(store)
    assert memory(samples, job, "phone") == (64 * MIB, 20 * MIB, 18 * MIB), "of the newest round"
    assert memory(samples, job, "laptop") == (256 * MIB, 30 * MIB, None), "which has not had a turn"
    assert value(samples, "chainfed_rounds_total", job=job) == 2
    assert value(samples, "chainfed_accuracy", job=job, rows="validation") == 0.5, "the last that was measured"
    assert value(samples, "chainfed_accuracy", job=job, rows="test") is None
    for name, phone, silo in (("turns", 4, 0), ("failed_turns", 1, 1), ("turns_over_budget", 3, 0)):
        assert value(samples, f"chainfed_{name}_total", job=job, class_="phone") == phone
        assert value(samples, f"chainfed_{name}_total", job=job, class_="silo") == silo


def memory(samples: Samples, job: str, name: str) -> tuple[float | None, ...]:
    """Budget, planned and peak."""
    kinds = ("budget", "planned", "peak")
    return tuple(value(samples, "chainfed_client_memory_bytes", job=job, class_=name, kind=kind) for kind in kinds)


@pytest.mark.slow
def test_the_servers_memory_is_that_of_its_newest_evaluations(store: JobStore) -> None:
    job_started = a_start()
    job = a_running_job(store, job_started)
    assert server(scraped(store), job, "early exit") == (None, None, None)
    early_exit = EarlyExit(seconds=1.0, planned_bytes=30 * MIB, peak_bytes=20 * MIB)
    whole = Evaluation(engine="deepspeed", loss=1.0, planned_bytes=80, peak_bytes=70, process_bytes=500, processes=2)
    publish(store, job, "round-0", a_round(0, job_started, early_exit=early_exit, evaluation=whole))
    failed = Evaluation(engine="deepspeed", failure="the process of a worker ended")
    publish(store, job, "round-1", a_round(1, job_started, accuracy=None, evaluation=failed))
    samples = scraped(store)
    assert server(samples, job, "early exit") == (30 * MIB, 20 * MIB, None)
    assert server(samples, job, "whole model") == (80, 70, 500)
    publish(
        store, job, "finished", FINISHED.model_copy(update={"evaluation": whole.model_copy(update={"peak_bytes": 75})})
    )
    assert server(scraped(store), job, "whole model") == (80, 75, 500)


def server(samples: Samples, job: str, evaluated: str) -> tuple[float | None, ...]:
    """Planned, peak, and the whole process."""
    kinds = ("planned", "peak", "process")
    return tuple(
        value(samples, "chainfed_server_memory_bytes", job=job, evaluated=evaluated, kind=kind) for kind in kinds
    )


@pytest.mark.slow
def test_a_job_that_is_over_is_among_the_newest_for_a_while(store: JobStore) -> None:
    jobs = []
    for _ in range(FINISHED_JOBS + 2):
        jobs.append(a_running_job(store))
        publish(store, jobs[-1], "finished", FINISHED)
        store.move(jobs[-1], "succeeded", result={})
    running = a_running_job(store)
    samples = scraped(store)
    shown = {dict(labels)["job"] for name, labels in samples if name == "chainfed_rounds_limit"}
    assert len(shown) == FINISHED_JOBS + 1
    assert {running, jobs[-1]} <= shown
    assert value(samples, "chainfed_accuracy", job=jobs[-1], rows="test") == FINISHED.accuracy
    assert value(samples, "chainfed_jobs", status="succeeded") == len(jobs)


@pytest.mark.slow
def test_more_events_than_a_page(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chainfed_ray.cluster.queries.totals.PAGE", 2)
    job_started = a_start()
    job = a_running_job(store, job_started)
    for index in range(5):
        publish(store, job, f"round-{index}", a_round(index, job_started))
    samples = scraped(store)
    assert value(samples, "chainfed_rounds_total", job=job) == 5
    assert value(samples, "chainfed_turns_total", job=job, class_="phone") == 15


def test_an_event_is_read_once(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job_started = a_start()
    job = a_running_job(store, job_started)
    totals, events, read = TotalsOfJobs(store), store.events, list[int]()

    def counted(job: str, after: int, limit: int) -> list[Event]:
        found = events(job, after, limit)
        read.extend(event.seq for event in found)
        return found

    monkeypatch.setattr(store, "events", counted)
    for index in range(3):
        publish(store, job, f"round-{index}", a_round(index, job_started))
        assert totals.of([job])[job].rounds == index + 1
    assert read == list(range(1, 7))
