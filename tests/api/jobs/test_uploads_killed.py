"""Promise: an upload goes on where it was, when the service's process is killed in the middle of a piece."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import httpx
import pytest

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from tests.project import ROOT
from tests.watching import wait_for

SERVICE = """
import sys
from pathlib import Path
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.cluster.files.uploads import UploadStore
from tests import apps
apps.MOST_BYTES = 2**30
storage = Storage.at(Path(sys.argv[1]))
with apps.served(apps.an_app(JobStore(storage.database), uploads=UploadStore(storage))) as address:
    print(address, flush=True)
    sys.stdin.read()
"""


@contextmanager
def a_service(folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The API in a process of its own, and its address."""
    command, environment = [sys.executable, "-c", SERVICE, str(folder)], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip(), process
        process.kill()


@pytest.mark.slow
def test_an_upload_goes_on_after_a_kill(storage: Storage, store: JobStore, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_bytes(b"text,label\n" + os.urandom(2**20).hex().encode() * 16)
    partials = storage.uploads("default")

    def arrived() -> int:
        return sum(path.stat().st_size for path in partials.glob("*.partial"))

    def half() -> Iterator[bytes]:
        """Half of the file, in two parts, and then nothing more: the process is killed."""
        content = file.read_bytes()
        yield content[: 8 * 2**20]
        yield content[8 * 2**20 : 16 * 2**20]
        wait_for(lambda: arrived() > 8 * 2**20, "bytes on the disk")
        process.send_signal(signal.SIGKILL)
        process.wait()
        yield b"late"

    with a_service(storage.root) as (address, process):
        digest = sha256(file.read_bytes()).hexdigest()
        body = {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}
        upload = httpx.post(f"{address}/v1/uploads", json=body).json()
        with pytest.raises(httpx.TransportError):
            httpx.put(f"{address}/v1/uploads/{upload['id']}/content", content=half())
    received = arrived()
    assert 8 * 2**20 < received < file.stat().st_size

    with a_service(storage.root) as (address, _):
        client = Client(address)
        assert client.send(calls.get_upload(upload["id"])).received == received
        done = client.finish_json(exchanges.upload(file))
        assert (done["id"], done["complete"]) == (upload["id"], True)
        client.close()
    (kept,) = [path for path in partials.iterdir() if path.name != "lock"]
    assert kept.read_bytes() == file.read_bytes()
