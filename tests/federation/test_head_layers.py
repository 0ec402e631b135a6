"""Promises of `chain.head_layers`: how many layers a head reads, and that everyone reads the same of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Fitting, HeadSums
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.turn import take_turn
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.adapters import AdapterStack, Head
from chainfed_ray.planning.base_model import FEATURES
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "head_layers"),
    [
        ({"head": "fitted"}, 4),  # all that the model has: 4 · 32 features are few
        ({"head": "fitted", "schedule": "cyclic"}, 1),
        ({"head": "zero"}, 1),
        ({"head": "zero", "head_layers": 2}, 2),
        ({"head": "fitted", "head_layers": 1}, 1),
    ],
)
def test_how_many_layers_a_head_reads(
    chain: dict[str, Any], head_layers: int, document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"] |= chain
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    next(coordinator.rounds())
    assert job.head_layers == coordinator.stack().head_layers == head_layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain", [{"head": "zero"}, {"head": "zero", "schedule": "cyclic"}, {"schedule": "cyclic"}], ids=str
)
def test_a_head_that_goes_on_from_window_to_window_may_read_several(
    chain: dict[str, Any], document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"] |= {"head": "fitted", "head_layers": 3, "global_weight": 0.1} | chain
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    rounds = list(coordinator.rounds())
    assert all(record.counted and not record.failed_turns for record in rounds)
    assert coordinator.stack().head_layers == 3
    job_finished = coordinator.finish()
    assert job_finished.evaluation
    assert job_finished.accuracy > 0.8


@pytest.mark.slow
def test_features_of_a_real_model_are_as_many_as_may_be(document: dict[str, Any], tmp_path: Path) -> None:
    document["model"]["base"] = "builtin:minilm"
    document["chain"] = {"start": 4, "head": "fitted"}
    assert a_job(document, tmp_path).head_layers == FEATURES // 384 == 4


@pytest.mark.parametrize(
    ("layers", "expected"), [(5, "head_layers is 5; expected at most 4, the model's layers"), (0, "head_layers is 0")]
)
def test_a_head_reads_no_more_than_there_is(
    layers: int, expected: str, document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"]["head_layers"] = layers
    with pytest.raises(InvalidJob, match=expected):
        a_job(document, tmp_path)


def test_a_language_model_s_own_head_reads_one() -> None:
    document = {
        "name": "words",
        "model": {"base": "path:.", "task": "causal-lm"},
        "data": {"train": "path:rows.jsonl"},
        "fleet": {"clients": [{"name": "phone", "memory": "64MiB"}]},
        "chain": {"head_layers": 2},
    }
    with pytest.raises(InvalidJob, match="own head uses one layer"):
        parse_job(document)


def test_below_the_first_layer_there_is_nothing_to_read() -> None:
    """What is missing counts as zero."""
    head, generator = Head(8, 3, layers=4), torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    hidden, mask = torch.randn(2, 5, 8, generator=generator), torch.ones(2, 5)
    below = torch.randn(2, 1, 8, generator=generator)
    features = torch.cat([head.norm(below[:, 0]), head.norm(hidden.mean(1))], 1)
    expected = features @ head.linear.weight[:, 16:].T + head.linear.bias
    torch.testing.assert_close(head(hidden, mask, below), expected)
    assert (head.features(1), head.features(3), head.features(9)) == (16, 32, 32)


@pytest.mark.slow
def test_who_trains_less_of_a_window_reads_the_same(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"head": "fitted", "head_layers": 3}
    job = a_job(document, tmp_path)
    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0, head_layers=3)
    for layer in stack.layers:
        torch.nn.init.normal_(stack.adapter(layer).up.weight, std=0.1, generator=torch.Generator().manual_seed(layer))
    stage, wide = Window(2, 3), job.clients[0]
    found = []
    for name, window, cached in (("wide", stage, True), ("narrow", Window(3, 3), True), ("bare", stage, False)):
        plan = replace(wide.plan, window=window, prefix=replace(wide.plan.prefix, cached=cached))
        client = replace(wide, name=name, plan=plan, cap_bytes=2**40)
        sums = take_turn(client, job.base, lambda: Fitting(stack.tensors(), stage, stage.top), capped=False)
        assert isinstance(sums, HeadSums)
        found.append(sums.tensors)
    for others in found[1:]:
        for name, tensor in others.items():
            torch.testing.assert_close(tensor, found[0][name], rtol=1e-4, atol=1e-4)
