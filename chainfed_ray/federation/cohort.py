"""Who takes part in a round, and with which plan. All of it follows from the committed rounds and the job's seed.

In a job with privacy, who is sampled follows from a secret instead of the seed.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client
from chainfed_ray.client.pool import Failure
from chainfed_ray.errors import QuorumLost
from chainfed_ray.federation.admission import Candidate, Planner
from chainfed_ray.federation.prepare import as_client
from chainfed_ray.records.rounds import Round
from chainfed_ray.seeds import derive
from chainfed_ray.spec.job import JobSpec


@dataclass(frozen=True)
class Cohort:
    """Those sampled for a round, in the order of the fleet: ``clients`` who answer, and ``absent`` ones who do not.

    Each has the plan of its turn in ``stage``. Those who are ``lean`` exceeded a plan before, and had their second turn then.
    """

    planner: Planner
    stage: Window
    sampled: tuple[Candidate, ...]
    lean: frozenset[str]
    clients: tuple[Client, ...]
    absent: tuple[tuple[Client, Failure], ...]

    @classmethod
    def of(
        cls,
        spec: JobSpec,
        planner: Planner,
        candidates: Iterable[Candidate],
        index: int,
        stage: Window,
        history: Sequence[Round],
        seed: int,
    ) -> "Cohort":
        """The cohort of round ``index``, after the rounds of ``history``; who is sampled follows from ``seed``.

        Raises:
            QuorumLost: too few clients are left.
        """
        sampled, lean, excluded = _sample(spec, candidates, index, history, seed), _lean(history), _left_out(history)
        clients, absent = [], []
        for candidate in sampled:
            client = _turn(planner, candidate, stage, candidate.name in lean)
            if candidate.name in excluded:
                absent.append((client, Failure(f"it was left out: {excluded[candidate.name]}")))
            elif _answers(spec.seed, index, candidate):
                clients.append(client)
            else:
                reason = f"it did not answer: it does with probability {candidate.availability:g}"
                absent.append((client, Failure(reason)))
        return cls(planner, stage, sampled, lean, tuple(clients), tuple(absent))

    def second_turns(self, exceeded: Collection[str]) -> list[Client]:
        """Another turn for each client that has ``exceeded`` its plan in this round, if there is any for it."""
        again = (candidate for candidate in self.sampled if candidate.name in exceeded)
        turns = (_second_turn(self.planner, candidate, self.stage) for candidate in again)
        return [client for client in turns if client]


def everyone(
    planner: Planner, candidates: Iterable[Candidate], stage: Window, history: Sequence[Round]
) -> list[Client]:
    """Every client that has not been left out meanwhile, with the plan of its turn in ``stage``."""
    excluded, lean = _left_out(history), _lean(history)
    able = (candidate for candidate in candidates if candidate.name not in excluded)
    return [_turn(planner, candidate, stage, candidate.name in lean) for candidate in able]


def _left_out(history: Sequence[Round]) -> dict[str, str]:
    """The clients that exceeded their plans once too often, and how."""
    return {lost.client: lost.reason for record in history for lost in record.failed_turns if lost.over_budget}


def _sample(
    spec: JobSpec, candidates: Iterable[Candidate], index: int, history: Sequence[Round], seed: int
) -> tuple[Candidate, ...]:
    """Drawn without replacement; without those left out meanwhile, except where privacy has its price for a sample of all."""
    everybody, excluded = list(candidates), _left_out(history)
    able = [candidate for candidate in everybody if candidate.name not in excluded]
    if len(able) < spec.quorum:
        raise QuorumLost(f"round {index + 1}", spec.quorum, excluded)
    drawn_from = everybody if spec.privacy else able
    count = min(spec.rounds.clients, len(drawn_from))
    generator = np.random.default_rng(derive(seed, "sample", index))
    places = generator.choice(len(drawn_from), count, replace=False).tolist()
    return tuple(drawn_from[place] for place in sorted(places))


def _answers(seed: int, index: int, candidate: Candidate) -> bool:
    """Whether a client is there in a round, by a draw of its own that no other client's changes."""
    drawn = np.random.default_rng(derive(seed, "available", index, candidate.name)).random()
    return drawn < candidate.availability


def _lean(history: Sequence[Round]) -> frozenset[str]:
    """The clients that exceeded a plan and had a second turn, however that ended."""
    counted = {turn.client for record in history for turn in record.turns if turn.exceeded}
    return frozenset(counted | {lost.client for record in history for lost in record.failed_turns if lost.exceeded})


def _turn(planner: Planner, candidate: Candidate, stage: Window, lean: bool) -> Client:
    """A client's turn in ``stage``, held to its plan; one that is ``lean`` exceeded a plan before."""
    second = _second_turn(planner, candidate, stage) if lean else None
    if second:
        return second
    plan = planner.plan(candidate, stage)
    assert plan, "a client that is admitted has a plan for the window that needs the most"
    return as_client(candidate, plan, plan.planned_bytes)


def _second_turn(planner: Planner, candidate: Candidate, stage: Window) -> Client | None:
    """With a leaner plan, if there is any, and held to no less than all that the client declared."""
    plan = planner.fallback_plan(candidate, stage) or planner.plan(candidate, stage)
    return as_client(candidate, plan, candidate.memory) if plan and plan.planned_bytes < candidate.memory else None
