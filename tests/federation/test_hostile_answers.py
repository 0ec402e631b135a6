"""Promise: whatever a client answers, the job ends with the bits of a run without that client's turn, and says so."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chainfed_ray.client.messages import Client, Fitting, HeadSums, Profile, Profiling, Training, TurnOrder, Update
from chainfed_ray.client.pool import Failure, LocalPool, Outcome
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import FailedTurn
from tests.builders import a_job, assert_same, run
from tests.pools import Alter, Altered, Answer

pytestmark = pytest.mark.slow

_HOSTILE = "phone-2"
_ORDERS = {Profile: Profiling, HeadSums: Fitting, Update: Training}
_NO_NUMBERS = st.sampled_from(
    [float("nan"), float("inf"), -1, -1e-9, 1e300, 10**400, 2**63, "3", "\ud800", True, [], {}, object()]
)
_CLAIMS = {"cpu_seconds": _NO_NUMBERS, "peak_bytes": _NO_NUMBERS}
_OF_AN_UPDATE = {
    "seconds": _NO_NUMBERS,
    "steps": _NO_NUMBERS | st.just(1.5),
    "peak_bytes": _NO_NUMBERS | st.just(1.5),
    "loss": st.sampled_from([float("nan"), float("-inf"), 10**400, None, "3", 1, True, torch.ones(1)]),
}
_CKA = st.sampled_from([(), (0.5,), (float("nan"),) * 4, (1e12,) * 4, (1,) * 4, ("x",) * 4, None, 3, torch.ones(4)])
_WRONG_TENSORS = (
    lambda tensor: tensor[:-1],
    lambda tensor: tensor.double(),
    lambda tensor: tensor.long(),
    lambda tensor: tensor.to("meta"),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: tensor.numpy(),
    lambda tensor: tensor.clone().requires_grad_(),
    lambda tensor: torch.full_like(tensor, torch.nan),
    lambda tensor: torch.full_like(tensor, torch.inf),
    lambda tensor: torch.full_like(tensor, 1e30),
    lambda tensor: tensor.tolist(),
    lambda tensor: None,
)
_WRONG_SUMS = ({"counts": -1.0}, {"counts": 0.5}, {"sums": 1e12}, {"products": 1e12}, {"products": -1.0})


@st.composite
def _tensors(draw: st.DrawFn, tensors: Tensors) -> Any:
    """Tensors that are not those ordered: one is another, is missing or is too many; or there are none at all."""
    name = draw(st.sampled_from(sorted(tensors)))
    wrong = draw(st.sampled_from(_WRONG_TENSORS))
    others = {other: tensor for other, tensor in tensors.items() if other != name}
    return draw(
        st.sampled_from([others, tensors | {"another": torch.ones(1)}, None, [], 3])
        | st.just(others | {name: wrong(tensors[name])})
    )


def _answers(data: st.DataObject, honest: Answer) -> Any:
    """An answer that no honest client gives: of another kind, or with one field changed."""
    if data.draw(st.booleans(), label="of another kind"):
        others: list[Any] = [Profile((0.5,) * 4, 9, 0.1), HeadSums({}, 9, 0.1), Update({}, 9, 0.1, 1, 0.1, 0.1)]
        others = [other for other in others if type(other) is not type(honest)]
        return data.draw(st.sampled_from([*others, None, "an update", {}, Update, ValueError("no")]))
    changes: dict[str, st.SearchStrategy[Any]] = dict(_CLAIMS)
    if isinstance(honest, Profile):
        changes["cka"] = _CKA
    if isinstance(honest, Update):
        changes |= _OF_AN_UPDATE
    if isinstance(honest, Update | HeadSums):
        changes["tensors"] = _tensors(honest.tensors)
    if isinstance(honest, HeadSums):
        multiplied = [_multiplied(honest.tensors, by) for by in _WRONG_SUMS]
        changes["tensors"] |= st.sampled_from(multiplied)
    field = data.draw(st.sampled_from(sorted(changes)), label="field")
    return replace(honest, **{field: data.draw(changes[field], label="value")})  # type: ignore[type-var]


def _multiplied(tensors: Tensors, by: Mapping[str, float]) -> Tensors:
    return {name: tensor * by.get(name, 1) for name, tensor in tensors.items()}


def _answering(kind: type, answer: Any) -> Alter:
    """The hostile client gives ``answer`` of the honest one, to orders for a ``kind`` of answer."""

    def alter(client: Client, order: TurnOrder, honest: Answer) -> Answer:
        if client.name != _HOSTILE or not isinstance(order, _ORDERS[kind]):
            return honest
        assert isinstance(honest, kind)
        given: Answer = answer(honest)
        return given

    return alter


class _Remembering(LocalPool):
    """A pool that takes each turn once, and gives the same answer when it is asked for the same turn again."""

    def __init__(self, base: ModelSource) -> None:
        super().__init__(base)
        self._known: dict[tuple[str, str], Answer] = {}

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        for place, client in enumerate(clients):
            key = client.name, _digest(order)
            if key not in self._known:
                self._known[key] = next(super().run([client], order, deadline)).result
            yield Outcome(place, self._known[key])


def _digest(order: TurnOrder) -> str:
    digest = sha256(type(order).__name__.encode())
    tensors = {} if isinstance(order, Profiling) else order.tensors
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _failed(log: CommitLog) -> list[FailedTurn]:
    """Every failed turn on record: in the search for the start, in fits of the head, and in rounds."""
    started, rounds = log.job_started(), log.rounds()
    assert started
    fits = [record.head_fit for record in rounds if record.head_fit]
    parts = [started.failed_turns, *(fit.failed_turns for fit in fits), *(record.failed_turns for record in rounds)]
    return [turn for part in parts for turn in part]


@pytest.mark.parametrize("kind", _ORDERS)
def test_a_hostile_answer_costs_the_turn_and_nothing_else(
    kind: type, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    document["chain"] |= {"start": "auto", "cka_threshold": 0.8, "head": "fitted"}
    document["rounds"] |= {"total": 1, "clients": 4, "quorum": 3}
    job = a_job(document, tmp_path_factory.mktemp("job"))
    pool, without = _Remembering(job.base), tmp_path_factory.mktemp("without")
    _, expected = run(job, without, Altered(pool, _answering(kind, lambda _: Failure("it is silent"))))

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        folder = tmp_path_factory.mktemp("hostile")
        _, found = run(job, folder, Altered(pool, _answering(kind, lambda honest: _answers(data, honest))))
        assert_same(found, expected)
        failed = _failed(CommitLog(folder))
        assert [turn.client for turn in failed] == [turn.client for turn in _failed(CommitLog(without))] == [_HOSTILE]
        assert failed[0].reason

    holds()
