"""The algorithm: a fleet trains a chain of adapters, window by window, and each round gives a ``Round`` record.

``Coordinator.rounds()`` hands orders to a ``ClientPool`` and never knows how clients run. It commits each record before it
yields it. All that follows is derived from the committed records and the job's seed, so a coordinator that is killed and made
again continues with the same bits. To cancel a job, stop iterating.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.aggregation.checks import check_aggregate
from chainfed_ray.aggregation.rule import AggregationRule
from chainfed_ray.chain import Chain, Window
from chainfed_ray.client.messages import Fitting, Training
from chainfed_ray.client.objective import Objective, trained_names
from chainfed_ray.client.pool import ClientPool
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.evaluation.score import Score
from chainfed_ray.federation.cohort import Cohort, Sampler, everyone, foreseen
from chainfed_ray.federation.collect import UpdateCollector, check_fruitful, collect_updates, reasons
from chainfed_ray.federation.evaluation import JobEvaluation, is_due, streamed
from chainfed_ray.federation.head_fitting import FittedHead, fit_head
from chainfed_ray.federation.privacy_policy import PrivacyPolicy
from chainfed_ray.federation.selection import best_of, best_round, best_tensors, exits, stack_to_restore
from chainfed_ray.federation.stages import Movement, RoundSpec, StageSchedule, rate_at
from chainfed_ray.federation.start import Start, StartRule, find_start
from chainfed_ray.federation.state import ChainState, stack_of
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.model.saved_stack import SavedStack, save_models
from chainfed_ray.planning.admission import Latecomers, listed
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.planning.sites import Sites
from chainfed_ray.record import named
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import FleetTotals, LateSite
from chainfed_ray.records.rounds import EarlyExit, Evaluation, JobFinished, JobStarted, Round, finite
from chainfed_ray.seeds import derive


class Coordinator:
    """Runs one job over ``pool``. Everything that it has decided is in ``log``.

    ``evaluation`` evaluates stacks on the server; by default it streams the model. ``aggregation``, ``start`` and
    ``objective`` are the caller's own rules, in place of those that the job names (docs/python.md). Those ``sites`` that come
    after the job has begun take part from the next round on, and the record of that round says so.

    Raises:
        InvalidJob: the caller's own aggregation rule is given to a job with privacy.
    """

    def __init__(
        self,
        job: PlannedJob,
        pool: ClientPool,
        log: CommitLog,
        evaluation: JobEvaluation | None = None,
        listen: Listener = no_listener,
        *,
        aggregation: AggregationRule | None = None,
        start: StartRule | None = None,
        objective: Objective | None = None,
        sites: Sites | None = None,
    ) -> None:
        self._job, self._spec, self._pool, self._log, self._sites = job, job.spec, pool, log, sites
        self._planner = job.planner
        self._privacy = PrivacyPolicy(job.spec, log, job.admitted, job.absent, aggregation)
        self._evaluation = evaluation or streamed(job, listen)
        self._listen = listen
        self._aggregation, self._start, self._objective = aggregation, start, objective
        given = {"partition": job.partition, "aggregation": aggregation, "start": start, "objective": objective}
        self._own_rules = {what: named(rule) for what, rule in given.items() if rule is not None}
        self._started: JobStarted | None = None
        self._history: list[Round] | None = None  # the committed rounds, which are read once

    def open(self) -> JobStarted:
        """Decide where the chain starts, and commit that; a job that has started before keeps what was committed.

        Raises:
            InvalidJob: the job started with other rows, clients or rules; or the caller's start rule gave an impossible layer.
            QuorumLost: no client sent what the start rule needs.
        """
        if self._started is None:
            self._started = self._opened()
        return self._started

    def _opened(self) -> JobStarted:
        if started := self._log.job_started():
            self._job.check_begun_with(started, self._log.clients)
            self._check_rules(started)
            # Another version of the planner may find room for wider windows.
            self._job = replace(self._job, admission=replace(self._job.admission, width=started.window))
            self._planner = self._job.planner.starting_at(started.start_layer)
            for record in self._committed():
                self._admit(record.late)
            return started
        found = self._find_start()
        self._planner = self._job.planner.starting_at(found.layer)
        stage, fleet = self._job.chain_from(found.layer).lowest, FleetTotals()
        self._log.commit_partition(self._job.manifest)
        self._log.commit_clients(listed(self._planner, self._job.admission, stage, fleet))
        started = JobStarted(
            classes=self._job.classes,
            admitted=fleet.admitted,
            excluded=(*fleet.excluded, *self._job.absent),
            clients_hash=fleet.hash,
            layers=self._job.layers,
            start_layer=found.layer,
            window=self._job.window,
            cka=found.cka,
            exits=found.exits,
            failed_turns=found.failed_turns,
            stages=len(self._job.chain_from(found.layer).windows),
            total_rounds=self._privacy.total,
            partition_hash=self._job.manifest.hash,
            profile_cpu_seconds=found.cpu_seconds,
            evaluator=self._evaluation.evaluator,
            own_rules=self._own_rules,
        )
        self._log.commit_started(started)
        return started

    def rounds(self) -> Iterator[Round]:
        """The rounds that are still to be run; those that were committed before are in the log.

        Raises:
            QuorumLost: three rounds in a row had too few updates, or not one of the job's rounds counted.
        """
        started = self.open()
        chain = self._job.chain_from(started.start_layer)
        schedule = StageSchedule(self._spec.rounds, self._spec.chain.schedule, chain, self._privacy.total)
        history = self._committed()
        state = self._state(chain, history)
        while (upcoming := schedule.next(history)) is not None:
            self._admit(late := self._late_sites(history))
            record, state = self._round(schedule, upcoming, state, history)
            record = self._privacy.priced(record, history).model_copy(update={"late": late})
            best = best_round([*history, record])
            self._log.commit_round(record, state.tensors(), keep=best.index if best else None)
            history.append(record)
            yield record
            check_fruitful(history, self._spec.quorum)
        self._pool.expect(lambda: ())  # no turn comes after the last round, also if that came early
        if not any(record.counted for record in history):
            failed = history[-1].failed_turns if history else ()
            raise QuorumLost(f"all {len(history)} rounds", self._spec.quorum, reasons(failed))

    def finish(self) -> JobFinished:
        """Evaluate the whole model on the test rows, once every round is committed, and commit that."""
        if finished := self._log.job_finished():
            self._log.erase_secret()
            return finished
        history = self._committed()
        best, stacks = best_of(history), self._stacks(history)
        served = self._spec.evaluation.serve if self._spec.evaluation.serve in stacks else "last"
        evaluation = self._evaluation.test(stacks[served])
        assert evaluation.accuracy is not None
        peaks: dict[str, int] = {}
        for turn in (turn for record in history for turn in record.turns):
            if turn.peak_bytes is not None:
                peaks[turn.client_class] = max(turn.peak_bytes, peaks.get(turn.client_class, 0))
        finished = JobFinished(
            accuracy=evaluation.accuracy,
            loss=evaluation.loss,
            rounds=len(history),
            peak_bytes=peaks,
            served=served,
            best=best,
            evaluation=evaluation,
            epsilon=self._privacy.epsilon(history),
            stopped=self._privacy.stopped(history),
        )
        self._log.commit_finished(finished)
        self._log.erase_secret()
        return finished

    def stack(self) -> AdapterStack:
        """The stack as it was last committed."""
        return self._state(self._job.chain_from(self.open().start_layer), self._committed()).stack

    def models(self) -> dict[str, SavedStack]:
        """The ``last`` stack and, if it is another, the ``best`` one, with what each needs. None until a round has counted."""
        history = self._committed()
        if not any(record.counted for record in history):
            return {}
        best = best_round(history)
        ends = {"last": history[-1].index if history else None, "best": best.index if best else None}
        return {name: self._job.saved(stack, ends[name]) for name, stack in self._stacks(history).items()}

    def save(self, folder: Path) -> None:
        """Write the served stack to ``folder``/model, and the other one, if there is one, beside it."""
        save_models(self.models(), self.finish().served, folder)

    def _committed(self) -> list[Round]:
        """The committed rounds. Each is read once: what a round takes must not grow with those before it."""
        if self._history is None:
            self._history = self._log.rounds()
        return self._history

    def _stacks(self, history: Sequence[Round]) -> dict[str, AdapterStack]:
        """The last stack, and the best one if that is of another round."""
        stacks, best = {"last": self.stack()}, best_round(history)
        if best and best.index != history[-1].index:
            stacks["best"] = stack_of(self._log.tensors(best.index))
        return stacks

    def _find_start(self) -> Start:
        if self._start is None:
            return find_start(self._job, self._pool, self._listen)
        found = self._start(self._job, self._pool, self._listen)
        lowest, highest = self._planner.requirements.start, self._job.layers - self._job.window
        if not lowest <= found.layer <= highest:
            expected = (
                f"a rule that gives a layer from {lowest} to {highest}, where a window fits; it gave {found.layer}"
            )
            raise InvalidJob.at("start", named(self._start), expected)
        return found

    def _check_rules(self, started: JobStarted) -> None:
        """Refuse a resumed job that lacks one of the caller's own rules with which it started, or has another."""
        for what in sorted({*started.own_rules, *self._own_rules}):
            then, now = started.own_rules.get(what), self._own_rules.get(what)
            if then != now:
                raise InvalidJob.at(what, now or "none", f"{then or 'none'}, with which the job started")

    @property
    def _latecomers(self) -> Latecomers:
        stage = self._job.chain_from(self._planner.requirements.start).lowest
        return Latecomers(self._spec.fleet, self._spec.privacy is not None, self._planner, stage, self._job.classes)

    def _late_sites(self, history: Sequence[Round]) -> tuple[LateSite, ...]:
        """The sites that came since the last round of ``history``."""
        known = {site.client_class for record in history for site in record.late}
        return self._latecomers.of(self._sites.late(known)) if self._sites else ()

    def _admit(self, late: Sequence[LateSite]) -> None:
        """Let the clients of sites that came late take part."""
        self._job = replace(self._job, admission=self._latecomers.joined(self._job.admission, late))

    def _state(self, chain: Chain, history: Sequence[Round]) -> ChainState:
        """The state after the last round of ``history``, as it was committed."""
        if history:
            return ChainState.of(self._log.tensors(history[-1].index), self._spec.aggregation)
        stack = self._job.new_stack(chain.adapters, derive(self._spec.seed, "stack"))
        return ChainState.new(stack, self._spec.aggregation)

    def _round(
        self, schedule: StageSchedule, upcoming: RoundSpec, state: ChainState, history: Sequence[Round]
    ) -> tuple[Round, ChainState]:
        """One round: its record, and the state after it. ``state`` itself does not change."""
        began = perf_counter()
        before, movement, server = state.stack.tensors(), state.movement, state.server
        fit = self._fit_head(upcoming, before, history) if schedule.starts_head(upcoming, history) else None
        if fit:
            before |= fit.tensors
            server = server.without(fit.tensors)
        trained = self._trained(before, upcoming.window)

        # 1. Sampled clients train the window, or as much of its top as their budgets hold. Their updates are collected.
        updates = self._collected(upcoming, before, trained, history)
        counted = self._privacy.counts(len(updates.turns))

        # 2. The updates give a new stack. The movement of the window goes into the convergence rule.
        after = before
        if counted:
            after, server = server.step(before, self._aggregate(updates, trained))
            movement = Movement() if schedule.starts_span(upcoming, history) else movement
            movement = movement.with_round(trained, {name: after[name] for name in trained})
        stack = AdapterStack.from_tensors(after)

        # 3. The early exit is evaluated on held-out rows. The stage ends by its convergence rule.
        moved = movement.value() if counted else None
        score, early_exit = self._score(upcoming, stack) if counted else (None, None)
        held_out = finite(score.loss) if score else None
        earlier = schedule.counted_rounds(upcoming, history)
        losses = [loss for loss in (*(record.held_out_loss for record in earlier), held_out) if loss is not None]
        ended = schedule.ended(upcoming, len(earlier) + counted, losses, moved)
        record = Round(
            index=upcoming.round_index,
            stage=upcoming.stage,
            bottom=upcoming.window.bottom,
            top=upcoming.window.top,
            turns=tuple(updates.turns),
            fraction_bits=updates.fraction_bits,
            failed_turns=tuple(updates.failed_turns),
            counted=counted,
            train_loss=updates.loss(),
            held_out_loss=held_out,
            accuracy=score.accuracy if score else None,
            movement=moved,
            ended=ended,
            seconds=0.0,
            head_fit=fit.record if fit else None,
            exit=upcoming.exit,
            early_exit=early_exit,
        )

        # 4. A stage that ends goes back to its best stack, if that is not the last. The stack that is kept is evaluated.
        of_stage = [each for each in history if each.stage == upcoming.stage]
        evaluated = exits([*of_stage, record], schedule.begun_with(upcoming, history))
        kept = {name: after[name] for name in trained}
        earlier_best = state.best if of_stage else trained
        best = best_tensors(earlier_best, record.index, evaluated, kept) if schedule.restores_best else {}
        restored = stack_to_restore(evaluated) if ended and schedule.restores_best else None
        if restored:
            stack = AdapterStack.from_tensors(after | best)
            server = server.without(best)
        evaluation = self._evaluated(upcoming, stack, ended) if counted or restored else None
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
        return fit_head(self._job, self._pool, clients, Fitting(tensors, upcoming.window, upcoming.exit), reporter)

    def _collected(
        self, upcoming: RoundSpec, before: Tensors, trained: Tensors, history: Sequence[Round]
    ) -> UpdateCollector:
        """The turns of the round's cohort. ``trained`` are the tensors of ``before`` that the stage trains."""
        candidates = self._privacy.sampled_from(self._job.admitted)
        sampler = Sampler.of(self._spec, self._privacy.sampling_seed)
        cohort = Cohort.of(sampler, self._planner, candidates, upcoming.round_index, upcoming.window, history)
        collector = UpdateCollector(
            lambda window: self._trained(before, self._privacy.sent(window, upcoming.window)),
            self._privacy.aggregate(upcoming.round_index, trained, cohort.examples),
        )
        total, fits_head = self._privacy.total, self._spec.chain.head == "fitted"
        with foreseen(sampler, self._pool, candidates, upcoming, total, history, fits_head):
            collect_updates(
                self._pool,
                cohort,
                self._order(upcoming, before),
                self._spec.rounds.deadline,
                partial(self._privacy.prepared, index=upcoming.round_index),
                collector,
                Reporter(f"round {upcoming.round_index + 1} of {total}: training", self._listen),
            )
        return collector

    def _aggregate(self, updates: UpdateCollector, trained: Tensors) -> Tensors:
        aggregate = updates.aggregate()
        if self._aggregation is not None:
            check_aggregate(named(self._aggregation), aggregate, trained)
        return aggregate

    def _trained(self, tensors: Tensors, window: Window) -> Tensors:
        """The tensors that a client trains in ``window``."""
        names = trained_names(tensors, window, self._spec.chain.stand_in_weight, self._spec.chain.global_trains)
        return {name: tensors[name] for name in sorted(names)}

    def _order(self, upcoming: RoundSpec, tensors: Tensors) -> Training:
        rounds = self._spec.rounds
        rate = rate_at(rounds, upcoming.spent, upcoming.limit)
        return Training(
            tensors=tensors,
            window=upcoming.window,
            exit=upcoming.exit,
            epochs=rounds.local_epochs,
            batch_size=rounds.batch_size,
            learning_rate=rounds.learning_rate * rate,
            head_learning_rate=rounds.head_learning_rate * rate,
            global_weight=self._spec.chain.stand_in_weight,
            global_trains=self._spec.chain.global_trains,
            seed=derive(self._spec.seed, "round", upcoming.round_index),
            steps=rounds.local_steps,
            proximal=self._spec.aggregation.proximal,
            clip_norm=rounds.clip_norm,
            objective=self._objective,
        )

    def _score(self, upcoming: RoundSpec, stack: AdapterStack) -> tuple[Score, EarlyExit] | tuple[None, None]:
        due = is_due(self._spec.evaluation.every, upcoming.round_index, upcoming.last_of_stage)
        return (
            self._evaluation.early_exit(stack, Window(upcoming.window.bottom, upcoming.exit)) if due else (None, None)
        )

    def _evaluated(self, upcoming: RoundSpec, stack: AdapterStack, ended: str | None) -> Evaluation | None:
        due = is_due(self._spec.evaluation.whole_every, upcoming.round_index, ended is not None)
        return self._evaluation.whole(stack) if due else None
