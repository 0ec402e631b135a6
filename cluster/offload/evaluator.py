"""The evaluator whose model is on disk: the coordinator's side of a run of Ray Train and DeepSpeed."""

import pickle
from collections.abc import Callable
from contextlib import suppress
from secrets import token_hex
from threading import Event, Thread
from time import monotonic, perf_counter
from typing import Any

import ray
from ray.exceptions import RayError

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.cluster.offload.doctor import look, why_not
from chainfed_ray.cluster.offload.footprint import disk_bytes, offload_footprint, swap_bytes
from chainfed_ray.cluster.offload.messages import OFFLOAD, START_SECONDS, EvaluationOrder, RunSpec, RunState
from chainfed_ray.cluster.offload.model import WorkerResult
from chainfed_ray.cluster.offload.run import RUN_ENVIRONMENT, EvaluationRun
from chainfed_ray.cluster.offload.worker import Work, put_stack
from chainfed_ray.cluster.resources import OFFLOAD_IDLE_BYTES, controller_options, runtime_env
from chainfed_ray.errors import EvaluationFailed, InvalidSetting
from chainfed_ray.evaluation.evaluator import Evaluated, EvaluationSets, Evaluator, whole_model
from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.source import ModelSource
from chainfed_ray.units import format_bytes

_SILENCE_SECONDS = 600.0  # the longest that the workers may take for a layer to load, or a batch
_POLL_SECONDS = 1.0
_ANSWER_SECONDS = 60.0  # the longest that the run's actor may take to answer; it computes nothing
_HEARTBEAT_SECONDS = 2.0
_NAMESPACE = "chainfed"


def make_evaluator(
    base: ModelSource,
    profile: MemoryProfile,
    sets: EvaluationSets,
    *,
    workers: int = 1,
    batch_size: int = 4,
    listen: Listener = no_listener,
) -> Evaluator | str:
    """The evaluator of a job whose held-out examples are ``sets``, or a sentence on why DeepSpeed cannot run here.

    Call it in a process that is connected to Ray. The model is loaded when the first stack is evaluated.
    """
    blocks = Blocks(base.folder, base.dtype)
    try:
        tokens = max(int(examples.lengths.max()) for examples in sets.values())
        memory = offload_footprint(blocks, profile, workers, batch_size, tokens).total
        reason = why_not(look(base.scratch / OFFLOAD), swap_bytes(blocks, workers), disk_bytes(blocks))
    except InvalidSetting as error:
        return str(error)
    except OSError as error:  # such as a folder that may not be read or written
        return f"this machine could not be checked: {error.strerror or error}" + (
            f" ({error.filename})" if error.filename else ""
        )
    finally:
        blocks.close()
    return reason or DiskEvaluator(base, profile.layers, sets, memory, workers, batch_size, listen)


