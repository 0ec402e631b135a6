"""The actor of an evaluation with the weights on disk: it starts the workers with Ray Train, and passes orders and results on.

The workers keep the model on disk and evaluate stacks as the owner, the job's coordinator, sends them. What they do is in
worker.py.

The actor lives half a minute longer than its owner, to end the run in the way that Ray Train does. If it were killed with its
owner, Ray Train would keep the memory that it reserved: it notices only through Ray's dashboard, which may not run.

This actor and Ray Train's own compute nothing, so nothing here imports torch, which would take 150 MiB in each. Tensors pass
through as bytes, or behind a reference.
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
from chainfed_ray.cluster.resources import evaluation_resources, runtime_env
from chainfed_ray.device.removal import remove_when_this_process_ends

_OWNER_SECONDS = 30.0  # after this long without a heartbeat, the owner counts as dead
_END_SECONDS = 10.0  # how long workers have to end by themselves before they are killed
# Options of Ray Train. Workers keep their working folder, publish no metrics, and are checked every second. Nothing watches for
# machines that are about to be removed: that would take one more process, and a run that fails is simply started again.
RUN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(START_SECONDS),
}


@ray.remote
class EvaluationRun:
    """Runs Ray Train in a thread, and passes messages between the owner and the workers."""

    def __init__(self, run: RunSpec) -> None:
        self._spec = run
        self._changed = Condition()
        self._order: EvaluationOrder | None = None
        self._results: dict[int, bytes] = {}
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
        """The owner calls this every few seconds. If the calls stop, the actor ends the run and itself."""
        self._owner_heard = monotonic()

    def end(self) -> None:
        """End the workers and the run. Workers end when they next ask for an order; those that do not are killed."""
        with self._changed:
            number = self._order.number + 1 if self._order else 1
            self._order = EvaluationOrder(number, None, "")
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._over, _END_SECONDS):
                for worker in self._workers.values():
                    ray.kill(worker)
                self._changed.wait_for(lambda: self._over, START_SECONDS)

    def submit(self, order: EvaluationOrder) -> None:
        """The owner calls this to give the workers an order."""
        with self._changed:
            self._order, self._results, self._heard = order, {}, monotonic()
            if self._loaded:
                self._done = 0
            self._changed.notify_all()

    def wait(self, seconds: float) -> RunState:
        """Wait until the order is done or the run is over, for at most ``seconds``, and return the run's state."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or len(self._results) == self._spec.workers, seconds)
            silent = monotonic() - self._heard
            return RunState(dict(self._results), self._over, bool(self._workers), self._loaded, self._done, silent)

    def next(self, after: int, seconds: float) -> EvaluationOrder | None:
        """A worker calls this for the order after number ``after``. None if there is none within ``seconds``."""
        with self._changed:
            if not self._loaded:  # workers ask for an order as soon as they have loaded the model
                self._loaded, self._done = True, 0
            self._changed.wait_for(lambda: self._order and self._order.number > after, seconds)
            return self._order if self._order and self._order.number > after else None

    def join(self, rank: int, worker: Any) -> None:
        """A worker calls this when it has started, with the handle of its own actor."""
        self._workers[rank], self._heard = worker, monotonic()

    def alive(self) -> None:
        """A worker calls this when it has loaded a layer, or evaluated a batch."""
        with self._changed:
            self._heard = monotonic()
            self._done += 1

    def meet(self, host: str, port: int) -> None:
        """The worker of rank 0 calls this to tell the others its address."""
        with self._changed:
            self._meeting = host, port
            self._changed.notify_all()

    def meeting(self, seconds: float) -> tuple[str, int] | None:
        """The other workers call this for the address of rank 0. None if it is not known within ``seconds``."""
        with self._changed:
            self._changed.wait_for(lambda: self._meeting, seconds)
            return self._meeting

    def answer(self, rank: int, number: int, result: bytes) -> None:
        """A worker calls this with its result of the order ``number``, pickled."""
        with self._changed:
            if self._order and self._order.number == number:
                self._results[rank], self._heard = result, monotonic()
                if len(self._results) == self._spec.workers:
                    self._order = replace(self._order, stack=[])  # drop the reference, to free the shared memory
                self._changed.notify_all()

    def failed(self, reason: Reason) -> None:
        """A worker calls this before it ends with an error."""
        self._reasons.append(reason)

    def _run(self, itself: Any) -> None:
        from ray import train

        configs: Any = train  # the type hints of ray.train are those of an older version
        run = self._spec
        folder = tempfile.mkdtemp(
            prefix="chainfed-train-"
        )  # Ray Train requires a folder, though it stores nothing here
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
                    worker_runtime_env=runtime_env({"DS_ACCELERATOR": "cpu"}),
                ),
            ).fit()
            over = why_over(self._reasons, None)
        except Exception as error:  # from any part of Ray Train, or from a worker
            over = why_over(self._reasons, error)
        with self._changed:
            self._over = over
            self._changed.notify_all()

    def _watch(self) -> None:
        """End the run and this process when the owner's heartbeats stop."""
        while monotonic() - self._owner_heard < _OWNER_SECONDS:
            sleep(1.0)
        self.end()
        os._exit(0)


def why_over(reasons: list[Reason], error: Exception | None) -> str:
    """Find the first cause for which a run ended, and describe it.

    ``reasons`` are what the workers reported, and ``error`` is what Ray Train raised. A worker that reports a failure of its
    own is the cause. If there is no such report, the process of a worker died: other workers may have reported that their
    connection to it broke. Otherwise Ray Train itself failed, or the run ended without an error.
    """
    for reason in reasons:
        if not reason.peer_failed:
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
    """The class of Ray Train's basic trainer. It does not set up torch.distributed: the workers do that themselves."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            # Leave out the callback that starts an actor for datasets: there are none here.
            callbacks: list[Any] = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ != "DatasetsCallback"]

    return Trainer


def _worker(config: dict[str, Any]) -> None:
    """The code of a worker. The import is here so that only the worker's process loads torch."""
    from chainfed_ray.cluster.offload.worker import serve

    serve(config["run"], config["actor"])
