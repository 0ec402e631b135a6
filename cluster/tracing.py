"""Traces by OpenTelemetry, for whoever installs the extra ``tracing`` and says in ``OTEL_EXPORTER_OTLP_ENDPOINT`` where to.

Otherwise nothing of it is imported. One trace leads from the request that submits a job to its rounds ::

    POST /v1/jobs ─┬─ check ── prepare                                       the process that checks
                   └─ coordinator ── stage ── round ── turn of a client      the coordinator's
    POST /v1/classify, … ── answer                                           the process with the models

A span says what lines of logs say (``structured_logs.about``): the job, its tenant, the request. Where a process asks another
one, or a job waits in the database, the parent's ``traceparent`` (W3C Trace Context) goes along as a text. The turns of clients
are told by the coordinator: the memory of clients' processes is counted, and they import nothing for this.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from threading import Thread
from typing import Any, Protocol, Self

from chainfed_ray.cluster.structured_logs import about, what_lines_are_about
from chainfed_ray.errors import PackageMissing
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round

_WHERE = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PARENT = "traceparent"
_OURS = "chainfed."
_FLUSH_SECONDS = 2.0  # a collector that is away must not keep a job from its end
_DELAY_MS = 1000  # for which spans wait for others: a process that is killed takes those along
_provider: Any = None  # of the spans of this process; None if they are not traced


def check_tracing() -> None:
    """Check that spans can be exported, if the environment says where to: before a service starts that would fail later.

    Raises:
        PackageMissing: the extra ``tracing`` is not installed.
    """
    if not _is_asked_for():
        return
    try:
        import opentelemetry.exporter.otlp.proto.http.trace_exporter
        import opentelemetry.instrumentation.fastapi
        import opentelemetry.sdk.trace  # noqa: F401  each is only tried
    except ImportError as error:
        raise _missing(error) from None


def _is_asked_for() -> bool:
    return any(os.environ.get(name) for name in _WHERE)


def _missing(error: ImportError) -> PackageMissing:
    return PackageMissing(_WHERE[0], error.name or "opentelemetry", "tracing")


def begin_tracing(exporter: Any = None) -> None:
    """Let this process export its spans, if the environment says where to; or to ``exporter``.

    Raises:
        PackageMissing: the extra ``tracing`` is not installed.
    """
    global _provider
    if exporter is None and not _is_asked_for():
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise _missing(error) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: "chainfed-ray"}
    _provider = TracerProvider(resource=Resource.create(named))
    delay = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else _DELAY_MS
    _provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(), schedule_delay_millis=delay))


def end_tracing() -> None:
    """Export what has ended, and trace nothing from now on."""
    global _provider
    if _provider is not None:
        _provider.shutdown()
    _provider = None


def trace_requests(app: Any) -> None:
    """Let each request to the FastAPI application ``app`` be a span, but for probes, and what sites ask all the time."""
    if _provider is None:
        return
    from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

    without = "/healthz$,/readyz$,/metrics$,/v1/site/"
    FastAPIInstrumentor.instrument_app(
        app, tracer_provider=_provider, excluded_urls=without, exclude_spans=["receive", "send"]
    )


def note(**what: str | int) -> None:
    """Add attributes to the present span."""
    if _provider is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(_named(what))


def carried() -> dict[str, str]:
    """What goes along with a job: the request, and the ``traceparent`` of the present span where spans are traced."""
    found = dict[str, str]()
    if request := what_lines_are_about().get("request"):
        found["request"] = str(request)
    if _provider is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(found)
    return found


def asked_by(carried: Mapping[str, str]) -> AbstractContextManager[None]:
    """Within it, lines of logs name the request that another process has ``carried`` here."""
    return about(**{"request": carried["request"]} if "request" in carried else {})


@contextmanager
def span(name: str, parent: Mapping[str, str] | None = None, **what: str | int) -> Iterator[None]:
    """A span around a block. It is below the present one; or below ``parent``, which another process has ``carried``."""
    opened = open_span(name, parent, is_present=True, **what)
    try:
        yield
    except BaseException:
        opened.end(failed=True)
        raise
    opened.end()


def flush(seconds: float = _FLUSH_SECONDS) -> None:
    """Export what has ended, before this process may be ended as well. It is waited for so long at most.

    OpenTelemetry's own limit of that time is not held to.
    """
    if _provider is not None:
        exporting = Thread(target=_provider.force_flush, name="export of spans", daemon=True)
        exporting.start()
        exporting.join(seconds)


class Span(Protocol):
    """A span that is open."""

    def end(self, failed: bool = False, **what: str | int) -> None:
        """End it, if it has not ended, with further attributes."""
        ...


class _NoSpan:
    def end(self, failed: bool = False, **what: str | int) -> None:
        """See ``Span``."""


NO_SPAN: Span = _NoSpan()


class _OpenSpan:
    def __init__(self, made: Any, is_present: bool) -> None:
        from opentelemetry import context, trace

        self._made, self._context, self._token = made, context, None
        self._ended = False
        if is_present:
            self._token = context.attach(trace.set_span_in_context(made))

    def end(self, failed: bool = False, **what: str | int) -> None:
        """See ``Span``."""
        if self._ended:
            return
        self._ended = True
        from opentelemetry.trace import StatusCode

        self._made.set_attributes(_named(what))
        if failed:  # without the words of the error, which may have rows of data
            self._made.set_status(StatusCode.ERROR)
        self._made.end()
        if self._token is not None:
            self._context.detach(self._token)


def open_span(name: str, parent: Mapping[str, str] | None = None, is_present: bool = False, **what: str | int) -> Span:
    """Begin a span, which somebody has to end. Until then it may be the present one of this thread."""
    if _provider is None:
        return NO_SPAN
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    above = TraceContextTextMapPropagator().extract(parent) if parent and _PARENT in parent else None
    asked = {"request": parent["request"]} if parent and "request" in parent else {}
    made = _provider.get_tracer("chainfed").start_span(
        name, above, attributes=_named({**asked, **what_lines_are_about(), **what})
    )
    return _OpenSpan(made, is_present)


class StagesAndRounds:
    """The spans of a job's stages and rounds. The first ``known`` rounds were committed before, and had theirs then."""

    def __init__(self, known: int) -> None:
        self._left = known  # rounds that are told again
        self._stage = self._round = NO_SPAN
        self._stages = self._rounds = 0
        self._next = "stage"
        self.upcoming: dict[str, str | int] = {}  # the stage and the round that come next, from 1; empty if none does

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._round.end(failed=kind is not None)
        self._stage.end(failed=kind is not None)

    def told(self, record: JobStarted | Round | JobFinished) -> None:
        """End the span of what ``record`` is about."""
        match record:
            case JobStarted():
                self._stages, self._rounds = record.stages, record.total_rounds
                self.upcoming = {"stage": 1, "round": 1}
            case Round():
                self._left -= 1
                self._round.end(stage=record.stage + 1, round=record.index + 1)
                if record.ended:
                    self._stage.end(stage=record.stage + 1)
                is_last = record.ended and record.stage + 1 == self._stages
                self._next = "stage" if record.ended else "round"
                self.upcoming = {"stage": record.stage + (2 if record.ended else 1), "round": record.index + 2}
                if is_last or record.index + 1 == self._rounds:
                    self._next, self.upcoming = "final evaluation", {}
            case JobFinished():
                self._round.end()

    def begin_next(self) -> None:
        """Begin the span of what comes next: a round, the first of a stage, or the final evaluation."""
        if self._left > 0:
            return
        if self._next == "final evaluation":
            self._stage.end()
            self._round = open_span(self._next, is_present=True)
            return
        if self._next == "stage" or self._stage is NO_SPAN:
            self._stage.end()
            self._stage = open_span("stage", is_present=True)
        self._round = open_span("round", is_present=True)


def _named(what: Mapping[str, str | int]) -> dict[str, str | int]:
    return {_OURS + name: value for name, value in what.items()}