class DiskEvaluator:
    """An ``Evaluator`` that runs a model of ``layers`` layers in ``workers`` processes.

    Each process is planned to take ``memory`` bytes above the idle process.
    """

    engine = "deepspeed"

    def __init__(
        self,
        base: ModelSource,
        layers: int,
        sets: EvaluationSets,
        memory: int,
        workers: int,
        batch_size: int,
        listen: Listener = no_listener,
    ) -> None:
        self._base, self._layers, self._memory, self._workers = base, layers, memory, workers
        self._batch_size, self._listen = batch_size, listen
        self._counts = {name: len(examples) for name, examples in sets.items()}
        self._work = [ray.put(Work(base, dict(sets), batch_size))]
        self._run: Any = None
        self._over = Event()
        self._number = 0

    def evaluate(self, stack: AdapterStack, examples: str) -> Evaluated:
        """See ``Evaluator``. The first call loads the model, and so does the call after a failure."""
        started = perf_counter()
        if self._run is None:
            self._start()
        self._number += 1
        try:
            order = EvaluationOrder(self._number, put_stack(stack), examples)
            ray.get(self._run.submit.remote(order), timeout=START_SECONDS)
            results = self._results(examples)
        except RayError as error:
            self.close()
            raise EvaluationFailed(self.engine, f"its run ended ({type(error).__name__})") from None
        except BaseException:
            self.close()
            raise
        predictions = Predictions.blank(self._counts[examples])
        for result in results:
            predictions.put(result.indices, result.predictions.take(result.indices))
        peaks = [result.peak_bytes for result in results if result.peak_bytes is not None]
        totals = [result.process_bytes for result in results if result.process_bytes is not None]
        return Evaluated(
            predictions,
            seconds=perf_counter() - started,
            forward_seconds=max(result.forward_seconds for result in results),
            planned_bytes=self._memory,
            peak_bytes=max(peaks, default=None),
            process_bytes=max(totals, default=None),
            processes=self._workers,
        )

    def close(self) -> None:
        """See ``Evaluator``. The workers remove their files and end; if they do not answer, they are killed."""
        run, self._run = self._run, None
        if run is not None:
            self._over.set()
            _end(run)

    def _start(self) -> None:
        Reporter("starting the processes of DeepSpeed", self._listen).begin()
        spec = RunSpec(f"run-{token_hex(4)}", self._workers, self._memory, self._work)
        name = f"evaluation of {self._base.scratch}"
        with suppress(ValueError):  # there is no such actor
            _end(ray.get_actor(name, _NAMESPACE))  # an earlier coordinator of this job was killed and left its run
        run: Any = EvaluationRun  # ray.remote adds `options`, which the type does not show
        self._run = run.options(
            **controller_options(),
            name=name,
            namespace=_NAMESPACE,
            lifetime="detached",
            # Each worker waits in one call, and reports progress in others.
            max_concurrency=2 * self._workers + 4,
            runtime_env=runtime_env(RUN_ENVIRONMENT),
        ).remote(spec)
        self._number, self._over = 0, Event()
        Thread(target=_send_heartbeats, args=(self._run, self._over), daemon=True).start()

    def _results(self, examples: str) -> list[WorkerResult]:
        """Wait until all workers have evaluated the set called ``examples``, and return their results.

        Raises:
            EvaluationFailed: the run ended, did not start in time, or made no progress for too long.
        """
        starts = monotonic() + START_SECONDS
        loading = Reporter("loading the model into DeepSpeed", self._listen)
        evaluating = Reporter(whole_model(examples), self._listen)
        tell_layers: Callable[[int], None] | None = None
        tell_rows: Callable[[int], None] | None = None
        while True:
            state = self._state()
            if state.loaded:
                tell_rows = tell_rows or evaluating.count(self._counts[examples], "rows")
                tell_rows(state.done * self._batch_size)
            elif state.started:
                tell_layers = tell_layers or loading.count(self._layers, "layers")
                tell_layers(state.done // self._workers)
            if len(state.results) == self._workers:
                return [pickle.loads(result) for result in state.results.values()]
            if state.over:
                raise EvaluationFailed(self.engine, state.over)
            if not state.started and monotonic() > starts:
                needed = format_bytes(OFFLOAD_IDLE_BYTES + self._memory)
                many = f"for each of {self._workers} processes" if self._workers > 1 else "for it"
                raise EvaluationFailed(
                    self.engine, f"no machine with {needed} was free {many} within {START_SECONDS:g} s"
                )
            if state.started and state.silent_seconds > _SILENCE_SECONDS:
                raise EvaluationFailed(self.engine, f"its workers made no progress for {_SILENCE_SECONDS:g} s")

    def _state(self) -> RunState:
        state: RunState = ray.get(self._run.wait.remote(_POLL_SECONDS), timeout=_ANSWER_SECONDS)
        return state


def _send_heartbeats(run: Any, over: Event) -> None:
    while not over.wait(_HEARTBEAT_SECONDS) and ray.is_initialized():
        run.owner_lives.remote()


def _end(run: Any) -> None:
    """End a run, and then its actor. An actor that does not answer ends by itself, because its heartbeats stop."""
    with suppress(RayError):
        ray.get(run.end.remote(), timeout=_ANSWER_SECONDS)
        ray.kill(run)
