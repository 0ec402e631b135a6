"""Why a site did not carry out an order, in words of ours: each reason has some, whatever else an answer says."""

from typing import get_args

import pytest

from chainfed_ray.wire.envelope import NotDone, Reason
from chainfed_ray.wire.reasons import in_words

MIB = 2**20
KEYS = (None, "model.base", "fleet.clients.memory", "hours", "privacy.epsilon", "data.train")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (NotDone(reason="refused", key="model.base"), "it does not allow this base model"),
        (
            NotDone(reason="refused", key="fleet.clients.memory", numbers=(64 * MIB, 32 * MIB)),
            "it gives a client at most 32MiB; the job asks for 64MiB",
        ),
        (
            NotDone(reason="refused", key="hours", numbers=(3700, 1)),
            "it allows a job 1h 00m; this one has taken 1h 01m",
        ),
        (
            NotDone(reason="refused", key="privacy.epsilon", numbers=(3, 9)),
            "it allows an ε of at most 3; the job's is 9",
        ),
        (
            NotDone(reason="refused", key="privacy.epsilon", numbers=(3,)),
            "it takes part only with privacy, and an ε of at most 3",
        ),
        (
            NotDone(reason="job", key="data.train"),
            "its rows do not fit the job's data.train; the log at the site has the details",
        ),
        (NotDone(reason="job"), "its rows do not fit the job's keys; the log at the site has the details"),
        (
            NotDone(reason="classes"),
            "it does not tell the names of its labels; list the classes in data.classes",
        ),
        (
            NotDone(reason="plan"),
            "the order does not fit the job, or the site's own plan for its rows is another one",
        ),
        (NotDone(reason="changed"), "its rows have changed since the job began"),
        (NotDone(reason="model"), "its copy of the base model is another one"),
        (
            NotDone(reason="error", kind="WorkerDied"),
            "its process ended with WorkerDied; the log at the site has the details",
        ),
        (NotDone(reason="error"), "its process ended with an error; the log at the site has the details"),
    ],
    ids=lambda item: item.reason if isinstance(item, NotDone) else None,
)
def test_a_reason_is_said_in_words(answer: NotDone, words: str) -> None:
    assert in_words(answer) == words


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("numbers", [(), (1.0,), (1.0, 2.0), (1.0, 2.0, 3.0)], ids=len)
def test_a_refusal_that_lacks_its_numbers_is_one_all_the_same(key: str | None, numbers: tuple[float, ...]) -> None:
    assert in_words(NotDone(reason="refused", key=key, numbers=numbers)).startswith("it ")


@pytest.mark.parametrize("reason", get_args(Reason))
def test_each_reason_has_words_that_no_other_has(reason: Reason) -> None:
    others = {in_words(NotDone(reason=other)) for other in get_args(Reason) if other != reason}
    # A turn over its budget has a record of its own, with figures; without these it is an error like any other.
    assert (in_words(NotDone(reason=reason)) in others) == (reason in ("budget", "error"))
