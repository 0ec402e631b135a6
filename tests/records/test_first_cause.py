"""Promises about what first went wrong: the turn or the error with which a failure began, not the one that told of it."""

from chainfed_ray.errors import QuorumLost
from chainfed_ray.records.first_cause import FirstCause, first_cause
from chainfed_ray.records.rounds import FailedTurn
from tests.builders import a_round, a_start


def failed(client: str, reason: str) -> FailedTurn:
    return FailedTurn(client=client, client_class="phone", reason=reason)


def test_a_lost_quorum_began_with_the_first_turn_that_failed() -> None:
    """Of the rounds that were given up, and not of an earlier one that went well without a client."""
    started = a_start()
    good = a_round(0, started, failed_turns=(failed("phone-9", "late"),))
    lost = [
        a_round(
            index,
            started,
            stage=1,
            turns=(),
            counted=False,
            failed_turns=(failed(f"phone-{index}", f"died in {index}"),),
        )
        for index in (1, 2, 3)
    ]
    error = QuorumLost("rounds 2 to 4", 2, {"phone-3": "died in 3"})
    assert first_cause(error, started, [good, *lost]) == FirstCause(
        client="phone-1", stage=2, round=2, message="died in 1"
    )


def test_a_quorum_that_is_lost_before_the_first_round_has_a_client() -> None:
    error = QuorumLost("the search for the start", 2, {"phone-0": "no memory", "phone-1": "late"})
    assert first_cause(error, None, []) == FirstCause(client="phone-0", message="no memory")


def test_an_error_began_with_what_caused_it_in_the_round_that_ran() -> None:
    started, outer = a_start(), RuntimeError("the evaluation failed")
    outer.__cause__ = ValueError("a weight is missing")
    assert first_cause(outer, None, []) == FirstCause(message="a weight is missing")
    assert first_cause(outer, started, []) == FirstCause(stage=1, round=1, message="a weight is missing")
    rounds = [a_round(index, started) for index in range(2)]
    assert first_cause(outer, started, rounds) == FirstCause(stage=1, round=3, message="a weight is missing")
    ended = [rounds[0], a_round(1, started, ended="converged")]
    assert first_cause(outer, started, ended) == FirstCause(stage=None, round=3, message="a weight is missing")
    every = [a_round(index, started) for index in range(started.total_rounds)]
    assert first_cause(outer, started, every) == FirstCause(message="a weight is missing")


def test_an_error_without_words_is_called_by_its_type() -> None:
    assert first_cause(MemoryError(), None, []).message == "MemoryError"
