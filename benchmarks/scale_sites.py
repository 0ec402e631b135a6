"""One cell of ``python -m benchmarks scale --sites``: a job of many sites on loopback, and what their turns cost the service.

The service is its application in one process, without HAProxy and Ray Serve; a coordinator, which is this process; and the Ray
actor that stands for the sites. One process plays all sites (``scale_players.py``).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import psutil
import torch

from benchmarks.cell_process import Row
from benchmarks.plan import word_tokenizer
from benchmarks.process_tree import cpu_seconds
from benchmarks.scale_cell import MODEL, write_rows
from benchmarks.shapes import written
from chainfed_ray.activity import Note
from chainfed_ray.api.command.local_service import free_port
from chainfed_ray.client.messages import Client, TurnOrder
from chainfed_ray.client.pool import ClientPool, Foresee, Outcome
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.model.source import ModelSource
from chainfed_ray.spec.parse import parse_job

_HELD_OUT = 32
_PARTS = ("API", "coordinator", "actor")


def main(sites: int, rounds: int) -> Row:
    """Run a job of ``sites`` with one client each, all of which are asked in a round, and give what its turns took."""
    torch.set_num_threads(1)
    with ExitStack() as until_done:
        base = until_done.enter_context(written(MODEL, Path(tempfile.gettempdir())))
        assert isinstance(base, Path), base
        word_tokenizer().save_pretrained(base)
        storage = Storage.at(base / "storage")
        names = [f"site-{place}" for place in range(sites)]
        store = until_done.enter_context(closing(JobStore(storage.database)))
        job = store.submit(parse_job(_document(base, names, rounds))).id
        store.move(job, "running")
        api = _service(storage, names, base, until_done)
        until_done.enter_context(local_ray(Settings(storage, client_slots=1), {}))

        from chainfed_ray.cluster.jobs.run import run_queued_job
        from chainfed_ray.cluster.pool.ray_pool import RayPool
        from chainfed_ray.cluster.sites.desk import Desk

        desk, watched = Desk(job, storage), list[_Watched]()

        def make(source: ModelSource, note: Note) -> ClientPool:
            watched.append(_Watched(RayPool(source, 1, note, at_site=desk.lease), api))
            return watched[0]

        run_queued_job(job, storage, make, sites=desk)
        record = store.get(job)
        assert record.status == "succeeded", record.error
        (pool,) = watched
    spent = [
        _between(*pair) for pair in zip(pool.marks[1:], pool.marks[2:], strict=False)
    ]  # the first one makes the actor
    return {
        "sites": sites,
        "rounds": rounds,
        "round_seconds": median(seconds for seconds, _ in spent),
        "turn_seconds": median(seconds for seconds, _ in spent) / sites,
        "turn_cpu_seconds": {
            part: median(cpu[place] for _, cpu in spent) / sites for place, part in enumerate(_PARTS)
        },
    }  # fmt: skip


@dataclass
class _Watched:
    """Another pool. Each time that an order comes, it notes the time and the CPU seconds of each part."""

    pool: ClientPool
    api: psutil.Process
    marks: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        self._note()
        return self.pool.run(clients, order, deadline)

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self.pool.expect(foresee)

    def close(self) -> None:
        """See ``ClientPool``."""
        self.pool.close()

    def _note(self) -> None:
        own = psutil.Process()
        actors = [
            process for process in own.children(recursive=True) if "SitesActor" in process.name() + _title(process)
        ]
        self.marks.append((perf_counter(), tuple(map(cpu_seconds, ([self.api], [own], actors)))))


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def _between(
    before: tuple[float, tuple[float, ...]], after: tuple[float, tuple[float, ...]]
) -> tuple[float, tuple[float, ...]]:
    """The seconds between two marks, and the CPU seconds of each part."""
    return after[0] - before[0], tuple(late - early for early, late in zip(before[1], after[1], strict=True))


def _service(storage: Storage, names: Sequence[str], folder: Path, until_done: ExitStack) -> psutil.Process:
    """Start the API, and the process that plays the sites. Gives the API's process."""
    with closing(KeyStore(storage.database, existing=True)) as keys:
        tokens = {name: keys.make_site_key(name).token for name in names}
    port = free_port("127.0.0.1")
    start = partial(subprocess.Popen, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    api = start([sys.executable, "-m", "benchmarks.service_alone", storage.database, str(port), str(storage.root)])
    until_done.callback(_end, api)
    assert api.stdout is not None
    assert api.stdout.readline() == "ready\n", "the API starts"
    command = [sys.executable, "-m", "benchmarks.scale_players", f"http://127.0.0.1:{port}", str(folder / "sites")]
    players = start(command)
    until_done.callback(_end, players)
    assert players.stdin is not None
    players.stdin.write(json.dumps(tokens) + "\n")
    players.stdin.flush()
    return psutil.Process(api.pid)


def _end(process: "subprocess.Popen[str]") -> None:
    process.terminate()
    process.wait(60)


def _document(base: Path, names: Sequence[str], rounds: int) -> dict[str, object]:
    write_rows(base / "held-out.jsonl", _HELD_OUT)
    held_out = f"path:{base / 'held-out.jsonl'}"
    return {
        "name": "sites",
        "model": {"base": f"path:{base}"},
        "data": {"validation": held_out, "test": held_out, "max_length": MODEL.tokens},
        "fleet": {
            "clients": [{"name": f"at-{name}", "memory": "64MiB", "site": name, "data": "site:rows.jsonl"} for name in names]
        },
        "chain": {"window": 2, "start": 2, "head": "zero"},
        "evaluation": {"every": "stage"},
        "rounds": {"total": rounds, "clients": len(names), "quorum": len(names), "convergence": {"rule": "none"}},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
