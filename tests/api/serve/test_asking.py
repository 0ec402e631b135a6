"""Who asks a process that dies is answered by another, and is not told half of a text twice."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from chainfed_ray.api.serve.asking import answered, written
from chainfed_ray.api.serve.stack_router import StackRouter
from chainfed_ray.errors import InvalidJob, PartUnavailable, ServiceBusy
from chainfed_ray.serving.messages import ModelKey, Piece

DIED, BUSY = ActorDiedError(), BackPressureError(num_queued_requests=256, max_queued_requests=256)
REFUSED = RayTaskError("write", "a whole traceback", InvalidJob.at("prompt", "x", "a shorter one"))
FIRST, LAST = Piece("salt", 1, 1), Piece(" tide", 1, 2, "stop")


class Answer(Awaitable[str]):
    """As Ray Serve's: awaited, or cancelled."""

    def __init__(self, outcome: str | Exception) -> None:
        self.outcome, self.cancelled = outcome, False

    def __await__(self) -> Generator[Any, None, str]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self) -> None:
        self.cancelled = True


class Pieces:
    def __init__(self, outcomes: list[Piece | Exception]) -> None:
        self.outcomes, self.cancelled = outcomes, False

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        for outcome in self.outcomes:
            if isinstance(outcome, Exception):
                raise outcome
            yield outcome

    def cancel(self) -> None:
        self.cancelled = True


def in_turn(answers: list[Any]) -> Callable[[], Any]:
    return iter(answers).__next__


def test_another_process_answers() -> None:
    answers = [Answer(DIED), Answer(DIED), Answer("sea")]
    assert asyncio.run(answered(in_turn(answers))) == "sea"
    assert all(answer.cancelled for answer in answers), "nothing is left to be worked on"


@pytest.mark.parametrize(
    ("outcomes", "error", "words"),
    [
        ([DIED] * 3, PartUnavailable, r"the process of the models ended \(ActorDiedError\)"),
        ([BUSY], ServiceBusy, "too many requests to the models"),
        ([REFUSED], InvalidJob, "a shorter one"),
    ],
)
def test_what_cannot_be_answered_says_why(outcomes: list[Exception], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        asyncio.run(answered(in_turn([Answer(outcome) for outcome in outcomes])))


async def told(ask: Callable[[], Any], heard: list[Piece]) -> None:
    async for piece in written(ask):
        heard.append(piece)  # what was heard before an error counts


def test_a_text_is_begun_anew_until_a_piece_was_told() -> None:
    heard: list[Piece] = []
    asyncio.run(told(in_turn([Pieces([DIED]), Pieces([FIRST, LAST])]), heard))
    assert heard == [FIRST, LAST]
    heard.clear()
    broken = Pieces([FIRST, DIED])
    with pytest.raises(PartUnavailable):
        asyncio.run(told(in_turn([broken, Pieces([FIRST, LAST])]), heard))
    assert heard == [FIRST]
    assert broken.cancelled


def test_a_stack_has_its_process_and_others_when_that_is_gone() -> None:
    """Each stack has a first choice; the stacks are spread; and without one process, only its own stacks move."""
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{place}")) for place in range(4)]

    def ranked(job: str, present: list[Any]) -> list[Any]:
        key = ModelKey("builtin:minilm", "float32", job)
        request: Any = SimpleNamespace(args=[key, ["text"]])
        ranks = asyncio.run(StackRouter.choose_replicas(None, present, request))
        assert all(len(rank) == 1 for rank in ranks)
        return [rank[0] for rank in ranks]

    jobs = [f"job-{place}" for place in range(200)]
    first = {job: ranked(job, replicas)[0] for job in jobs}
    assert first == {job: ranked(job, replicas[::-1])[0] for job in jobs}
    shares = Counter(replica.replica_id.unique_id for replica in first.values())
    assert min(shares.values()) > 25
    for job in jobs:
        there = ranked(job, replicas[1:])
        assert there[0] is first[job] or first[job] is replicas[0]
        assert there == [replica for replica in ranked(job, replicas) if replica is not replicas[0]]
