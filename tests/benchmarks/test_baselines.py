"""What the chain is compared with, against plain computations of the same; and each kind of run, for real."""

import math
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm
from transformers import AutoModel

from benchmarks.accuracy_cell import measure
from benchmarks.accuracy_cells import Cell, Run, Study
from benchmarks.accuracy_rows import Rows
from benchmarks.baselines import (
    Features,
    Lora,
    Probe,
    Steps,
    batches,
    class_means,
    discriminant_head,
    federated,
    whole_model_bytes,
)
from benchmarks.corpora import Corpus
from benchmarks.metering import Meter, MeteredPool, TurnFailed
from benchmarks.methods import methods
from chainfed_ray.aggregation.discriminant import fitted
from chainfed_ray.client.head_sums import ClassSums
from chainfed_ray.client.messages import Client, Training
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.training import step_batches
from chainfed_ray.data.tokens import Examples
from chainfed_ray.federation.cohort import Cohort, Sampler
from chainfed_ray.model.adapters import Head, Tensors
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.planning.prepare import PlannedJob, prepare_job
from chainfed_ray.seeds import derive
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job
from tests.pools import failing


@pytest.fixture
def job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    """Four clients, three of them in each of two rounds of two steps."""
    document["rounds"] |= {"total": 2, "local_steps": 2, "head_learning_rate": 0.05}
    document["chain"] = {"window": 4, "start": 0, "adapter": {"bottleneck": 8}}
    return a_job(document, tmp_path)


def pooled(job: PlannedJob, examples: Examples, layer: int = -1) -> torch.Tensor:
    """The mean of a Hugging Face model's layer over each text's tokens, text by text."""
    model = AutoModel.from_pretrained(job.base.folder)
    means = []
    for index in range(len(examples)):
        batch = examples.batch(np.array([index]))
        with torch.no_grad():
            outputs = model.eval()(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)
        means.append(mean_over_tokens(outputs.hidden_states[layer], batch.mask))
    return torch.cat(means)


def normed(job: PlannedJob, examples: Examples) -> torch.Tensor:
    """What a head of two layers has of each text."""
    return torch.cat([layer_norm(pooled(job, examples, layer), (32,)) for layer in (-2, -1)], 1)


@pytest.fixture
def features(job: PlannedJob) -> Iterator[Features]:
    blocks = Blocks(job.base.folder, job.base.dtype)
    yield Features(blocks, head_layers=2)
    blocks.close()


def test_batches_are_those_of_a_job_s_own_turn() -> None:
    for count, steps in ((5, 7), (16, 3), (33, 5)):
        order = Training({}, None, 0, 1, 8, 0, 0, 0, "head", seed=11, steps=steps)  # type: ignore[arg-type]
        ours = batches(count, Steps(steps, 8, 0, 0, seed=11))
        for found, expected in zip(ours, step_batches(count, order), strict=True):
            assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_class_means(job: PlannedJob, features: Features) -> None:
    meter = Meter()
    accuracy = class_means(job, features, meter)(job.test)
    everyone = [candidate.examples for candidate, _ in job.admitted]
    known = torch.cat([pooled(job, examples) for examples in everyone])
    labels = torch.from_numpy(np.concatenate([examples.labels for examples in everyone]))
    means = torch.stack([known[labels == label].mean(0) for label in range(len(job.classes))])
    distances = (pooled(job, job.test).unsqueeze(1) - means).square().sum(-1)
    assert accuracy == (distances.argmin(1).numpy() == job.test.labels).mean()
    assert meter.steps == 0
    assert meter.sent_bytes == len(everyone) * 4 * (len(job.classes) * 32 + len(job.classes))


