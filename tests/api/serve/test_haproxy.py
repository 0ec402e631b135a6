"""Promises of HAProxy: what no replica answers is answered as the API does all the same, and it ends with who started it."""

import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from chainfed_ray.api.command.local_service import free_port
from chainfed_ray.api.schemas.problems import ProblemDetails
from chainfed_ray.api.serve.haproxy import environment
from tests.project import ROOT
from tests.watching import running, wait_for

pytestmark = pytest.mark.slow
MOST = 40  # connections

# Ray's own manager of HAProxy, which knows no route yet.
_OPEN = """
import asyncio, sys
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions, gRPCOptions

host = haproxy.HAProxyConfig(
    http_options=HTTPOptions(host="127.0.0.1", port=int(sys.argv[1])), grpc_options=gRPCOptions(), is_head=True
)
loop = asyncio.new_event_loop()
loop.run_until_complete(haproxy.HAProxyApi(cfg=host).start())
print(flush=True)
loop.run_forever()
"""


@pytest.fixture
def private() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="door-", dir="/tmp") as folder:
        yield Path(folder)


def test_an_open_door_with_nobody_behind_it(private: Path) -> None:
    """An address that opens as many connections as it may is refused more, and leaves some for others."""
    ports = {name: free_port("127.0.0.1") for name in ("HTTP", "STATS", "METRICS")}
    others = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(port) for name, port in ports.items()}
    others["RAY_SERVE_HAPROXY_MAXCONN"] = str(MOST)
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **others, **environment(private)}
    command = [sys.executable, "-c", _OPEN, str(ports["HTTP"])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=everything) as manager:
        try:
            assert manager.stdout is not None
            assert manager.stdout.readline(), "it did not start"
            answer = httpx.get(f"http://127.0.0.1:{ports['HTTP']}/v1/jobs/any", trust_env=False)
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
            assert int(answer.headers["retry-after"]) > 0
            assert ProblemDetails.model_validate(answer.json()).type == "urn:chainfed:problem:service-unavailable"
            with ExitStack() as opened:
                for _ in range(MOST * 3 // 8):
                    half = opened.enter_context(socket.create_connection(("127.0.0.1", ports["HTTP"])))
                    half.sendall(b"GET / HTTP/1.1\r\nHost: ")
                with pytest.raises(httpx.TransportError):
                    httpx.get(f"http://127.0.0.1:{ports['HTTP']}/", trust_env=False)
                other = opened.enter_context(httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")))
                assert other.get(f"http://127.0.0.1:{ports['HTTP']}/", timeout=5).status_code == 503
            sockets = [path for path in private.rglob("*.sock") if path.is_socket()]
            assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in sockets} == {0}
            (door,) = psutil.Process(manager.pid).children()
            assert "haproxy" in door.name()
            listening = [found.laddr for found in door.net_connections("tcp") if found.status == psutil.CONN_LISTEN]
            assert {address.port for address in listening} == set(ports.values())
            assert {address.ip for address in listening} == {"127.0.0.1"}
        finally:
            manager.kill()
    wait_for(lambda: not running([door]), "end of HAProxy", 10)


def test_nothing_that_ray_says_of_routes_is_left(private: Path) -> None:
    """Its configuration is text, which the next Ray may write in other words."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    from chainfed_ray.api.serve.haproxy import rewritten

    before = HAPROXY_CONFIG_TEMPLATE
    after = rewritten(before, private)
    assert "status 404" in before
    assert "return status 404" not in after
    answered_by_serve = "{ status 404 } { res.hdr(content-type) -m beg text/plain }"
    assert f"http-response return status 503 default-errorfiles if {answered_by_serve}" in after
    for status in (400, 500):
        by_uvicorn = f"{{ status {status} }} {{ res.hdr(content-type) -m beg text/plain }}"
        assert f"http-response return status {status} default-errorfiles if {by_uvicorn}" in after
    assert "mode 666" not in after
    assert not re.search(r"errorfile \d+ {{", after)
