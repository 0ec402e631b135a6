"""A run of Ray Train that keeps a model offloaded to disk and judges stacks as they come: the actor between owner and workers.

The actor outlives its owner by half a minute, in which it ends the run as Ray Train ends one. (Were it killed with its owner,
Ray Train would not give back the memory that it reserved: it learns of that from Ray's dashboard, which need not be there.)

Neither this actor nor Ray Train's own computes anything, so nothing here loads torch, which would take 150 MiB of each: what
is of torch passes through as bytes, or behind a reference. The work itself is in worker.py.
"""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from time import monotonic, sleep
from typing import Any

import ray

from chainfed_ray.cluster.offload.messages import START_SECONDS, EvaluationOrder, Reason, RunSpec, RunState
from chainfed_ray.cluster.offload.removal import remove_when_this_process_ends
from chainfed_ray.cluster.resources import evaluation_resources, runtime_env
from chainfed_ray.device.peak import ENVIRONMENT

_OWNER_SECONDS = 30.0  # without a word from the owner: it is gone
_END_SECONDS = 10.0  # for workers to end by themselves
# Of Ray Train: a worker stays in its folder, publishes no figures, and is missed soon when it is gone. Nothing watches for
# machines that are about to be taken away: it would take a process, and a run that is lost is made again.
RUN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
}


@ray.remote
class EvaluationRun:
    """Runs Ray Train in a thread, and passes on what owner and workers have for one another."""

    def __init__(self, run: RunSpec) -> None:
        self._of = run
        self._changed = Condition()
        self._order: EvaluationOrder | None = None
        self._shares: dict[int, bytes] = {}
        self._reasons: list[Reason] = []
        self._over: str | None = None
        self._workers: dict[int, Any] = {}
        self._meeting: tuple[str, int] | None = None
        self._loaded, self._done = False, 0
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
            self._order = EvaluationOrder(number, None, "")
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._over, _END_SECONDS):
                for worker in self._workers.values():
                    ray.kill(worker)
                self._changed.wait_for(lambda: self._over, START_SECONDS)

    def ask(self, order: EvaluationOrder) -> None:
        """Give the workers an order."""
        with self._changed:
            self._order, self._shares, self._heard = order, {}, monotonic()
            if self._loaded:
                self._done = 0
            self._changed.notify_all()

    def wait(self, seconds: float) -> RunState:
        """The run's state as soon as an order was carried out, or the run is over, or after some time."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._shares) == self._of.workers, seconds)
            silent = monotonic() - self._heard
            return RunState(dict(self._shares), self._over, bool(self._workers), self._loaded, self._done, silent)

    def next(self, after: int, seconds: float) -> EvaluationOrder | None:
        """For a worker: the order that comes after the one numbered ``after``; None if there is none yet."""
        with self._changed:
            if not self._loaded:  # it asks as soon as it has the model
                self._loaded, self._done = True, 0
            self._changed.wait_for(lambda: self._order and self._order.number > after, seconds)
            return self._order if self._order and self._order.number > after else None

    def join(self, rank: int, worker: Any) -> None:
        """For a worker: it is there, as the actor ``worker``."""
        self._workers[rank], self._heard = worker, monotonic()

    def alive(self) -> None:
        """For a worker: it has loaded a layer, or judged a batch."""
        with self._changed:
            self._heard = monotonic()
            self._done += 1

    def meet(self, host: str, port: int) -> None:
        """For the worker of rank 0: where the others find it."""
        with self._changed:
            self._meeting = host, port
            self._changed.notify_all()

    def meeting(self, seconds: float) -> tuple[str, int] | None:
        """For the others: where that is; None if it is not known yet."""
        with self._changed:
            self._changed.wait_for(lambda: self._meeting, seconds)
            return self._meeting

    def answer(self, rank: int, number: int, share: bytes) -> None:
        """For a worker: its share of an order, pickled."""
        with self._changed:
            if self._order and self._order.number == number:
                self._shares[rank], self._heard = share, monotonic()
                if len(self._shares) == self._of.workers:
                    self._order = replace(self._order, stack=[])  # its shared memory is for the next one
                self._changed.notify_all()

    def failed(self, reason: Reason) -> None:
        """For a worker: why it ends."""
        self._reasons.append(reason)

    def _run(self, itself: Any) -> None:
        from ray import train

        configs: Any = train  # whose types are those of an older version
        run = self._of
        folder = tempfile.mkdtemp(prefix="chainfed-train-")  # Ray Train wants one, and keeps nothing in it here
        remove_when_this_process_ends(Path(folder))
        try:
            _trainer()(
                _worker,
                train_loop_config={"run": run, "actor": itself},
                scaling_config=configs.ScalingConfig(
                    num_workers=run.workers, resources_per_worker=evaluation_resources(run.memory), use_gpu=False
                ),
                run_config=configs.RunConfig(
                    name=run.name,
                    storage_path=folder,
                    failure_config=configs.FailureConfig(max_failures=0, controller_failure_limit=0),
                    worker_runtime_env=runtime_env({**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}),
                ),
            ).fit()
            over = why_over(self._reasons, None)
        except Exception as error:  # of whatever part of Ray Train, or of a worker
            over = why_over(self._reasons, error)
        with self._changed:
            self._over = over
            self._changed.notify_all()

    def _watch(self) -> None:
        """End the run and this process with it, when the owner is gone."""
        while monotonic() - self._owner_heard < _OWNER_SECONDS:
            sleep(1.0)
        self.end()
        os._exit(0)


def why_over(reasons: list[Reason], error: Exception | None) -> str:
    """Why a run is over whose workers gave ``reasons``, and which Ray Train ended with ``error``: the first cause of it all.

    What a worker says of itself comes first, then that one ended without a word, and last what others noticed of that.
    """
    for reason in reasons:
        if not reason.lost_another:
            return reason.words
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    died = [failure for failure in failures.values() if type(failure).__name__ != "UserExceptionWithTraceback"]
    if died or reasons:
        kind = f" ({type(died[0]).__name__})" if died else ""
        return f"the process of a worker ended{kind}; often the machine has too little memory"
    if error is None:
        return "the run ended"
    return f"Ray Train could not go on: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _trainer() -> Any:
    """Ray Train's trainer without what it makes for training data and for torch: workers find one another by themselves."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # An actor for datasets, of which there are none.
            made: list[Any] = super()._create_default_callbacks()
            return [callback for callback in made if type(callback).__name__ != "DatasetsCallback"]

    return Trainer


def _worker(config: dict[str, Any]) -> None:
    """What each worker does. Torch is loaded here, and so in its process alone."""
    from chainfed_ray.cluster.offload.worker import serve

    serve(config["run"], config["actor"])