@pytest.mark.slow
def test_the_head_in_closed_form(job: PlannedJob, features: Features) -> None:
    """That of all examples in one place, and what each client sends is as large as the table of classes and features."""
    meter = Meter()
    accuracy = discriminant_head(job, features, meter)(job.test)
    everyone = [candidate.examples for candidate, _ in job.admitted]
    sums = ClassSums.zeros(len(job.classes), 64, torch.float64)
    for examples in everyone:
        sums.count(normed(job, examples).double(), torch.from_numpy(examples.labels))
    weight, bias = fitted(sums, normed(job, job.validation), torch.from_numpy(job.validation.labels))
    logits = normed(job, job.test) @ weight.T + bias
    assert accuracy == (logits.argmax(1).numpy() == job.test.labels).mean()
    assert meter.sent_bytes == len(everyone) * 4 * (len(job.classes) * 65 + 64 * 65 // 2)


def by_hand(job: PlannedJob, start: Tensors, forward: Any, rates: dict[str, float]) -> Tensors:
    """FedAvg written out: tensors are leaves, and AdamW has a rate for each kind of them."""
    current = {name: tensor.double() for name, tensor in start.items()}
    rounds = job.spec.rounds
    candidates = [candidate for candidate, _ in job.admitted]
    for index in range(rounds.total):
        decay = 0.5 * (1 + math.cos(math.pi * index / rounds.total))
        sampled = Sampler.of(job.spec, job.spec.seed).draw(candidates, index, ())
        updates = []
        for candidate in sampled:
            leaves = {name: tensor.float().clone().requires_grad_() for name, tensor in current.items()}
            groups = [
                {"params": [leaf for name, leaf in leaves.items() if name.startswith(kind)], "lr": rate * decay}
                for kind, rate in rates.items()
            ]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.0, foreach=False)
            seed = derive(job.spec.seed, "round", index)
            for indices in batches(len(candidate.examples), Steps(2, 8, 0, 0, seed)):
                optimizer.zero_grad()
                labels = torch.from_numpy(candidate.examples.labels[indices])
                cross_entropy(forward(leaves, candidate.examples, indices), labels).backward()
                optimizer.step()
            updates.append((len(candidate.examples), {name: leaf.detach().double() for name, leaf in leaves.items()}))
        total = sum(count for count, _ in updates)
        current = {name: sum(count * update[name] for count, update in updates) / total for name in current}  # type: ignore[misc]
    return {name: tensor.float() for name, tensor in current.items()}


def test_a_probe_is_fedavg_of_a_head_on_features(job: PlannedJob, features: Features) -> None:
    probe, meter = Probe(features, len(job.classes)), Meter()
    start = probe.tensors()

    def forward(leaves: Tensors, examples: Examples, indices: np.ndarray) -> torch.Tensor:
        head = Head(32, len(job.classes))
        means = features.of(examples)[indices, -1:]
        logits: torch.Tensor = torch.func.functional_call(head, leaves, (means, torch.ones(len(indices), 1)))
        return logits

    expected = by_hand(job, start, forward, {"": job.spec.rounds.head_learning_rate})
    assert list(federated(job, probe, meter)) == [0, 1]
    for name, tensor in probe.tensors().items():
        assert not tensor.equal(start[name])
        assert tensor.equal(expected[name]), name
    assert meter.steps == 2 * 3 * 2
    assert meter.sent_bytes == 2 * 3 * sum(tensor.nbytes for tensor in start.values())


def test_features_are_the_model_s(job: PlannedJob, features: Features) -> None:
    torch.testing.assert_close(features.of(job.test)[:, -1], pooled(job, job.test), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_lora_is_fedavg_of_low_rank_changes_to_the_hugging_face_model(job: PlannedJob) -> None:
    lora = Lora(job.base.folder, len(job.classes), seed=3)
    start = lora.tensors()
    layers = [name for name in start if "lora_A" in name]
    assert len(layers) == 2 * 4  # queries and values
    model = AutoModel.from_pretrained(job.base.folder).eval()
    frozen = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def forward(leaves: Tensors, examples: Examples, indices: np.ndarray) -> torch.Tensor:
        weights = dict(frozen)
        for name in layers:
            change = 2 * leaves[name.replace("lora_A", "lora_B")] @ leaves[name]  # α / r = 2
            below = name.removeprefix("base.").split(".lora_A")[0] + ".weight"
            weights[below] = weights[below] + change
        batch = examples.batch(indices)
        hidden = torch.func.functional_call(model, weights, (batch.ids, batch.mask)).last_hidden_state
        head = {name.removeprefix("head."): leaf for name, leaf in leaves.items() if name.startswith("head.")}
        logits: torch.Tensor = torch.func.functional_call(Head(32, len(job.classes)), head, (hidden, batch.mask))
        return logits

    rounds = job.spec.rounds
    expected = by_hand(job, start, forward, {"base.": rounds.learning_rate, "head.": rounds.head_learning_rate})
    assert list(federated(job, lora, Meter())) == [0, 1]
    for name, tensor in lora.tensors().items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=1e-3, msg=name)
    assert any(not tensor.equal(start[name]) for name, tensor in lora.tensors().items() if "lora_B" in name)


