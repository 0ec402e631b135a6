"""``python -m benchmarks sites``: a job over sites, and the same job with the rows dealt by the server, one after the other.

The service runs on this machine, behind a proxy with TLS; each site is a ``chainfed join`` with a folder of its own.
"""

import argparse
import asyncio
import json
import os
import platform
import ssl
import subprocess
import sys
from contextlib import ExitStack, suppress
from datetime import date, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from time import sleep
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row
from chainfed_ray.api.command.local_service import free_port
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client

_COMMAND = [sys.executable, "-c", "from chainfed_ray.api.command.entry import main; main()"]
_NAMES = ("east", "north", "south", "west")
_MIB = 2**20
_HELD_OUT = 600  # rows


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--data", type=Path, required=True, help="a JSON Lines file with the columns text and label")
    parser.add_argument("--rows", type=int, default=2000, help="how many of its rows are trained on")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run both jobs twice, and print what they took. The first of each starts processes, and is not shown."""
    with ExitStack() as until_done:
        folder = Path(until_done.enter_context(TemporaryDirectory(prefix="chainfed-sites-")))
        _write_rows(options.data, options.rows, folder)
        client, address = _service(folder, until_done)
        sites = [_join(name, address, folder, until_done) for name in _NAMES]
        rows: list[Row] = []
        for warm in (False, True):
            for how in ("dealt by the server", "at 4 sites"):
                row = _job(client, how, _document(how, options.rounds, folder), folder)
                rows += [row] if warm else []
                if how == "at 4 sites" and warm:
                    rows[-1] |= _memory(sites)
    dealt, at_sites = rows
    at_sites["ratio"] = round(at_sites["seconds"] / dealt["seconds"], 2)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False, width=120).print(_table(rows))
    same = "the same bits" if dealt["stack"] == at_sites["stack"] else "OTHER BITS"
    print(
        f"at sites: {at_sites['ratio']:.2f} × the time, {same}; {platform.machine()}, {os.cpu_count()} cores; {date.today()}"
    )


def _write_rows(data: Path, count: int, folder: Path) -> None:
    """The rows as files: those of each site, the same with their site as a column, and two halves of those held out."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [rows[place * len(rows) // (count + _HELD_OUT)] for place in range(count + _HELD_OUT)]  # of all classes
    every = (count + _HELD_OUT) // _HELD_OUT
    held_out = rows[::every][:_HELD_OUT]
    trained = [row for place, row in enumerate(rows) if place % every][:count]
    for place, name in enumerate(_NAMES):
        (folder / name).mkdir()
        _write(folder / name / "rows.jsonl", trained[place::4])
    _write(folder / "dealt.jsonl", [{**row, "site": _NAMES[place % 4]} for place, row in enumerate(trained)])
    _write(folder / "validation.jsonl", held_out[::2])
    _write(folder / "test.jsonl", held_out[1::2])


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)))


def _document(how: str, rounds: int, folder: Path) -> dict[str, Any]:
    names = {split: f"path:{folder / split}.jsonl" for split in ("validation", "test")}
    document: dict[str, Any] = {
        "name": "intents",
        "model": {"base": "builtin:minilm"},
        "data": {**names, "max_length": 48},
        "rounds": {"total": rounds, "clients": 4, "quorum": 4},
    }
    if how == "at 4 sites":
        clients = [
            {"name": f"at-{name}", "memory": "128MiB", "site": name, "data": "site:rows.jsonl"} for name in _NAMES
        ]
        return {**document, "fleet": {"clients": clients}}
    document["data"]["train"] = f"path:{folder / 'dealt.jsonl'}"
    partition = {"scheme": "column", "column": "site"}
    return {**document, "fleet": {"clients": [{"name": "c", "count": 4, "memory": "128MiB"}], "partition": partition}}


