"""Promises of the algorithm: plain FedAvg as a special case, exact resumption, arrival order without effect."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.seeds import derive
from tests.builders import a_job, assert_mean, assert_same, run, run_some, story
from tests.end_to_end import EndToEnd
from tests.pools import Backwards, rough, silent, spoilt

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("head_layers", [1, 3])
def test_window_of_all_layers_without_global_loss_is_fedavg(
    head_layers: int, document: dict[str, Any], tmp_path: Path
) -> None:
    """One stage over the whole model against federated end-to-end adapters: clients exactly, the mean to its stated bound."""
    document["chain"] |= {"window": 4, "start": 0, "global_weight": 0, "head_layers": head_layers}
    document["rounds"] |= {"total": 2, "clients": 4, "quorum": 4, "head_learning_rate": 0.01}
    document["fleet"]["partition"] = {"scheme": "dirichlet", "alpha": 0.5}
    job = a_job(document, tmp_path)
    assert len({len(client.examples) for client in job.clients}) > 1, "weights that matter"
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))

    stack = AdapterStack.new(range(4), 32, 8, 3, derive(3, "stack"), head_layers)
    for index, record in enumerate(coordinator.rounds()):
        rate = 0.01 * 0.5 * (1 + np.cos(np.pi * index / 2))
        sums: Tensors = {}
        for client in job.clients:
            model = EndToEnd(job.base.folder, client.examples)
            mine = AdapterStack.from_tensors(stack.tensors())
            optimizer = torch.optim.AdamW(mine.parameters(), lr=rate, weight_decay=0.0)
            seed = derive(derive(3, "round", index), "epoch", 0)
            shuffled = np.random.default_rng(seed).permutation(len(client.examples))
            for first in range(0, len(shuffled), 8):
                batch = shuffled[first : first + 8]
                optimizer.zero_grad()
                (model.loss(mine, batch) / len(batch)).backward()
                optimizer.step()
            for name, tensor in mine.tensors().items():
                sums[name] = sums.get(name, 0) + tensor.double() * len(client.examples)
        total = sum(len(client.examples) for client in job.clients)
        stack = coordinator.stack()
        for name, tensor in stack.tensors().items():
            assert_mean(tensor, sums[name] / total, record)
    assert record.index == 1


@pytest.mark.parametrize("schedule", ["staged", "cyclic"])
def test_stopped_and_resumed_is_never_stopped(document: dict[str, Any], tmp_path: Path, schedule: str) -> None:
    """Stopped in the first stage and at the start of the second: the same job, which began three times."""
    document["chain"] |= {"schedule": schedule}
    document["rounds"]["convergence"] = {"rule": "movement", "span": 2, "threshold": 0}
    _, expected = run(a_job(document, tmp_path / "a"), tmp_path / "a" / "log")

    log = tmp_path / "b" / "log"
    for process, rounds in (("b", 1), ("c", 2)):
        run_some(a_job(document, tmp_path / process), log, rounds)
    again, resumed = run(a_job(document, tmp_path / "d"), log)
    assert_same(resumed, expected)
    assert again.finish() == again.finish()
    assert story(log) == story(tmp_path / "a" / "log")


def test_order_of_arrival_changes_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 1, "clients": 4}
    job = a_job(document, tmp_path)
    _, forwards = run(job, tmp_path / "forwards", rough(LocalPool(job.base)))
    _, backwards = run(job, tmp_path / "backwards", Backwards(rough(LocalPool(job.base))))
    assert 0 < forwards["head.linear.bias"].abs().max() < 1
    assert_same(forwards, backwards)
    (record,) = CommitLog(tmp_path / "backwards").rounds()
    assert [turn.client for turn in record.turns] == ["phone-0", "phone-1", "phone-2", "phone-3"]


def test_a_profile_that_never_came_is_on_record(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"start": "auto"}
    job = a_job(document, tmp_path)
    job_started = Coordinator(job, silent(LocalPool(job.base), {"phone-2"}), CommitLog(tmp_path / "log")).open()
    assert [(lost.client, lost.reason) for lost in job_started.failed_turns] == [("phone-2", "missed the deadline")]
    assert len(job_started.cka) == 4
    everybody = {client.name for client in job.clients}
    with pytest.raises(QuorumLost, match=r"profiling the layers: .* \(phone-0: missed the deadline; "):
        Coordinator(job, silent(LocalPool(job.base), everybody), CommitLog(tmp_path / "other")).open()


def test_a_profile_needs_rows(document: dict[str, Any], tmp_path: Path) -> None:
    document["fleet"]["clients"][0]["count"] = 40
    document["chain"] |= {"start": "auto"}
    with pytest.raises(InvalidJob, match=r"chain\.start is 'auto'; expected the index of a layer, since no client has"):
        a_job(document, tmp_path)


def test_a_family_that_cannot_be_streamed_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    config = AutoConfig.for_model("xlm", vocab_size=30522, emb_dim=32, n_heads=4, n_layers=2)
    folder = shutil.copytree(document["model"]["base"].removeprefix("path:"), tmp_path / "xlm")
    AutoModel.from_config(config).save_pretrained(folder)
    document["model"]["base"] = f"path:{folder}"
    with pytest.raises(InvalidJob, match=r"model\.base .* expected a model that can be streamed \("):
        a_job(document, tmp_path)


@pytest.mark.parametrize("shape", [False, True])
def test_nonsense_costs_a_turn_and_is_on_record(document: dict[str, Any], tmp_path: Path, shape: bool) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 2}
    job = a_job(document, tmp_path)
    pool = spoilt(LocalPool(job.base), {"phone-1"}, shape)
    records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    for record in records:
        assert record.counted
        assert [turn.client for turn in record.turns] == ["phone-0", "phone-2", "phone-3"]
        assert [lost.client for lost in record.failed_turns] == ["phone-1"]
        assert "head.linear.bias" in record.failed_turns[0].reason


def test_without_a_quorum_the_job_ends_and_says_why(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 3}
    job = a_job(document, tmp_path)
    log = CommitLog(tmp_path / "log")
    with pytest.raises(QuorumLost, match=r"phone-1.*not finite"):
        list(Coordinator(job, spoilt(LocalPool(job.base), {"phone-0", "phone-1"}), log).rounds())
    assert [record.counted for record in log.rounds()] == [False, False, False]


def test_a_chain_learns(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 8, "clients": 4}
    job = a_job(document, tmp_path)
    coordinator, _ = run(job, tmp_path / "log")
    job_finished = coordinator.finish()
    assert job_finished.accuracy > 0.9
    assert job_finished.peak_bytes["phone"] < job.clients[0].plan.planned_bytes


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("chain", {"window": 1}),
        ("chain", {"window": 4, "start": 0}),
        ("chain", {"schedule": "cyclic"}),
        ("chain", {"global_trains": "window"}),
        ("chain", {"global_trains": "upper"}),
        ("chain", {"global_weight": 0}),
        ("chain", {"start": "auto", "cka_threshold": 0.0}),
        ("chain", {"start": "auto", "cka_threshold": 1.0}),
        ("model", {"dtype": "bfloat16"}),
        ("evaluation", {"every": "stage"}),
        ("aggregation", {"rule": "median"}),
        ("aggregation", {"rule": "trimmed-mean", "trim": 0.4}),
        ("aggregation", {"optimizer": "momentum"}),
        ("aggregation", {"optimizer": "adam", "proximal": 0.1}),
        ("aggregation", {"optimizer": "yogi", "server_learning_rate": 0.03}),
        ("rounds", {"local_epochs": 2, "batch_size": 5}),
        ("rounds", {"local_steps": 3, "batch_size": 5}),
        ("rounds", {"convergence": {"rule": "movement", "span": 1, "minimum": 1, "threshold": 0.99}}),
    ],
    ids=str,
)
def test_every_option_trains(section: str, changes: dict[str, Any], document: dict[str, Any], tmp_path: Path) -> None:
    document.setdefault(section, {}).update(changes)
    document["rounds"] |= {"total": 3, "clients": 2}
    job = a_job(document, tmp_path)
    coordinator, trained = run(job, tmp_path / "log")
    job_started, rounds = coordinator.open(), CommitLog(tmp_path / "log").rounds()
    assert rounds[-1].top == 3
    assert all(record.counted and not record.failed_turns for record in rounds)
    untrained = AdapterStack.new(range(job_started.start_layer, 4), 32, 8, 3, derive(3, "stack")).tensors()
    assert untrained.keys() == trained.keys()
    assert not torch.equal(trained["adapters.3.up.weight"], untrained["adapters.3.up.weight"])
    assert coordinator.finish().rounds == len(rounds)


def test_stages_share_the_rounds_and_say_why_they_ended(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 5, "convergence": {"rule": "none"}}
    job = a_job(document, tmp_path)
    records = list(Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).rounds())
    assert [(record.stage, record.bottom, record.top) for record in records] == [
        (0, 1, 2), (0, 1, 2), (0, 1, 2), (1, 2, 3), (1, 2, 3),
    ]  # fmt: skip
    assert [record.ended for record in records] == [None, None, "round limit", None, "round limit"]
