"""Who asks a process that dies is answered by another, and is not told half of a text twice."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from chainfed_ray.api.serve import asking
from chainfed_ray.api.serve.asking import Check, Together, answered, shared, written
from chainfed_ray.api.serve.stack_router import StackRouter
from chainfed_ray.errors import InvalidJob, PartUnavailable, ServiceBusy
from chainfed_ray.serving.messages import ModelKey, Piece, Question

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
    def __init__(self, outcomes: list[Piece | BaseException]) -> None:
        self.outcomes, self.cancelled = outcomes, False

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        for outcome in self.outcomes:
            if isinstance(outcome, BaseException):
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


def test_another_process_answers_though_nobody_can_say_whether_one_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_CHECK_SECONDS", 0.01)
    hangs = asyncio.Event()
    for check in (hangs.wait, lambda: asyncio.sleep(1 / 0)):
        found: Any = answered(in_turn([Answer(DIED), Answer("sea")]), check)  # type: ignore[arg-type]
        assert asyncio.run(found) == "sea"


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


class Never(Answer):
    """That of a process that has not started."""

    def __await__(self) -> Generator[Any, None, str]:
        yield from asyncio.Event().wait().__await__()
        return ""


class NoPieces(Pieces):
    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        await asyncio.Event().wait()
        yield LAST


@pytest.mark.parametrize("how", ["alone", "together", "written"])
def test_who_waits_for_a_process_that_cannot_start_waits_no_longer(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.001)
    looks, answer, pieces = Counter[str](), Never(""), NoPieces([])

    async def check() -> None:
        looks["all"] += 1
        if looks["all"] > 2:
            raise PartUnavailable("the process of the models", "cannot start", 60)

    async def ask() -> Any:
        async with asyncio.timeout(5):
            if how == "alone":
                return await answered(lambda: answer, check)
            if how == "together":
                question = Question(ModelKey("builtin:minilm", "float32", "job"), ["a"])
                return await Together(lambda questions: answer, check=check).answer(question)
            return [piece async for piece in written(lambda: pieces, check)]

    with pytest.raises(PartUnavailable, match="cannot start"):
        asyncio.run(ask())
    assert (pieces if how == "written" else answer).cancelled


@pytest.mark.parametrize("trouble", [None, KeyError("Inference"), PartUnavailable("the models", "cannot start", 60)])
def test_an_answer_that_comes_is_given_whatever_a_look_does(
    trouble: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look may hang, as Serve's controller does while it starts again, fail, or be wrong by then."""
    monkeypatch.setattr(asking, "_LOOK_SECONDS", 0.001)

    async def ask() -> Any:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def check() -> None:
            if isinstance(trouble, KeyError):
                asyncio.get_running_loop().call_later(0.01, lambda: answer.done() or answer.set_result("sea"))
            else:
                answer.set_result("sea")
            if trouble is None:
                await asyncio.Event().wait()
            else:
                raise trouble

        async with asyncio.timeout(5):
            return await answered(lambda: answer, check)

    assert asyncio.run(ask()) == "sea"


def test_many_who_wait_have_one_look() -> None:
    looks = 0

    async def check() -> None:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0)
        raise PartUnavailable("the process of the models", "cannot start", 60)

    async def all_of_them() -> list[BaseException | None]:
        look = shared(check)
        return [*await asyncio.gather(*(look() for _ in range(100)), return_exceptions=True)]

    assert {type(found) for found in asyncio.run(all_of_them())} == {PartUnavailable}
    assert looks == 1


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


class Calls:
    """Calls of a process with models that are answered when they are let go. A text is answered by itself, in capitals."""

    def __init__(self) -> None:
        self.asked, self.given_up = list[list[str]](), 0
        self.go = asyncio.Event()

    def ask(self, questions: list[Question]) -> Any:
        self.asked.append([text for question in questions for text in question.texts])
        return Call(self, questions)


class Call(Awaitable[list[Any]]):
    def __init__(self, calls: Calls, questions: list[Question]) -> None:
        self.calls, self.questions, self.over = calls, questions, False

    def __await__(self) -> Generator[Any, None, list[Any]]:
        yield from self.calls.go.wait().__await__()
        self.over = True
        wrong = InvalidJob.at("texts", "bad", "a good one")
        return [wrong if "bad" in one.texts else [text.upper() for text in one.texts] for one in self.questions]

    def cancel(self) -> None:
        self.calls.given_up += not self.over


def question(*texts: str) -> Question:
    return Question(ModelKey("builtin:minilm", "float32", "job"), [*texts])


async def begun(together: Together, *questions: Question) -> "list[asyncio.Task[Any]]":
    tasks = [asyncio.create_task(together.answer(one)) for one in questions]
    for _ in range(12):
        await asyncio.sleep(0)
    return tasks


def test_a_call_that_takes_long_holds_up_nobody() -> None:
    async def ask() -> None:
        calls = Calls()
        together = Together(calls.ask)
        first = await begun(together, question("a"))
        later = await begun(together, question("b"))
        async with asyncio.timeout(10):
            while len(calls.asked) < 2:
                await asyncio.sleep(0.01)
        calls.go.set()
        assert await asyncio.gather(*first, *later) == [["A"], ["B"]]

    asyncio.run(ask())