def _service(folder: Path, until_done: ExitStack) -> tuple[Client, str]:
    """A service with four slots, and its address behind a proxy with TLS."""
    port, environment = (
        free_port("127.0.0.1"),
        _environment(folder, CHAINFED_CLIENT_SLOTS="4", CHAINFED_DATA_ROOTS=str(folder)),
    )
    command = [*_COMMAND, "serve", "--port", str(port), "--json"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    until_done.callback(_end, service)
    assert service.stdout is not None
    local = json.loads(service.stdout.readline())["address"]
    scopes = ["--owner", "default", "--scopes", "submit,read", "--json"]
    made = subprocess.run([*_COMMAND, "keys", "create", *scopes], env=environment, capture_output=True, check=True)
    client = Client(local, json.loads(made.stdout)["token"])
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-newkey", "rsa:2048", "-nodes", "-keyout", str(folder / "key.pem"), "-out", str(folder / "ca.pem")]
    subprocess.run(["openssl", "req", "-x509", "-days", "1", *files, *subject], check=True, capture_output=True)
    listening = free_port("127.0.0.1")
    Thread(target=lambda: asyncio.run(_proxy(listening, port, folder)), daemon=True).start()
    return client, f"https://localhost:{listening}"


async def _proxy(listening: int, port: int, folder: Path) -> None:
    """Pass on what comes with TLS to ``port`` on loopback, without."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while block := await reader.read(65536):
                writer.write(block)
                await writer.drain()
        writer.close()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(handle, "127.0.0.1", listening, ssl=context)
    async with server:
        await server.serve_forever()


def _join(name: str, address: str, folder: Path, until_done: ExitStack) -> psutil.Process:
    environment = _environment(folder)
    made = subprocess.run([*_COMMAND, "sites", "add", name, "--json"], env=environment, capture_output=True, check=True)
    environment["CHAINFED_SITE_KEY"] = json.loads(made.stdout)["token"]
    command = [*_COMMAND, "join", address, "--site", name, "--data", str(folder / name)]
    command += ["--cache", str(folder / f"cache-{name}"), "--ca", str(folder / "ca.pem")]
    site = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until_done.callback(_end, site)
    return psutil.Process(site.pid)


def _environment(folder: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "CHAINFED_STORAGE": str(folder / "storage"), **more}


def _end(process: "subprocess.Popen[Any]") -> None:
    process.terminate()
    process.wait(60)


def _job(client: Client, how: str, document: dict[str, Any], folder: Path) -> Row:
    job = client.json(calls.submit_job(document))["id"]
    while (record := client.json(calls.get_job(job)))["finished_at"] is None:
        sleep(0.2)
    assert record["status"] == "succeeded", record["error"]
    began, ended = (datetime.fromisoformat(record[key]) for key in ("started_at", "finished_at"))
    weights = folder / "storage" / "jobs" / job / "model" / "adapter_model.safetensors"
    return {
        "rows": how,
        "seconds": round((ended - began).total_seconds(), 1),
        "accuracy": record["result"]["accuracy"],
        "stack": sha256(weights.read_bytes()).hexdigest()[:12],
        "peak": max(record["result"]["peak_bytes"].values()),
    }


def _memory(sites: list[psutil.Process]) -> Row:
    """The most memory that the processes at sites hold now: of the one that asks, and of the one that trains."""
    asking = max(site.memory_info().rss for site in sites)
    training = [child.memory_info().rss for site in sites for child in site.children(recursive=True)]
    return {"asking": asking, "training": max(training, default=None)}


def _table(rows: list[Row]) -> Table:
    table = Table(
        "rows", "seconds", "accuracy", "peak of a turn", "asking process", "training process", "stack", box=None
    )
    for row in rows:
        held = [f"{row[key] / _MIB:.0f} MiB" if row.get(key) else "" for key in ("peak", "asking", "training")]
        table.add_row(row["rows"], f"{row['seconds']:.1f}", f"{row['accuracy']:.3f}", *held, row["stack"])
    return table
