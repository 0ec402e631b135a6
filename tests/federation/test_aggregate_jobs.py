"""Promises of aggregation in whole jobs: FedProx, poisoned clients, a server's optimizer that resumes bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Training, Update
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.turn import take_turn
from chainfed_ray.errors import QuorumLost
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.seeds import derive
from tests.builders import a_job, assert_same, run, run_some, story
from tests.end_to_end import EndToEnd
from tests.pools import poisoned, spoilt

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("steps", [1, 5])
def test_fedprox_is_the_gradient_of_the_penalised_loss(document: dict[str, Any], tmp_path: Path, steps: int) -> None:
    """A client's turn against autograd of loss + μ/2 · |w − w_start|² over the whole model, exactly."""
    job = a_job(document, tmp_path)
    client = replace(job.clients[0], plan=replace(job.clients[0].plan, window=Window(0, 3)))
    start = AdapterStack.new(range(4), job.hidden, bottleneck=8, classes=3, seed=0).tensors()
    order = Training(
        start, Window(0, 3), 3, epochs=1, batch_size=8, learning_rate=0.01, head_learning_rate=0.01, global_weight=0.0,
        global_trains="window", seed=5, steps=steps, proximal=4.0,
    )  # fmt: skip
    update = take_turn(client, job.base, lambda: order, capped=False)
    free = take_turn(client, job.base, lambda: replace(order, proximal=0.0), capped=False)
    assert isinstance(update, Update)
    assert isinstance(free, Update)

    model, mine = EndToEnd(job.base.folder, client.examples), AdapterStack.from_tensors(start).requires_grad_(True)
    mine.load_state_dict({name: tensor.clone() for name, tensor in start.items()}, assign=True)
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.01, weight_decay=0.0)
    batches: list[np.ndarray] = []
    for epoch in range(steps):
        shuffled = np.random.default_rng(derive(5, "epoch", epoch)).permutation(len(client.examples))
        batches += [shuffled[first : first + 8] for first in range(0, len(shuffled), 8)]
    for batch in batches[:steps]:
        optimizer.zero_grad()
        (model.loss(mine, batch) / len(batch)).backward()
        squares = [(parameter - start[name]).square().sum() for name, parameter in mine.named_parameters()]
        (4.0 / 2 * torch.stack(squares).sum()).backward()  # added to the gradients of the loss
        optimizer.step()
    assert_same(update.tensors, mine.tensors())
    moved, freely = (
        sum(float((tensor - start[name]).square().sum()) for name, tensor in tensors.items())
        for tensors in (update.tensors, free.tensors)
    )
    assert moved == freely if steps == 1 else moved < freely, "a first step starts at the start"


def test_the_defaults_are_fedavg_to_the_bit(document: dict[str, Any], tmp_path: Path) -> None:
    _, silent = run(a_job(document, tmp_path / "a"), tmp_path / "a" / "log")
    document["aggregation"] = {"rule": "mean", "optimizer": "none", "proximal": 0.0, "beta1": 0.5, "tau": 0.5}
    _, explicit = run(a_job(document, tmp_path / "b"), tmp_path / "b" / "log")
    assert_same(silent, explicit)


def test_a_server_optimizer_resumes_where_it_was(document: dict[str, Any], tmp_path: Path) -> None:
    """Killed in the first stage and in the second: the same bits, of the stack and of the optimizer's state."""
    document["aggregation"] = {"optimizer": "adam", "proximal": 0.1}
    _, expected = run(a_job(document, tmp_path / "a"), tmp_path / "a" / "log")

    log = tmp_path / "b" / "log"
    for process, rounds in (("b", 1), ("c", 2)):
        run_some(a_job(document, tmp_path / process), log, rounds)
    _, resumed = run(a_job(document, tmp_path / "d"), log)
    assert_same(resumed, expected)
    assert story(log) == story(tmp_path / "a" / "log")
    committed, again = (CommitLog(tmp_path / run / "log").tensors(3) for run in ("a", "b"))
    assert_same(committed, again)
    kept = {name.removeprefix("server/") for name in committed if name.startswith("server/")}
    assert {f"{kind}.adapters.{layer}.up.weight" for kind in "mv" for layer in (1, 2, 3)} < kept


@pytest.mark.parametrize(
    ("rule", "withstands"), [("mean", False), ("median", True), ("trimmed-mean", True), ("krum", True)]
)
def test_a_poisoned_client(document: dict[str, Any], tmp_path: Path, rule: str, withstands: bool) -> None:
    """One of five clients sends poison in every round."""
    document["fleet"]["clients"][0]["count"] = 5
    document["rounds"] |= {"total": 8, "clients": 5}
    document["aggregation"] = {"rule": rule}
    job = a_job(document, tmp_path)
    coordinator, _ = run(job, tmp_path / "log", poisoned(LocalPool(job.base), {"phone-2"}))
    assert all(record.counted and not record.failed_turns for record in CommitLog(tmp_path / "log").rounds())
    assert (coordinator.finish().accuracy > 0.8) == withstands


def test_a_round_with_too_few_for_krum_does_not_count(document: dict[str, Any], tmp_path: Path) -> None:
    document["fleet"]["clients"][0]["count"] = 5
    document["rounds"] |= {"clients": 5}
    document["aggregation"] = {"rule": "krum"}
    job, log = a_job(document, tmp_path), CommitLog(tmp_path / "log")
    with pytest.raises(QuorumLost, match=r"fewer than 5 clients answered \(phone-1: "):
        list(Coordinator(job, spoilt(LocalPool(job.base), {"phone-1"}), log).rounds())
    assert [record.counted for record in log.rounds()] == [False, False, False]