def test_questions_that_come_while_one_is_asked_are_asked_together() -> None:
    async def ask() -> None:
        calls = Calls()
        together = Together(calls.ask)
        first = await begun(together, question("a"))
        later = await begun(together, question("b", "c"), question("bad"), question("d"), question("left"))
        long = await begun(together, question(*"x" * 17))
        assert calls.asked == [["a"], ["x"] * 17], "one that comes alone waits for nobody, and nobody for many texts"
        later.pop().cancel()
        calls.go.set()
        answers = await asyncio.gather(*first, *later, *long, return_exceptions=True)
        assert calls.asked[2:] == [["b", "c", "bad", "d"]], "nobody waits for what is missing"
        assert answers[:2] == [["A"], ["B", "C"]]
        assert isinstance(answers[2], InvalidJob), "the error of one question is no other's"
        assert answers[3:] == [["D"], ["X"] * 17]
        assert await together.answer(question("e")) == ["E"]
        assert calls.given_up == 0

    asyncio.run(ask())


def test_a_call_is_given_up_when_all_its_callers_have_left() -> None:
    async def ask() -> None:
        calls = Calls()
        together = Together(calls.ask)
        (first,) = await begun(together, question("a"))
        one, two = await begun(together, question("b"), question("c"))
        first.cancel()
        await asyncio.wait([first])
        await begun(together)
        assert (calls.given_up, calls.asked) == (1, [["a"], ["b", "c"]])
        one.cancel()
        await begun(together)
        assert calls.given_up == 1, "another caller waits for it"
        calls.go.set()
        assert await two == ["C"]

    asyncio.run(ask())


def test_a_call_that_is_given_up_by_others_is_told_to_who_waits_for_it() -> None:
    async def ask() -> None:
        given_up = asyncio.get_running_loop().create_future()
        given_up.cancel()  # as Ray does it
        together = Together(lambda _: given_up)
        async with asyncio.timeout(10):
            answers = await asyncio.gather(*await begun(together, question("a"), question("b")), return_exceptions=True)
        assert [type(answer) for answer in answers] == [PartUnavailable] * 2

    asyncio.run(ask())


@pytest.mark.parametrize("looks", [None, shared(lambda: asyncio.sleep(0))])
def test_one_that_is_given_up_by_others_is_asked_again_and_then_told(looks: Check | None) -> None:
    """A question with a call of its own, and a text. To their callers it would look as if they had left themselves."""

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        given_up, there = loop.create_future(), loop.create_future()
        given_up.cancel()  # as Ray does it
        there.set_result([["A"]])
        async with asyncio.timeout(10):
            with pytest.raises(PartUnavailable, match="gave it up"):
                await Together(lambda _: given_up, may_wait=False, check=looks).answer(question("a"))
            answers = iter([given_up, there])
            assert await Together(lambda _: next(answers), may_wait=False, check=looks).answer(question("a")) == ["A"]
            with pytest.raises(PartUnavailable, match="gave it up"):
                await told(lambda: Pieces([asyncio.CancelledError()]), [])

    asyncio.run(ask())


def test_questions_whose_callers_have_left_take_no_place() -> None:
    async def ask() -> None:
        calls = Calls()
        together = Together(calls.ask)
        (first,) = await begun(together, question("a"))
        left = await begun(together, *(question("b") for _ in range(256)))
        for one in left:
            one.cancel()
        await asyncio.wait(left)
        (later,) = await begun(together, question("c"))
        calls.go.set()
        assert await asyncio.gather(first, later) == [["A"], ["C"]]

    asyncio.run(ask())


def test_too_many_questions_are_refused_and_an_error_of_the_call_is_each_ones() -> None:
    async def ask() -> None:
        calls = Calls()
        together = Together(calls.ask)
        (first,) = await begun(together, question("a"))
        *waiting, refused = await begun(together, *(question("b") for _ in range(257)))  # at once, before any is asked
        with pytest.raises(ServiceBusy):
            await refused
        calls.go.set()
        await asyncio.gather(first, *waiting)
        assert max(map(len, calls.asked)) == 128
        broken = Together(lambda _: Answer(BUSY))
        failed = await asyncio.gather(*await begun(broken, question("a"), question("b")), return_exceptions=True)
        assert [type(error) for error in failed] == [ServiceBusy] * 2
        alone = Together(calls.ask, may_wait=False)
        calls.go.clear()
        several = await begun(alone, question("a"), question("b"))
        assert calls.asked[-2:] == [["a"], ["b"]], "each by a process of its own choice"
        calls.go.set()
        await asyncio.gather(*several)

    asyncio.run(ask())


@pytest.mark.slow
def test_a_stack_has_its_process_and_others_when_that_is_gone() -> None:
    """Each stack has a first choice; the stacks are spread; and without one process, only its own stacks move."""
    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=f"replica-{place}")) for place in range(4)]

    def ranked(job: str, present: list[Any]) -> list[Any]:
        key = ModelKey("builtin:minilm", "float32", job)
        ranked = list[list[Any]]()
        for asked in (key, [Question(key, ["text"]), Question(key._replace(job="other"), ["text"])]):
            request: Any = SimpleNamespace(args=[asked])
            ranks = asyncio.run(StackRouter.choose_replicas(None, present, request))
            assert all(len(rank) == 1 for rank in ranks)
            ranked.append([rank[0] for rank in ranks])
        assert ranked[0] == ranked[1]
        return ranked[0]

    jobs = [f"job-{place}" for place in range(200)]
    first = {job: ranked(job, replicas)[0] for job in jobs}
    assert first == {job: ranked(job, replicas[::-1])[0] for job in jobs}
    shares = Counter(replica.replica_id.unique_id for replica in first.values())
    assert min(shares.values()) > 25
    for job in jobs:
        there = ranked(job, replicas[1:])
        assert there[0] is first[job] or first[job] is replicas[0]
        assert there == [replica for replica in ranked(job, replicas) if replica is not replicas[0]]
