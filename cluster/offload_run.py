"""A run of Ray Train that keeps a model offloaded to disk and judges stacks as they come: the actor between owner and workers.

The actor outlives its owner by half a minute, in which it ends the run as Ray Train ends one. (Were it killed with its owner,
Ray Train would not give back the memory that it reserved: it learns of that from Ray's dashboard, which need not be there.)
A worker's files are removed when it ends, in any way.
"""

import ctypes
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from mmap import PAGESIZE
from pathlib import Path
from threading import Condition, Thread
from time import monotonic, sleep
from typing import Any

import numpy as np
import ray
import torch

from chainfed_ray.adapter import AdapterStack
from chainfed_ray.blocks import Blocks
from chainfed_ray.client import BaseModel
from chainfed_ray.evaluator import Sets
from chainfed_ray.measure import ENVIRONMENT
from chainfed_ray.offload_footprint import disk_bytes, swap_bytes
from chainfed_ray.offloaded import OffloadedModel, Share, remove_when_this_process_ends
from cluster.doctor import look, why_not
from cluster.ops import ops_folder
from cluster.resources import of_evaluation

_POLL_SECONDS = 5.0
_MADV_DONTNEED = 4  # of Linux: the bytes of a shared mapping stay where they are, and are this process's no more
_ANSWER_SECONDS = 60.0  # of an actor that only notes things down
_OWNER_SECONDS = 30.0  # without a word from the owner: it is gone
_END_SECONDS = 10.0  # for workers to end by themselves
START_SECONDS = 180.0  # until the workers are there: a machine may have to be made for them
# Of Ray Train: a worker stays in its folder, publishes no figures, and is missed soon when it is gone.
RUN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
}


@dataclass(frozen=True)
class Work:
    """What every worker of a run is told: ``sets`` is a reference in a list, which Ray leaves as it is."""

    base: BaseModel
    sets: list[Any]
    workers: int
    batch_size: int
    memory: int  # bytes that a worker is planned to take
    name: str  # of the run, and of its folder


@dataclass(frozen=True)
class Order:
    """A stack to be judged: the ``number``-th of the run, its tensors behind a reference in a list; None ends the run."""

    number: int
    stack: list[Any] | None
    examples: str


@dataclass(frozen=True)
class State:
    """How far a run is: ``shares`` of the present order, by worker; ``over`` is why it ended, if it has."""

    shares: dict[int, Share]
    over: str | None
    started: bool
    silent_seconds: float


@ray.remote
class EvaluationRun:
    """Runs Ray Train in a thread, and passes on what owner and workers have for one another."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._changed = Condition()
        self._order: Order | None = None
        self._shares: dict[int, Share] = {}
        self._reasons: list[str] = []
        self._over: str | None = None
        self._workers: dict[int, Any] = {}
        self._heard = self._owner_heard = monotonic()
        itself = ray.get_runtime_context().current_actor
        Thread(target=self._run, args=(itself,), daemon=True).start()
        Thread(target=self._watch, daemon=True).start()

    def owner_lives(self) -> None:
        """For the owner, every few seconds: nobody else ends the run in its place."""
        self._owner_heard = monotonic()

    def end(self) -> None:
        """End the workers and with them the run: as soon as they ask for an order, or by force."""
        with self._changed:
            number = self._order.number + 1 if self._order else 1
            self._order = Order(number, None, "")
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._over, _END_SECONDS):
                for worker in self._workers.values():
                    ray.kill(worker)
                self._changed.wait_for(lambda: self._over, START_SECONDS)

    def ask(self, order: Order) -> None:
        """Give the workers an order."""
        with self._changed:
            self._order, self._shares, self._heard = order, {}, monotonic()
            self._changed.notify_all()

    def wait(self, seconds: float) -> State:
        """The run's state as soon as an order was carried out, or the run is over, or after some time."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._shares) == self._work.workers, seconds)
            return State(dict(self._shares), self._over, bool(self._workers), monotonic() - self._heard)

    def next(self, after: int, seconds: float) -> Order | None:
        """For a worker: the order that comes after the one numbered ``after``; None if there is none yet."""
        with self._changed:
            self._changed.wait_for(lambda: self._order and self._order.number > after, seconds)
            return self._order if self._order and self._order.number > after else None

    def join(self, rank: int, worker: Any) -> None:
        """For a worker: it is there, as the actor ``worker``."""
        self._workers[rank], self._heard = worker, monotonic()

    def alive(self) -> None:
        """For a worker: it has done something."""
        self._heard = monotonic()

    def answer(self, rank: int, number: int, share: Share) -> None:
        """For a worker: its share of an order."""
        with self._changed:
            if self._order and self._order.number == number:
                self._shares[rank], self._heard = share, monotonic()
                if len(self._shares) == self._work.workers:
                    self._order = replace(self._order, stack=[])  # its shared memory is for the next one
                self._changed.notify_all()

    def failed(self, reason: str) -> None:
        """For a worker: why it ends."""
        self._reasons.append(reason)

    def _run(self, itself: Any) -> None:
        from ray import train
        from ray.train.torch import TorchConfig, TorchTrainer

        configs: Any = train  # whose types are those of an older version
        work = self._work
        folder = tempfile.mkdtemp(prefix="chainfed-train-")  # Ray Train wants one, and keeps nothing in it here
        remove_when_this_process_ends(Path(folder))
        try:
            TorchTrainer(
                _worker,
                train_loop_config={"work": work, "run": itself},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=configs.ScalingConfig(
                    num_workers=work.workers, resources_per_worker=of_evaluation(work.memory), use_gpu=False
                ),
                run_config=configs.RunConfig(
                    name=work.name,
                    storage_path=folder,
                    failure_config=configs.FailureConfig(max_failures=0, controller_failure_limit=0),
                    worker_runtime_env={"env_vars": {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}},
                ),
            ).fit()
            over = "the run ended"
        except Exception as error:  # of whatever part of Ray Train, or of a worker
            over = _in_words(error)
        with self._changed:
            self._over = self._reasons[0] if self._reasons else over
            self._changed.notify_all()

    def _watch(self) -> None:
        """End the run and this process with it, when the owner is gone."""
        while monotonic() - self._owner_heard < _OWNER_SECONDS:
            sleep(1.0)
        self.end()
        os._exit(0)


