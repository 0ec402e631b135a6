"""The algorithm: a chain of adapters, trained window by window by a fleet, as a sequence of ``Round`` records.

``Coordinator.rounds()`` never knows how clients run: it hands orders to a ``ClientPool``. Every record is committed before it
is yielded, and everything that follows is derived from what was committed and from the job's seed: a coordinator that is
killed and made again goes on as if nothing had happened. To cancel a job, cease to iterate.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.chain import Chain, Window
from chainfed_ray.client.messages import Fitting, Training
from chainfed_ray.client.objective import trained_names
from chainfed_ray.errors import QuorumLost
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.admission import Candidate
from chainfed_ray.federation.cohort import Cohort, everyone
from chainfed_ray.federation.collect import UpdateCollector, collect_updates, reasons
from chainfed_ray.federation.evaluation import (
    ServerEvaluation,
    best_exit,
    best_of,
    best_round,
    exits,
    is_due,
    stack_to_restore,
    streamed,
)
from chainfed_ray.federation.head_fitting import FittedHead, fit_head
from chainfed_ray.federation.pool import ClientPool
from chainfed_ray.federation.prepare import PlannedJob
from chainfed_ray.federation.privacy_policy import PrivacyPolicy
from chainfed_ray.federation.stages import Movement, RoundSpec, StageSchedule, rate_at
from chainfed_ray.federation.start import find_start
from chainfed_ray.federation.state import ChainState, stack_of
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.saved_stack import SavedStack, save_models
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import (
    AdmittedClient,
    EarlyExit,
    Evaluation,
    JobFinished,
    JobStarted,
    Restored,
    Round,
    finite,
)
from chainfed_ray.seeds import derive

_FRUITLESS_ROUNDS = 3  # without a quorum, in a row: then the job ends, with the reasons


class Coordinator:
    """Runs one job over ``pool``, with ``log`` as its memory; ``judging`` is by the streaming evaluator unless given."""

    def __init__(
        self,
        job: PlannedJob,
        pool: ClientPool,
        log: CommitLog,
        judging: ServerEvaluation | None = None,
        listen: Listener = no_listener,
    ) -> None:
        self._job, self._spec, self._pool, self._log = job, job.spec, pool, log
        self._planner = job.planner
        self._guarantee = PrivacyPolicy(job.spec, log, len(job.admitted))
        self._judging = judging or streamed(job, listen)
        self._listen = listen

    def open(self) -> JobStarted:
        """Decide where the chain starts, once: a committed opening is the opening.

        Raises:
            QuorumLost: no client sent what it takes to find out.
        """
        if job_started := self._log.job_started():
            self._job.check_begun_with(job_started)
            self._planner = self._job.planner.starting_at(job_started.start_layer)
            return job_started
        found = find_start(self._job, self._pool, self._listen)
        start = found.layer
        self._planner = self._job.planner.starting_at(start)
        job_started = JobStarted(
            admitted=tuple(self._admitted(candidate, start) for candidate, _ in self._job.admitted),
            excluded=self._job.excluded,
            layers=self._job.layers,
            start_layer=start,
            window=self._job.window,
            cka=found.cka,
            exits=found.exits,
            failed_turns=found.failed_turns,
            stages=len(self._chain(start).windows),
            total_rounds=self._guarantee.total,
            partition_hash=self._job.manifest.hash,
            profile_cpu_seconds=found.cpu_seconds,
            evaluator=self._judging.evaluator,
        )
        self._log.commit_partition(self._job.manifest)
        self._log.commit_started(job_started)
        return job_started

    def rounds(self) -> Iterator[Round]:
        """The rounds still to be run; those committed before are in the log.

        Raises:
            QuorumLost: three rounds in a row had too few updates.
        """
        job_started = self.open()
        chain = self._chain(job_started.start_layer)
        course = StageSchedule(self._spec, chain, self._guarantee.total)
        history = self._log.rounds()
        state = self._state(chain, history)
        while (upcoming := course.next(history)) is not None:
            record, state = self._round(course, upcoming, state, history)
            record = self._guarantee.priced(record, history)
            history.append(record)
            best = best_round(history)
            self._log.commit_round(record, state.tensors(), keep=best.index if best else None)
            yield record
            self._stop_if_fruitless(history)

    def finish(self) -> JobFinished:
        """What the whole model is worth on the test rows, once every round is committed."""
        if job_finished := self._log.job_finished():
            self._log.erase_secret()
            return job_finished
        history = self._log.rounds()
        best, stacks = best_of(history), self._stacks(history)
        served = self._spec.evaluation.serve if self._spec.evaluation.serve in stacks else "last"
        evaluation = self._judging.test(stacks[served])
        assert evaluation.accuracy is not None
        peaks: dict[str, int] = {}
        for turn in (turn for record in history for turn in record.turns):
            if turn.peak_bytes is not None:
                peaks[turn.client_class] = max(turn.peak_bytes, peaks.get(turn.client_class, 0))
        job_finished = JobFinished(
            accuracy=evaluation.accuracy,
            loss=evaluation.loss,
            rounds=len(history),
            peak_bytes=peaks,
            served=served,
            best=best,
            evaluation=evaluation,
            epsilon=self._guarantee.epsilon(history),
            stopped=self._guarantee.stopped(history),
        )
        self._log.commit_finished(job_finished)
        self._log.erase_secret()
        return job_finished

    def stack(self) -> AdapterStack:
        """The stack as last committed."""
        return self._state(self._chain(self.open().start_layer), self._log.rounds()).stack

    def models(self) -> dict[str, SavedStack]:
        """The ``last`` stack and, if it is another, the ``best`` one, with what has to be known to use them."""
        job, spec = self._job, self._spec
        return {
            name: SavedStack(stack, job.classes, spec.data.max_length, spec.model.base, job.layers_path)
            for name, stack in self._stacks(self._log.rounds()).items()
        }

    def save(self, folder: Path) -> None:
        """Write the finished stack that is to be served as ``model`` in ``folder``, and the other one by its name."""
        save_models(self.models(), self.finish().served, folder)

    def _stacks(self, history: Sequence[Round]) -> dict[str, AdapterStack]:
        """The last stack, and the best one if that is of another round."""
        stacks, best = {"last": self.stack()}, best_round(history)
        if best and best.index != history[-1].index:
            stacks["best"] = stack_of(self._log.tensors(best.index))
        return stacks

    def _chain(self, start: int) -> Chain:
        return Chain(self._job.layers, start, self._job.window)

    def _admitted(self, candidate: Candidate, start: int) -> AdmittedClient:
        """A client, with the plan of the chain's first stage."""
        plan = self._planner.plan(candidate, self._chain(start).windows[0])
        assert plan, "a client that is admitted has a plan for the window that needs the most"
        return AdmittedClient(
            client=candidate.name,
            client_class=candidate.client_class,
            examples=len(candidate.examples),
            budget_bytes=candidate.memory,
            planned_bytes=plan.planned_bytes,
            disk_bytes=self._planner.disk_bytes(candidate, plan),
            window=len(plan.window),
            micro_batch=plan.micro_batch,
            weights=plan.weights,
            activations_offloaded=plan.activations_offloaded,
            cached=plan.prefix.cached,
        )

    def _state(self, chain: Chain, history: Sequence[Round]) -> ChainState:
        """After the last round of ``history``, as it was committed."""
        if history:
            return ChainState.of(self._log.tensors(history[-1].index), self._spec.aggregation)
        bottleneck, classes = self._spec.chain.adapter.bottleneck, self._job.class_count
        seed = derive(self._spec.seed, "stack")
        stack = AdapterStack.new(chain.adapters, self._job.hidden, bottleneck, classes, seed, self._job.head_layers)
        return ChainState.new(stack, self._spec.aggregation)

    def _round(
        self, course: StageSchedule, upcoming: RoundSpec, state: ChainState, history: Sequence[Round]
    ) -> tuple[Round, ChainState]:
        began = perf_counter()
        before, movement, server = state.stack.tensors(), state.movement, state.server
        fit = self._fit_head(upcoming, before, history) if course.opens(upcoming, history) else None
        if fit:
            before |= fit.tensors
            server.forget(fit.tensors)
        trained = self._trained(before, upcoming.window)

        # 1. Sampled clients train the window, or as much of its top as their budgets hold; their updates are folded.
        fold = self._fold(upcoming, before, trained)
        collect_updates(
            self._pool,
            self._cohort(upcoming, history),
            self._order(upcoming, before),
            self._spec.rounds.deadline,
            partial(self._guarantee.prepared, index=upcoming.round_index),
            fold,
            Reporter(f"round {upcoming.round_index + 1} of {self._guarantee.total}: training", self._listen),
        )
        counted = self._guarantee.counts(len(fold.turns))

        # 2. The new stack, and how far the window moved.
        after = server.step(before, fold.aggregate()) if counted else before
        if counted:
            movement = Movement() if course.opens_span(upcoming, history) else movement
            movement.add(trained, {name: after[name] for name in trained})
        stack = AdapterStack.from_tensors(after)

        # 3. Judge it on held-out rows, and the stage by its convergence rule.
        moved = movement.value() if counted else None
        score, early_exit = self._score(upcoming, stack) if counted else (None, None)
        held_out = finite(score.loss) if score else None
        earlier = course.counted_rounds(upcoming, history)
        losses = [loss for loss in (*(record.held_out_loss for record in earlier), held_out) if loss is not None]
        ended = course.ended(upcoming, len(earlier) + counted, losses, moved)
        record = Round(
            index=upcoming.round_index,
            stage=upcoming.stage,
            bottom=upcoming.window.bottom,
            top=upcoming.window.top,
            turns=tuple(fold.turns),
            failed_turns=tuple(fold.failed_turns),
            counted=counted,
            train_loss=fold.loss(),
            held_out_loss=held_out,
            accuracy=score.accuracy if score else None,
            movement=moved,
            ended=ended,
            seconds=0.0,
            head_fit=fit.record if fit else None,
            early_exit=early_exit,
        )

        # 4. A stage that ends goes back to its best stack, if that is not the last. What is kept then is judged.
        judged = exits([*(each for each in history if each.stage == upcoming.stage), record])
        kept = {name: after[name] for name in trained}
        best = _best(state.best, record, judged, trained, kept) if course.goes_back else {}
        restored = stack_to_restore(judged) if ended and course.goes_back else None
        if restored:
            stack = AdapterStack.from_tensors(after | best)
            server.forget(best)
        evaluation = self._evaluation(upcoming, stack, ended) if counted or restored else None
        changes = {"restored": restored, "evaluation": evaluation, "seconds": perf_counter() - began}
        handed_on = ChainState(stack, Movement(), server, {}) if ended else ChainState(stack, movement, server, best)
        return record.model_copy(update=changes), handed_on

    def _fit_head(self, upcoming: RoundSpec, tensors: Tensors, history: Sequence[Round]) -> FittedHead | None:
        """The head in closed form, if the job has one."""
        if self._spec.chain.head != "fitted":
            return None
        admitted = (candidate for candidate, _ in self._job.admitted)
        clients = everyone(self._planner, admitted, upcoming.window, history)
        reporter = Reporter(f"fitting the head of stage {upcoming.stage + 1}", self._listen)
        return fit_head(self._job, self._pool, clients, Fitting(tensors, upcoming.window), reporter)

    def _fold(self, upcoming: RoundSpec, before: Tensors, trained: Tensors) -> UpdateCollector:
        aggregate = self._guarantee.aggregate(upcoming.round_index, trained)
        return UpdateCollector(
            lambda window: self._trained(before, self._guarantee.sent(window, upcoming.window)), aggregate
        )

    def _cohort(self, upcoming: RoundSpec, history: Sequence[Round]) -> Cohort:
        admitted = (candidate for candidate, _ in self._job.admitted)
        seed = self._guarantee.sampling_seed
        return Cohort.of(self._spec, self._planner, admitted, upcoming.round_index, upcoming.window, history, seed)

    def _trained(self, tensors: Tensors, window: Window) -> Tensors:
        """Those that a client trains in ``window``."""
        names = trained_names(tensors, window, self._spec.chain.global_weight, self._spec.chain.global_trains)
        return {name: tensors[name] for name in sorted(names)}

    def _order(self, upcoming: RoundSpec, tensors: Tensors) -> Training:
        rounds = self._spec.rounds
        rate = rate_at(rounds, upcoming.spent, upcoming.limit)
        return Training(
            tensors=tensors,
            window=upcoming.window,
            epochs=rounds.local_epochs,
            batch_size=rounds.batch_size,
            learning_rate=rounds.learning_rate * rate,
            head_learning_rate=rounds.head_learning_rate * rate,
            global_weight=self._spec.chain.global_weight,
            global_trains=self._spec.chain.global_trains,
            seed=derive(self._spec.seed, "round", upcoming.round_index),
            steps=rounds.local_steps,
            proximal=self._spec.aggregation.proximal,
            clip_norm=rounds.clip_norm,
        )

    def _score(self, upcoming: RoundSpec, stack: AdapterStack) -> tuple[Score, EarlyExit] | tuple[None, None]:
        due = is_due(self._spec.evaluation.every, upcoming.round_index, upcoming.last_of_stage)
        return self._judging.early_exit(stack, upcoming.window) if due else (None, None)

    def _evaluation(self, upcoming: RoundSpec, stack: AdapterStack, ended: str | None) -> Evaluation | None:
        due = is_due(self._spec.evaluation.whole_every, upcoming.round_index, ended is not None)
        return self._judging.whole(stack) if due else None

    def _stop_if_fruitless(self, history: Sequence[Round]) -> None:
        newest = history[-_FRUITLESS_ROUNDS:]
        if len(newest) == _FRUITLESS_ROUNDS and all(len(record.turns) < self._spec.quorum for record in newest):
            rounds = f"rounds {newest[0].index + 1} to {newest[-1].index + 1}"
            raise QuorumLost(rounds, self._spec.quorum, reasons(newest[-1].failed_turns))


def _best(best: Tensors, record: Round, judged: Sequence[Restored], before: Tensors, after: Tensors) -> Tensors:
    """What the stage trains as it was at its best exit, of which ``best`` were the tensors until this round."""
    found = best_exit(judged)
    if found is None:
        return {}
    if found.round == record.index:
        return after
    begun = found.round is None and record.head_fit is not None
    return before if begun else best
