"""Requests to a service, so many at a time: ``python -m benchmarks.service_callers ADDRESS COUNT AT-ONCE REQUEST…``.

A request is ``GET /path``, or ``POST /path {"json": 1}``; they are sent in turn. It prints how many seconds each of them took,
as JSON. Connections are kept, and are plain sockets: a client library would take more of the processor than what is measured.
"""

import asyncio
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from time import monotonic
from urllib.parse import urlsplit

_END = b"\r\n\r\n"


async def main(address: str, count: int, at_once: int, requests: Sequence[str]) -> list[float]:
    """The seconds of each of ``count`` requests, in the order in which they were answered."""
    at, left, waits = urlsplit(address), islice(cycle(requests), count), list[float]()
    await asyncio.gather(*(_caller(str(at.hostname), at.port or 80, left, waits) for _ in range(at_once)))
    return waits


async def _caller(host: str, port: int, left: Iterator[str], waits: list[float]) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        for request in left:
            began = monotonic()
            writer.write(_bytes_of(request, f"{host}:{port}"))
            head = await reader.readuntil(_END)
            assert b" 200 " in head.partition(b"\r\n")[0], head
            await _read_body(reader, head)
            waits.append(monotonic() - began)
    finally:
        writer.close()


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> None:
    lines = [line.lower() for line in head.split(b"\r\n")]
    for line in lines:
        if line.startswith(b"content-length:"):
            await reader.readexactly(int(line.partition(b":")[2]))
            return
    assert b"transfer-encoding: chunked" in lines, head
    while size := int((await reader.readline()).strip(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()


def _bytes_of(request: str, host: str) -> bytes:
    method, path, *body = request.split(" ", 2)
    content = body[0].encode() if body else b""
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n"
    if content:
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    return f"{head}\r\n".encode() + content


if __name__ == "__main__":
    _, where, total, parallel, *asked = sys.argv
    print(json.dumps(asyncio.run(main(where, int(total), int(parallel), asked))))
