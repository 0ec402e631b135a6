"""Promises of the head in closed form: it is the Gaussian classifier of all the data, whoever holds which part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal
from torch.nn.functional import cross_entropy, layer_norm

from chainfed_ray.aggregation.discriminant import discriminant, fitted
from chainfed_ray.client.head_sums import ClassSums
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import a_job, assert_same, run
from tests.pools import Backwards, Killed, dying, lying, silent


def examples(count: int, classes: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of overlapping classes; each class has at least one example."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(classes), torch.randint(classes, (count - classes,), generator=generator)])
    centres = torch.randn(classes, width, generator=generator)
    return centres[labels] + torch.randn(count, width, generator=generator), labels


def sums_of(features: Tensor, labels: Tensor, classes: int) -> ClassSums:
    total = ClassSums.zeros(classes, features.shape[1])
    total.count(features, labels)
    return total


def a_fitted(total: ClassSums, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    found = fitted(total, features, labels)
    assert found
    return found


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(0, 80), max_size=6), seed=st.integers(0, 1000))
def test_the_sums_of_any_split_give_the_classifier_of_all_the_data(cuts: list[int], seed: int) -> None:
    features, labels = examples(80, classes=5, width=6, seed=seed)
    order = labels.argsort()  # as skewed as can be: whole classes to one client
    whole, parts = sums_of(features, labels, 5), ClassSums.zeros(5, 6, torch.float64)
    for share in torch.tensor_split(order, sorted(cuts)):
        parts.add(sums_of(features[share], labels[share], 5))
    for one, other in zip(discriminant(whole, 0.1), discriminant(parts, 0.1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_its_probabilities_are_those_of_gaussians_with_one_covariance() -> None:
    features, labels = examples(300, classes=3, width=4, seed=1)
    features = features.double()
    means = torch.stack([features[labels == label].mean(0) for label in range(3)])
    deviations = features - means[labels]
    covariance = deviations.T @ deviations / 300
    shrunk = 0.7 * covariance + 0.3 * covariance.trace() / 4 * torch.eye(4)
    frequencies = labels.bincount() / 300
    joint = torch.stack([MultivariateNormal(mean, shrunk).log_prob(features) for mean in means], 1) + frequencies.log()
    total = ClassSums.zeros(3, 4, torch.float64)
    total.count(features, labels)
    weight, bias = discriminant(total, 0.3)
    torch.testing.assert_close((features @ weight.T + bias).softmax(1), joint.softmax(1))


def test_no_shrinkage_or_temperature_would_do_better_on_what_was_held_out() -> None:
    features, labels = examples(120, classes=4, width=20, seed=2)
    total = sums_of(features[:80], labels[:80], 4)
    held_out, truth = features[80:], labels[80:]
    weight, bias = a_fitted(total, held_out, truth)
    loss = cross_entropy(held_out @ weight.T + bias, truth)
    for shrinkage in (0.01, 0.03, 0.1, 0.3, 0.6):
        plain, offset = (tensor.float() for tensor in discriminant(total, shrinkage))
        for temperature in torch.logspace(-1, 1.9, 30):
            assert loss <= cross_entropy((held_out @ plain.T + offset) / temperature, truth) + 1e-5


def test_a_class_without_examples_is_possible_and_unlikely() -> None:
    features, labels = examples(60, classes=3, width=4, seed=3)
    weight, bias = a_fitted(sums_of(features, labels, 5), features, labels)
    assert torch.isfinite(weight).all()
    assert torch.isfinite(bias).all()
    assert (features @ weight.T + bias).argmax(1).max() < 3


def test_features_that_do_not_vary_give_no_wild_weights() -> None:
    features, labels = examples(8, classes=4, width=16, seed=4)
    features = layer_norm(features, (16,))[labels]  # each class is one text, again and again
    weight, _ = discriminant(sums_of(features, labels, 4), 0.01)
    assert weight.abs().max() < 1e7


def test_sums_without_an_inverse_give_no_head() -> None:
    features, labels = examples(20, classes=2, width=3, seed=5)
    nothing = ClassSums.zeros(2, 3)
    nothing.products.fill_(float("nan"))
    assert fitted(nothing, features, labels) is None


@pytest.mark.slow
def test_each_stage_begins_with_a_head_for_its_window(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["head"] = "fitted"
    document["rounds"] |= {"total": 4, "last_stage_share": 0.5, "convergence": {"rule": "none"}}
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    records = list(coordinator.rounds())
    assert [record.head_fit is not None for record in records] == [True, False, True, False]
    for record in records:
        if record.head_fit:
            assert record.head_fit.clients == 4
            assert record.head_fit.examples == sum(len(client.examples) for client in job.clients)
            features = 32 * (record.top + 1)  # of four layers that it may read, those that there are
            assert record.head_fit.sent_bytes == 4 * 4 * (3 + 3 * features + features * (features + 1) // 2)
    assert coordinator.finish().accuracy > 0.9


@pytest.mark.slow
def test_killed_between_the_fit_and_the_round_it_goes_on_as_if_never(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["head"] = "fitted"
    job = a_job(document, tmp_path)

    _, whole = run(job, tmp_path / "whole")
    with pytest.raises(Killed):
        list(Coordinator(job, dying(LocalPool(job.base), turns=0), CommitLog(tmp_path / "killed")).rounds())
    _, resumed = run(job, tmp_path / "killed")
    assert_same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lies", [{"counts": 2}, {"sums": 1e4}, {"products": 1e4}, {}], ids=str)
def test_sums_that_cannot_be_are_refused(lies: dict[str, float], document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["head"] = "fitted"
    document["rounds"] |= {"total": 1}
    job = a_job(document, tmp_path)
    pool = lying(LocalPool(job.base), "phone-0", lies)
    record = next(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    assert record.head_fit
    assert [lost.client for lost in record.head_fit.failed_turns] == ["phone-0"]
    assert record.head_fit.clients == 3


@pytest.mark.slow
def test_the_order_in_which_sums_arrive_changes_no_bit(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"head": "fitted", "start": "auto"}
    document["rounds"] |= {"total": 1, "quorum": 1}
    job = a_job(document, tmp_path)
    _, forwards = run(job, tmp_path / "forwards", silent(LocalPool(job.base), {"phone-1", "phone-3"}))
    _, backwards = run(job, tmp_path / "backwards", Backwards(silent(LocalPool(job.base), {"phone-1", "phone-3"})))
    assert_same(forwards, backwards)
    fits = [CommitLog(tmp_path / name).rounds()[0].head_fit for name in ("forwards", "backwards")]
    assert [turn.client for turn in fits[1].failed_turns] == ["phone-1", "phone-3"]  # type: ignore[union-attr]
    first, second = (fit.model_copy(update={"cpu_seconds": 0.0}) for fit in fits if fit)
    assert first == second
