"""Which clients take part in a round, and with which plan.

A cohort follows from the committed rounds and the job's seed alone, so a restarted job samples the same clients. In a job with
privacy the sample follows from a secret instead of the seed.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import ClientPool, Failure, Need
from chainfed_ray.errors import QuorumLost
from chainfed_ray.federation.stages import RoundSpec
from chainfed_ray.planning.admission import Planner
from chainfed_ray.planning.candidates import Candidate, as_client
from chainfed_ray.records.rounds import Round
from chainfed_ray.seeds import derive
from chainfed_ray.spec.job import JobSpec


@dataclass(frozen=True)
class Sampler:
    """Draws ``clients`` for a round, without replacement and with ``seed``. A job needs updates of ``quorum`` of them.

    Excluded clients are not drawn, except in a ``private`` job: ε was computed for samples of all admitted clients, and of
    those that may still come. ``availability_seed`` decides which clients answer. It is the job's own seed, in a private job
    as well.
    """

    clients: int
    quorum: int
    private: bool
    seed: int
    availability_seed: int

    @classmethod
    def of(cls, spec: JobSpec, seed: int) -> Self:
        """The sampler of a job, which draws with ``seed``."""
        return cls(spec.rounds.clients, spec.quorum, spec.privacy is not None, seed, spec.seed)

    def draw(self, candidates: Iterable[Candidate], index: int, history: Sequence[Round]) -> tuple[Candidate, ...]:
        """The clients of round ``index``, after the rounds of ``history``, in the order of the fleet.

        Raises:
            QuorumLost: so many clients are excluded that fewer than the quorum remain.
        """
        everybody, excluded = list(candidates), _excluded(history)
        able = [candidate for candidate in everybody if candidate.name not in excluded and has_come(candidate)]
        if len(able) < self.quorum:
            raise QuorumLost(f"round {index + 1}", self.quorum, excluded)
        drawn_from = everybody if self.private else able
        generator = np.random.default_rng(derive(self.seed, "sample", index))
        places = generator.choice(len(drawn_from), min(self.clients, len(drawn_from)), replace=False).tolist()
        return tuple(drawn_from[place] for place in sorted(places))

    def answers(self, index: int, candidate: Candidate) -> bool:
        """True if a client answers in round ``index``. Each client has its own draw, which no other client changes."""
        drawn = np.random.default_rng(derive(self.availability_seed, "available", index, candidate.name)).random()
        return drawn < candidate.availability


@dataclass(frozen=True)
class Cohort:
    """The clients ``sampled`` for a round, in the order of the fleet, each with the plan of its turn in ``stage``.

    ``clients`` answer. ``absent`` clients do not, each with the reason. ``on_fallback`` names the clients that exceeded a plan
    in an earlier round: they take this turn with their fallback plan, and have no second one.
    """

    planner: Planner
    stage: Window
    sampled: tuple[Candidate, ...]
    on_fallback: frozenset[str]
    clients: tuple[Client, ...]
    absent: tuple[tuple[Candidate, Failure], ...]

    @classmethod
    def of(
        cls,
        sampler: Sampler,
        planner: Planner,
        candidates: Iterable[Candidate],
        index: int,
        stage: Window,
        history: Sequence[Round],
    ) -> Self:
        """The cohort of round ``index``, after the rounds of ``history``.

        Raises:
            QuorumLost: so many clients are excluded that fewer than the quorum remain.
        """
        sampled = sampler.draw(candidates, index, history)
        on_fallback, excluded = _on_fallback(history), _excluded(history)
        clients, absent = [], []
        for candidate in sampled:
            if not has_come(candidate):
                assert candidate.remote, "a client without rows is awaited"
                absent.append((candidate, Failure(f"site {candidate.remote.site} has not come, or cannot take part")))
            elif candidate.name in excluded:
                absent.append((candidate, Failure(f"the client is excluded: {excluded[candidate.name]}")))
            elif sampler.answers(index, candidate):
                clients.append(_turn(planner, candidate, stage, candidate.name in on_fallback))
            else:
                reason = f"the client did not answer: its availability is {candidate.availability:g}"
                absent.append((candidate, Failure(reason)))
        return cls(planner, stage, sampled, on_fallback, tuple(clients), tuple(absent))

    @property
    def examples(self) -> int:
        """The examples of all sampled clients: the most that the weights of a round add up to."""
        return sum(candidate.counts.examples for candidate in self.sampled)

    def second_turns(self, exceeded: Collection[str]) -> list[Client]:
        """A second turn for each client named in ``exceeded``, which went over its plan in this round.

        A client without a fallback plan and without memory beyond its plan has no second turn.
        """
        again = (candidate for candidate in self.sampled if candidate.name in exceeded)
        turns = (_second_turn(self.planner, candidate, self.stage) for candidate in again)
        return [client for client in turns if client]


@contextmanager
def foreseen(
    sampler: Sampler,
    pool: ClientPool,
    candidates: Sequence[Candidate],
    upcoming: RoundSpec,
    total: int,
    history: Sequence[Round],
    fits_head: bool,
) -> Iterator[None]:
    """Tell ``pool`` what it is asked for while a round runs in the block, and what the round after it needs.

    Who is sampled next is known before, but for clients that are excluded in this round. A stage that begins with a head in
    closed form (``fits_head``) asks everyone. After the job's last round of ``total`` nobody is needed.
    """
    index = upcoming.round_index

    def needs(*rounds: int) -> list[Need]:
        found: Counter[tuple[str, int]] = Counter()
        for of in rounds:
            if of < total:
                found |= _counted(sampled(of))
        return [Need(*group, count) for group, count in found.items()]

    def sampled(of: int) -> Iterable[Candidate]:
        if of > index and upcoming.last_of_stage and fits_head:
            return candidates
        try:
            return sampler.draw(candidates, of, history)
        except QuorumLost:  # then there is no such round
            return ()

    pool.expect(partial(needs, index, index + 1))
    yield
    pool.expect(partial(needs, index + 1))


def _counted(candidates: Iterable[Candidate]) -> Counter[tuple[str, int]]:
    """How many of the clients there are of each class, with its memory. Those at sites need no process."""
    return Counter((each.client_class, each.memory) for each in candidates if each.remote is None)


def everyone(
    planner: Planner, candidates: Iterable[Candidate], stage: Window, history: Sequence[Round]
) -> list[Client]:
    """Every client that ``history`` has not excluded, with the plan of its turn in ``stage``."""
    excluded, on_fallback = _excluded(history), _on_fallback(history)
    able = (candidate for candidate in candidates if candidate.name not in excluded)
    return [_turn(planner, candidate, stage, candidate.name in on_fallback) for candidate in able]


def _excluded(history: Sequence[Round]) -> dict[str, str]:
    """The clients whose second turn exceeded its plan as well, each with the reason."""
    return {failed.client: failed.reason for record in history for failed in record.failed_turns if failed.over_budget}


def has_come(candidate: Candidate) -> bool:
    """False for one that holds the place of a client which may still come."""
    return candidate.remote is None or candidate.counts.examples > 0


def _on_fallback(history: Sequence[Round]) -> frozenset[str]:
    """The clients that exceeded a plan and had a second turn, whether or not it counted."""
    counted = {turn.client for record in history for turn in record.turns if turn.exceeded}
    failed = {turn.client for record in history for turn in record.failed_turns if turn.exceeded}
    return frozenset(counted | failed)


def _turn(planner: Planner, candidate: Candidate, stage: Window, on_fallback: bool) -> Client:
    """A client's turn in ``stage``: with its best plan, or as a second turn if the client exceeded a plan before."""
    second = _second_turn(planner, candidate, stage) if on_fallback else None
    if second:
        return second
    plan = planner.plan(candidate, stage)
    assert plan, "an admitted client has a plan for the window that needs the most memory"
    return as_client(candidate, plan, plan.planned_bytes)


def _second_turn(planner: Planner, candidate: Candidate, stage: Window) -> Client | None:
    """A turn with the fallback plan if there is one, capped at all the memory that the client declared.

    None if the plan already needs all of that memory: a second turn could hold no more than the first.
    """
    plan = planner.fallback_plan(candidate, stage) or planner.plan(candidate, stage)
    return as_client(candidate, plan, candidate.memory) if plan and plan.planned_bytes < candidate.memory else None