def test_lora_starts_the_same_for_a_seed_and_leaves_the_generator_alone(job: PlannedJob) -> None:
    state = torch.get_rng_state()
    first, same, other = (Lora(job.base.folder, 3, seed).tensors() for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state)
    assert all(first[name].equal(same[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


@pytest.mark.slow
def test_the_whole_model_is_weighed(job: PlannedJob) -> None:
    examples = job.admitted[0][0].examples
    steps = Steps(1, 8, 1e-3, 1e-3, seed=0)
    # In a process of its own, as a run's is: what other tests freed here would be taken again, and not count.
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        peak = process.submit(whole_model_bytes, job.base.folder, examples, 3, steps).result()
    assert peak is None or peak > (job.base.folder / "model.safetensors").stat().st_size / 2


def test_a_turn_that_fails_ends_the_run(job: PlannedJob) -> None:
    client: Client = job.clients[0]
    pool = MeteredPool(failing(LocalPool(job.base), "no power"), Meter())
    with pytest.raises(TurnFailed, match="phone-0 failed: no power"):
        list(pool.run([client], None, 1.0))  # type: ignore[arg-type]


# --- each kind of run, for real ------------------------------------------------------------------------------------------


@pytest.fixture
def study(tiny_model_folder: Path, tiny_data: Path) -> Study:
    corpus = Corpus("toy", f"path:{tiny_data}", None, 16, 60)
    return Study({"toy": corpus}, methods(4), f"path:{tiny_model_folder}", (1.0,), (), ("steps",), (0,))


def a_run(study: Study, method: str) -> Run:
    run = study.next(Cell("toy", 1.0, method, 0, "steps"), Rows(None))
    assert isinstance(run, Run)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "none",
        "fitted",
        "probe",
        "end-to-end-able",
        "lora-able",
        "last-window",
        "chain-staged",
        "chain-cyclic",
        "recommended",
    ],
)
def test_each_kind_of_run(method: str, study: Study, tmp_path: Path) -> None:
    found = measure(a_run(study, method), tmp_path)
    able = study.methods[method].part == "able"
    untrained = method in ("none", "fitted")
    assert found["client_steps"] == (0 if untrained else 3 * 18 if able else 60)
    assert found["rounds"] == (0 if untrained else 3 if able else 2)
    assert 0 <= found["accuracy"] <= 1
    assert found["client_cpu_seconds"] > 0
    assert found["seconds"] > 0
    assert found["bytes_sent"] > 0
    last = found["curve"][-1]
    assert last[:3] == (found["client_steps"], found["client_cpu_seconds"], found["bytes_sent"])
    assert last[4] == found["validation_accuracy"]
    assert [point[0] for point in found["curve"]] == sorted(point[0] for point in found["curve"])


@pytest.mark.slow
def test_a_run_of_tuning_has_no_test_accuracy(study: Study, tmp_path: Path) -> None:
    run = a_run(study, "last-window")
    assert measure(Run(**{**asdict(run), "tested": False}), tmp_path)["accuracy"] is None


@pytest.mark.slow
def test_the_same_data_cohorts_and_initial_values_for_every_method(study: Study, tmp_path: Path) -> None:
    dealt = []
    for method in ("end-to-end", "last-window", "probe", "recommended"):
        job = prepare_job(parse_job(a_run(study, method).document), tmp_path / method)
        candidates = [candidate for candidate, _ in job.admitted]
        stage, sampler = job.admitted[0][1].window, Sampler.of(job.spec, job.spec.seed)
        cohort = Cohort.of(sampler, job.planner, candidates, 1, stage, ())
        dealt.append(
            (
                [candidate.examples.ids.tobytes() for candidate in candidates],
                [candidate.name for candidate in cohort.sampled],
                job.validation.ids.tobytes(),
                job.test.ids.tobytes(),
            )
        )
    assert all(each == dealt[0] for each in dealt)
