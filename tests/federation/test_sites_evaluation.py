"""Promises of evaluation at sites: a client weighs as much as the rows that it can have, whatever it says."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.client.head_sums import TEMPERATURES
from chainfed_ray.client.messages import Evaluating, HeadLosses, Metrics
from chainfed_ray.client.pool import Outcome
from chainfed_ray.data.examples import most_held_out, splits_of_site
from chainfed_ray.data.sources import Split
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.federation.evaluation import FederatedEvaluation
from chainfed_ray.federation.head_fitting import is_possible
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.spec.parse import parse_job

_SPEC = parse_job(
    {
        "name": "tiny",
        "model": {"base": "builtin:minilm"},
        "data": {"max_length": 8},
        "fleet": {"clients": [{"name": "ward", "memory": "1GiB", "site": "ward", "data": "site:rows.jsonl"}]},
        "evaluation": {"rows": "sites"},
    }
)


@dataclass
class _Saying:
    """A pool in which each client gives the next of ``answers``."""

    answers: Sequence[Metrics | HeadLosses]

    def run(self, clients: Sequence[Any], order: Any, deadline: float) -> Iterator[Outcome]:
        assert isinstance(order, Evaluating)
        return iter([Outcome(place, answer) for place, answer in enumerate(self.answers)])


def _right(examples: int, right: int) -> Metrics:
    """What a client says of ``examples`` examples of two classes, of which so many were ``right``."""
    wrong = examples - right
    return Metrics(examples, examples, float(wrong), right, (right, 0), (right + examples, wrong), 0.1)


class _Strange(tuple[int, ...]):
    """A tuple that is none when it is looked into."""

    def __iter__(self) -> Iterator[int]:
        raise RuntimeError("it is not to be looked into")


@pytest.mark.parametrize(
    "claim",
    [
        _right(6, 6),
        _right(2**40, 2**40),
        _right(2**40, 0),
        replace(_right(5, 3), hits=_Strange((3, 0))),
        replace(_right(5, 3), loss=1e300),
        replace(_right(5, 3), examples="5"),
    ],
)
def test_more_held_out_rows_than_a_client_can_have_are_refused(claim: Metrics) -> None:
    assert _evaluated(2, _right(5, 3), claim) == (["a"], 3 / 5)


@pytest.mark.parametrize(
    "claim", [{"examples": 2**50}, {"occurs": (1,) * 1000}, {"hits": (1,)}, {"correct": 4}, {"predictions": 2**40}]
)
def test_so_are_those_of_a_language_model(claim: dict[str, Any]) -> None:
    honest = Metrics(2, 3, 4.5, 1, (), (), 0.1)
    assert _evaluated(None, honest, replace(honest, **claim)) == (["a"], 1 / 3)
    assert _evaluated(None, honest, honest) == (["a", "b"], 1 / 3)


def _evaluated(classes: int | None, *answers: Metrics) -> tuple[list[str], float | None]:
    """Whose answers count, and the accuracy by them."""
    clients = [SimpleNamespace(name=name, counts=ExampleCounts(40, 8, 320), budget_bytes=1) for name in ("a", "b")]
    job: Any = SimpleNamespace(spec=_SPEC, clients=clients, class_count=classes, layers=2)
    stack = AdapterStack.new(range(2), 4, bottleneck=2, classes=2, seed=0)
    pool: Any = _Saying([*answers])
    found = FederatedEvaluation(job, pool).whole(stack)
    return [score.client for score in found.clients], found.accuracy


def test_losses_of_a_client_that_would_make_every_sum_infinite_are_refused() -> None:
    def losses(value: float) -> HeadLosses:
        return HeadLosses(5, ((value,) * len(TEMPERATURES),) * 2, (3, 3), 0.1)

    assert is_possible(losses(2.0), 2, 5)
    assert not is_possible(losses(1e308), 2, 5)


@pytest.mark.slow
@given(st.integers(3, 200), st.integers(1, 4))
def test_no_honest_client_has_more(rows: int, classes: int) -> None:
    labels = tuple(str(place % classes) for place in range(rows))
    train, *held_out = splits_of_site(_SPEC.evaluation, _SPEC.seed, Split(np.arange(rows).astype(str).tolist(), labels))
    counts = ExampleCounts(len(train), 8, 8 * len(train))
    assert all(len(part) <= most_held_out(_SPEC.model, _SPEC.data, counts) for part in held_out)
