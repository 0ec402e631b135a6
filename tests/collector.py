"""Collects the spans that a service exports, by OTLP over HTTP, as an operator's collector does."""

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    """A span that has ended."""

    name: str
    trace: bytes
    id: bytes
    parent: bytes  # empty if it is the first one of its trace
    about: dict[str, str]  # its attributes that are texts


class Collector(ThreadingHTTPServer):
    """``spans`` has what came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Export)
        self.spans = list[Span]()

    @property
    def settings(self) -> dict[str, str]:
        """The variables of a service that exports here, and only when it has a reason not to wait."""
        port = self.server_address[1]
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_BSP_SCHEDULE_DELAY": "600000",
        }  # fmt: skip

    def paths(self, trace: bytes) -> set[str]:
        """The spans of a trace, each with those above it; of one whose parent did not come, its own name alone."""
        named = {span.id: span for span in self.spans if span.trace == trace}

        def path(span: Span) -> str:
            above = named.get(span.parent)
            return f"{path(above)} → {span.name}" if above else span.name

        return {path(span) for span in named.values()}


class _Export(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        asked = ExportTraceServiceRequest.FromString(body)
        for scope in (scope for resource in asked.resource_spans for scope in resource.scope_spans):
            for span in scope.spans:
                about = {one.key: one.value.string_value for one in span.attributes}
                self.server.spans.append(Span(span.name, span.trace_id, span.span_id, span.parent_span_id, about))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector that listens until the end of the block."""
    with Collector() as started:
        Thread(target=started.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield started
        finally:
            started.shutdown()
