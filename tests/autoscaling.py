"""Jobs on a cluster that grows and shrinks, in a process tree of their own: ``python -m tests.autoscaling JSON``.

Ray can be connected to one cluster in a process, and other tests share another one. What was seen is printed as JSON.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch

from benchmarks.autoscaling_cluster import autoscaling_cluster, in_a_tree_of_its_own, kinds_alive, processes_of_node
from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, Training, TurnOrder
from chainfed_ray.client.pool import ClientPool, Foresee, Outcome, UnmetDemand
from chainfed_ray.cluster.jobs.run import publish_unmet, run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from tests.builders import MIB, a_job, run
from tests.pools import Altered
from tests.watching import command_of, wait_for

# Each has room for one process of its class, and that of the class above does not fit.
KINDS = {"small": 600 * MIB, "medium": 1100 * MIB, "large": 2300 * MIB}
CLASSES = {"phone": "64MiB", "laptop": "512MiB", "server": "1.5GiB"}


def main() -> None:
    """Run the jobs one after the other, since a cluster takes ten seconds to start."""
    in_a_tree_of_its_own()
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    document, folder = given["document"], Path(given["folder"])
    document["fleet"] = {"clients": [{"name": name, "memory": memory} for name, memory in CLASSES.items()]}
    document["rounds"] |= {"total": 3, "clients": 3, "quorum": 3}
    job = a_job(document, folder)
    _, expected = run(job, folder / "undisturbed")
    seen: dict[str, Any] = {}
    with autoscaling_cluster(KINDS, idle_seconds=5.0):
        from tests.clusters import a_pool

        seen["before"] = sorted(kinds_alive(KINDS))
        relay = Relay()
        with a_pool(job.base, 3, relay.note, tell=relay.tell) as pool, Kinds() as kinds:
            kept = Kept(pool)
            seen["lost"] = disturbed(job, folder / "lost", NodeLost(kept), expected)
            seen["kinds"] = sorted(kinds.seen)
            shutil.rmtree(job.base.scratch)  # the clients of the next job have other rows
            seen["unmet"] = with_a_giant(document, folder, pool, relay)
            wait_for(lambda: not kinds_alive(KINDS), "cluster that is its head alone, while the pool is open")
            seen["after"] = sorted(kinds_alive(KINDS))
    print(json.dumps(seen))


class Kinds:
    """Looks at the kinds of nodes that there are, while a block runs."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._over = Event()
        self._watcher = Thread(target=self._look)

    def __enter__(self) -> "Kinds":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watcher.join()

    def _look(self) -> None:
        while not self._over.wait(0.5):  # a node lives for seconds
            self.seen |= kinds_alive(KINDS)


class NodeLost(Altered):
    """A pool that loses the node of the largest client in the second round, while its turn runs there."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)
        self._rounds = 0

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        self._rounds += isinstance(order, Training)
        outcomes = super().run(clients, order, deadline)
        if self._rounds == 2:
            doomed = processes_of_node(KINDS["large"])
            actors = [process for process in doomed if "ClientActor" in command_of(process)]
            assert actors, "the large client's process"
            for process in actors:
                process.suspend()  # or its turn might end first
            yield next(outcomes)
            for process in doomed:
                process.kill()
        yield from outcomes


class Relay:
    """Passes on what a pool tells to the job that uses it now."""

    def __init__(self) -> None:
        self.hears_note: Note = lambda words: None
        self.hears_demand: Callable[[UnmetDemand], None] = lambda demand: None

    def note(self, words: str | None) -> None:
        """See ``Note``."""
        self.hears_note(words)

    def tell(self, demand: UnmetDemand) -> None:
        """See ``Tell``."""
        self.hears_demand(demand)


class Kept(Altered):
    """A pool whose processes are kept for the next job."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""


class Unclosed(Altered):
    """A pool that is used again after its job has ended."""

    def __init__(self, pool: ClientPool) -> None:
        super().__init__(pool, lambda client, order, answer: answer)

    def close(self) -> None:
        """See ``ClientPool``."""


def disturbed(job: PlannedJob, folder: Path, pool: ClientPool, expected: Tensors) -> dict[str, Any]:
    """Run a job, and tell whether it has the bits that are ``expected``, and how many turns failed."""
    _, found = run(job, folder, pool)
    failed = [turn.reason for record in CommitLog(folder).rounds() for turn in record.failed_turns]
    same = found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    return {"same": same, "failed": failed}


def with_a_giant(document: dict[str, Any], folder: Path, pool: ClientPool, relay: Relay) -> dict[str, Any]:
    """Run a job of the service with a class of clients that no kind of node can hold. Its deadline is longer than any test."""
    clients = [{"name": "phone", "memory": "64MiB"}, {"name": "giant", "memory": "100GiB"}]
    rounds = document["rounds"] | {"clients": 2, "quorum": 1, "deadline": "2h"}
    storage = Storage.at(folder / "storage")
    with closing(JobStore(storage.database)) as store:
        number = store.submit(parse_job(document | {"fleet": {"clients": clients}, "rounds": rounds})).id
        store.move(number, "running")

        def shared(source: ModelSource, note: Note) -> ClientPool:
            relay.hears_note, relay.hears_demand = note, partial(publish_unmet, number, storage)
            return Unclosed(pool)

        notes, over = set[str](), Event()

        def look() -> None:
            while not over.wait(0.1):
                if (activity := store.get(number).activity) and activity["note"]:
                    notes.add(activity["note"])

        watcher = Thread(target=look)
        watcher.start()
        try:
            run_queued_job(number, storage, shared)
        finally:
            over.set()
            watcher.join()
        events = [[event.kind, event.data] for event in store.events(number)]
        return {"status": store.get(number).status, "events": events, "notes": sorted(notes)}


if __name__ == "__main__":
    main()
