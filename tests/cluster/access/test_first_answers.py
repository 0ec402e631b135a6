"""Promises of first answers: a request is carried out by one process at a time, and answered once, on both databases."""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy.orm import Session

from chainfed_ray.cluster.access import first_answers
from chainfed_ray.cluster.access.first_answers import HELD_SECONDS, Claim, FirstAnswer, FirstAnswers
from chainfed_ray.cluster.tables import moment
from tests.watching import wait_for

ANSWER = FirstAnswer(201, (("location", "/v1/jobs/a"), ("x-two", "1"), ("x-two", "2")), '{"id": "a"}')


class Clock:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        """The time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers(database: str, clock: Clock) -> Iterator[FirstAnswers]:
    made = FirstAnswers(database, clock=clock)
    yield made
    made.close()


@pytest.mark.slow
def test_a_request_from_its_first_process_to_its_answer(answers: FirstAnswers, database: str) -> None:
    assert answers.claim("a", "key", "digest", "one") is Claim.OURS
    assert answers.claim("a", "key", "digest", "two") is Claim.ELSEWHERE
    assert answers.claim("a", "key", "other", "two") is Claim.ANOTHER
    assert answers.claim("b", "key", "other", "two") is Claim.OURS
    answers.keep("a", "key", "one", ANSWER)
    again = FirstAnswers(database, existing=True)
    assert again.claim("a", "key", "digest", "three") == ANSWER
    assert again.claim("a", "key", "other", "three") is Claim.ANOTHER
    again.release("a", "key", "one")
    assert again.claim("a", "key", "digest", "three") == ANSWER, "what is answered is not let go of"
    again.close()


def test_a_key_that_is_let_go_of_is_free(answers: FirstAnswers) -> None:
    answers.claim("a", "key", "digest", "one")
    answers.release("a", "key", "two")
    assert answers.claim("a", "key", "digest", "two") is Claim.ELSEWHERE
    answers.release("a", "key", "one")
    assert answers.claim("a", "key", "mended", "two") is Claim.OURS


def test_an_answer_is_forgotten_and_not_the_one_that_came_after_it(answers: FirstAnswers) -> None:
    other = FirstAnswer(201, (), "other")
    answers.claim("a", "key", "digest", "one")
    answers.forget("a", "key", ANSWER)
    assert answers.claim("a", "key", "digest", "two") is Claim.ELSEWHERE, "there is no answer yet"
    answers.keep("a", "key", "one", ANSWER)
    answers.forget("a", "key", other)
    answers.forget("b", "key", ANSWER)
    assert answers.claim("a", "key", "digest", "two") == ANSWER
    answers.forget("a", "key", ANSWER)
    assert answers.claim("a", "key", "digest", "two") is Claim.OURS


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["KEPT_ANSWERS", "KEPT_CHARACTERS"])
def test_the_oldest_answers_of_a_tenant_go_first(
    answers: FirstAnswers, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(first_answers, limit, 3 if limit == "KEPT_ANSWERS" else 35)
    for tenant, count in (("b", 1), ("a", 5)):
        for number in range(count):
            began = moment()
            answers.claim(tenant, str(number), "digest", "one")
            assert answers.keep(tenant, str(number), "one", FirstAnswer(201, (), f"{number:10}"))
            wait_for(lambda began=began: moment() > began, "later time")
    answers.claim("a", "working", "digest", "one")
    found = [answers.claim("a", str(number), "digest", "two") for number in range(5)]
    assert [isinstance(one, FirstAnswer) for one in found] == [False, False, True, True, True]
    assert isinstance(answers.claim("b", "0", "digest", "two"), FirstAnswer), "it is another tenant's"
    assert answers.claim("a", "working", "digest", "two") is Claim.ELSEWHERE


def test_who_is_dead_is_followed_and_does_not_answer_any_more(answers: FirstAnswers, clock: Clock) -> None:
    answers.claim("a", "key", "digest", "one")
    clock.now += HELD_SECONDS - 1
    answers.renew("a", "key", "one")
    clock.now += HELD_SECONDS - 1
    assert answers.claim("a", "key", "digest", "two") is Claim.ELSEWHERE
    clock.now += 2
    assert answers.claim("a", "key", "digest", "two") is Claim.OURS
    assert not answers.keep("a", "key", "one", FirstAnswer(500, (), ""))
    assert not answers.renew("a", "key", "one")
    assert answers.claim("a", "key", "digest", "three") is Claim.ELSEWHERE
    assert answers.renew("a", "key", "two")
    assert answers.keep("a", "key", "two", ANSWER)
    assert answers.claim("a", "key", "digest", "three") == ANSWER


@pytest.mark.slow
@pytest.mark.parametrize("dead", [False, True])
def test_of_many_that_come_together_one_carries_it_out(answers: FirstAnswers, clock: Clock, dead: bool) -> None:
    if dead:
        answers.claim("a", "key", "digest", "dead")
        clock.now += HELD_SECONDS + 1
    start = Barrier(16)

    def claim(number: int) -> FirstAnswer | Claim:
        start.wait(60)
        return answers.claim("a", "key", "digest", str(number))

    with ThreadPoolExecutor(16) as threads:
        found = Counter(threads.map(claim, range(16)))
    assert found == {Claim.OURS: 1, Claim.ELSEWHERE: 15}


@pytest.mark.slow
@pytest.mark.parametrize("answered", [True, False])
def test_a_holder_that_lives_after_all_is_not_followed(
    answers: FirstAnswers, clock: Clock, monkeypatch: pytest.MonkeyPatch, database: str, answered: bool
) -> None:
    """It was slow, and answers or renews between the look of another process and its take-over."""
    answers.claim("a", "key", "digest", "slow")
    clock.now += HELD_SECONDS + 1
    other, get = FirstAnswers(database, existing=True, clock=clock), Session.get

    def looked(self: Session, *given: Any) -> Any:
        found = get(self, *given)
        monkeypatch.undo()
        assert other.keep("a", "key", "slow", ANSWER) if answered else other.renew("a", "key", "slow")
        return found

    monkeypatch.setattr(Session, "get", looked)
    assert answers.claim("a", "key", "digest", "two") == (ANSWER if answered else Claim.ELSEWHERE)
    other.close()