def _in_words(error: Exception) -> str:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        return f"the process of a worker ended ({type(failure).__name__}); often the machine has too little memory"
    return f"Ray Train could not go on: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _worker(config: dict[str, Any]) -> None:
    """What each worker does, from its first order to the last."""
    from ray import train

    run, rank = config["run"], train.get_context().get_world_rank()
    try:
        _serve(config["work"], run, rank)
    except Exception as error:
        traceback.print_exc()
        words = (error.strerror if isinstance(error, OSError) else str(error)) or type(error).__name__
        with suppress(Exception):
            ray.get(run.failed.remote(words), timeout=_ANSWER_SECONDS)
        raise


def _serve(work: Work, run: Any, rank: int) -> None:
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", str(work.workers))
    ray.get(run.join.remote(rank, ray.get_runtime_context().current_actor), timeout=_ANSWER_SECONDS)
    torch.set_num_threads(1)
    folder = work.base.scratch / OFFLOAD
    _clear(folder, keep=work.name)
    _check(work, folder)
    model = OffloadedModel(work.base, folder / work.name / f"rank{rank}", ops_folder(), lambda: run.alive.remote())
    try:
        sets: Sets = ray.get(work.sets[0], timeout=_ANSWER_SECONDS)
        number = 0
        while True:
            order: Order | None = ray.get(run.next.remote(number, _POLL_SECONDS), timeout=_ANSWER_SECONDS)
            if order is None:
                continue
            if order.stack is None:
                return
            number = order.number
            with _received(order.stack[0]) as stack:
                share = model.judge(stack, sets[order.examples], work.batch_size)
            del stack, order
            ray.get(run.answer.remote(rank, number, share), timeout=_ANSWER_SECONDS)
    finally:
        model.close()
        with suppress(OSError):  # of the worker that is last
            (folder / work.name).rmdir()
            folder.rmdir()


OFFLOAD = "(offload)"  # in a job's scratch folder


def _clear(folder: Path, keep: str) -> None:
    """Remove what other runs left behind; there is one run of a job at a time."""
    for path in folder.glob("*"):
        if path.name != keep:
            shutil.rmtree(path, ignore_errors=True)


def _check(work: Work, folder: Path) -> None:
    """This may be another machine than the owner's."""
    blocks = Blocks(work.base.folder, work.base.dtype)
    try:
        reason = why_not(look(folder), swap_bytes(blocks, work.workers), disk_bytes(blocks) // work.workers)
    finally:
        blocks.close()
    if reason:
        raise RuntimeError(reason)


def sent(stack: AdapterStack) -> list[Any]:
    """A stack as an order has it: as arrays, which Ray hands on without a copy."""
    return [ray.put({name: tensor.numpy() for name, tensor in stack.tensors().items()})]


@contextmanager
def _received(reference: Any) -> Iterator[AdapterStack]:
    """The stack of an order, read where it lies. Its pages would count as this process's for as long as that lives: they are
    let go of after use.
    """
    arrays: dict[str, np.ndarray] = ray.get(reference, timeout=_ANSWER_SECONDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    yield AdapterStack.from_tensors(tensors)
    libc = ctypes.CDLL(None)
    for array in arrays.values():
        first, end = -(-array.ctypes.data // PAGESIZE) * PAGESIZE, array.ctypes.data + array.nbytes
        if end - first >= PAGESIZE:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t((end - first) // PAGESIZE * PAGESIZE), _MADV_DONTNEED)
