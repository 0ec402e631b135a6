"""Promises of the algorithm: plain FedAvg as a special case, exact resumption, arrival order without effect."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModel

from chainfed_ray.adapter import AdapterStack, Tensors
from chainfed_ray.client import Client, Order, Update
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.job import Job
from chainfed_ray.memory import PREFIX_BATCH
from chainfed_ray.pool import ClientPool, Failure, LocalPool, Outcome
from chainfed_ray.reading import mean_over_tokens
from chainfed_ray.seeds import derive
from chainfed_ray.tokens import Examples
from tests.conftest import a_job

pytestmark = pytest.mark.slow


class Rough:
    """A pool whose updates add up to something else in another order; last first, if they are to be ``reversed``."""

    def __init__(self, pool: ClientPool, reversed: bool) -> None:
        self._pool, self._reversed = pool, reversed

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        outcomes = [
            Outcome(place, self._rough(place, result)) for place, result in self._pool.run(clients, order, deadline)
        ]
        return iter(outcomes[::-1] if self._reversed else outcomes)

    def close(self) -> None:
        self._pool.close()

    @staticmethod
    def _rough(place: int, result: Any) -> Any:
        """The first two cancel out, and in between anything that is not enormous is lost."""
        if not isinstance(result, Update) or place > 1:
            return result
        bias = result.tensors["head.linear.bias"]
        return replace(
            result, tensors={**result.tensors, "head.linear.bias": torch.full_like(bias, (-1) ** place * 1e30)}
        )


class Spoilt:
    """A pool in which some clients' updates hold a value that is no number, or the wrong shape."""

    def __init__(self, pool: ClientPool, spoilt: set[str], shape: bool = False) -> None:
        self._pool, self._spoilt, self._shape = pool, spoilt, shape

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        for place, result in self._pool.run(clients, order, deadline):
            if clients[place].name in self._spoilt and isinstance(result, Update):
                tensors = dict(result.tensors)
                bias = tensors["head.linear.bias"]
                tensors["head.linear.bias"] = bias[:-1] if self._shape else torch.full_like(bias, torch.nan)
                result = replace(result, tensors=tensors)
            yield Outcome(place, result)

    def close(self) -> None:
        self._pool.close()


def run(job: Job, folder: Path, pool: ClientPool | None = None) -> tuple[Coordinator, Tensors]:
    coordinator = Coordinator(job, pool or LocalPool(job.base), CommitLog(folder))
    list(coordinator.rounds())
    coordinator.finish()
    return coordinator, coordinator.stack().tensors()


def assert_same(first: Tensors, second: Tensors) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class EndToEnd:
    """The whole Hugging Face model, frozen, with an adapter after each layer: hooks, and nothing of our chain."""

    def __init__(self, folder: Path, examples: Examples) -> None:
        self._model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        self._layers = self._model.encoder.layer
        self._examples = examples
        # What is below the lowest adapter is always run in the same micro-batches, as the cache promises.
        self._lowest: dict[int, Tensor] = {}
        for indices in examples.by_length(PREFIX_BATCH):
            outputs: list[Tensor] = []
            hook = self._layers[0].register_forward_hook(lambda _, __, output, to=outputs: to.append(output))
            self._run(indices)
            hook.remove()
            self._lowest |= {
                index: row[: examples.lengths[index]]
                for index, row in zip(indices.tolist(), outputs[0], strict=True)
            }  # fmt: skip

    def loss(self, stack: AdapterStack, indices: np.ndarray) -> Tensor:
        """The sum of the cross-entropies of some examples."""
        lowest = torch.nn.utils.rnn.pad_sequence([self._lowest[index] for index in indices.tolist()], batch_first=True)
        batch = self._examples.batch(indices)
        means: list[Tensor] = []
        last = lowest

        def follow(place: int, output: Tensor) -> Tensor:
            nonlocal last
            last = stack.adapter(place)(lowest if place == 0 else output)
            if place + 1 < len(self._layers):  # here, so that gradients are added up in the same order
                means.append(mean_over_tokens(last, batch.mask))
            return last

        hooks = [
            layer.register_forward_hook(lambda _, __, output, at=place: follow(at, output))
            for place, layer in enumerate(self._layers)
        ]
        self._run(indices)
        for hook in hooks:
            hook.remove()
        return cross_entropy(stack.head(last, batch.mask, torch.stack(means, 1)), batch.labels, reduction="sum")

    def _run(self, indices: np.ndarray) -> None:
        batch = self._examples.batch(indices)
        self._model(input_ids=batch.ids, attention_mask=batch.mask)


@pytest.mark.parametrize("reads", [1, 3])
def test_window_of_all_layers_without_global_loss_is_fedavg(
    reads: int, document: dict[str, Any], tmp_path: Path
) -> None:
    """One stage over the whole model against federated end-to-end adapters, exactly."""
    document["chain"] |= {"window": 4, "start": 0, "global_weight": 0, "head_layers": reads}
    document["rounds"] |= {"total": 2, "clients": 4, "quorum": 4, "head_learning_rate": 0.01}
    document["fleet"]["partition"] = {"scheme": "dirichlet", "alpha": 0.5}
    job = a_job(document, tmp_path)
    assert len({len(client.examples) for client in job.clients}) > 1, "weights that matter"
    _, ours = run(job, tmp_path / "log")

    stack = AdapterStack.new(range(4), 32, 8, 3, derive(3, "stack"), reads)
    for index in range(2):
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
        stack = AdapterStack.from_tensors({name: (tensor / total).float() for name, tensor in sums.items()})
    assert_same(ours, stack.tensors())


@pytest.mark.parametrize("schedule", ["staged", "cyclic"])
@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_stopped_and_resumed_is_never_stopped(
    document: dict[str, Any], tmp_path: Path, schedule: str, killed_after: int
) -> None:
    document["chain"] |= {"schedule": schedule}
    document["rounds"]["convergence"] = {"rule": "movement", "span": 2, "threshold": 0}
    _, expected = run(a_job(document, tmp_path / "a"), tmp_path / "a" / "log")

    job = a_job(document, tmp_path / "b")
    log = CommitLog(tmp_path / "b" / "log")
    rounds = Coordinator(job, LocalPool(job.base), log).rounds()
    for _ in range(killed_after):
        assert next(rounds) == log.rounds()[-1], "durable before it is reported"
    rounds.close()
    again, resumed = run(a_job(document, tmp_path / "c"), tmp_path / "b" / "log")
    assert_same(resumed, expected)
    assert again.finish() == again.finish()
    assert story(tmp_path / "b" / "log") == story(tmp_path / "a" / "log")


def story(folder: Path) -> list[dict[str, Any]]:
    """The rounds on record, without what time and the machine put there."""
    rounds = [record.model_dump(exclude={"seconds"}) for record in CommitLog(folder).rounds()]
    for record in rounds:
        record["turns"] = [
            {**turn, "seconds": None, "cpu_seconds": None, "peak_bytes": None} for turn in record["turns"]
        ]
        if record["evaluation"]:
            record["evaluation"] |= {
                "seconds": None,
                "forward_seconds": None,
                "peak_bytes": None,
                "process_bytes": None,
            }
        if record["early_exit"]:
            record["early_exit"] |= {"seconds": None, "peak_bytes": None}
    return rounds


def test_order_of_arrival_changes_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 1, "clients": 4}
    job = a_job(document, tmp_path)
    _, forwards = run(job, tmp_path / "forwards", Rough(LocalPool(job.base), reversed=False))
    _, backwards = run(job, tmp_path / "backwards", Rough(LocalPool(job.base), reversed=True))
    assert 0 < forwards["head.linear.bias"].abs().max() < 1
    assert_same(forwards, backwards)
    (record,) = CommitLog(tmp_path / "backwards").rounds()
    assert [turn.client for turn in record.turns] == ["phone-0", "phone-1", "phone-2", "phone-3"]


class Silent:
    """A pool in which some clients never answer."""

    def __init__(self, pool: ClientPool, silent: set[str]) -> None:
        self._pool, self._silent = pool, silent

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        for place, result in self._pool.run(clients, order, deadline):
            yield Outcome(place, Failure("missed the deadline") if clients[place].name in self._silent else result)

    def close(self) -> None:
        self._pool.close()


def test_a_profile_that_never_came_is_on_record(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"start": "auto"}
    job = a_job(document, tmp_path)
    opening = Coordinator(job, Silent(LocalPool(job.base), {"phone-2"}), CommitLog(tmp_path / "log")).open()
    assert [(lost.client, lost.reason) for lost in opening.lost] == [("phone-2", "missed the deadline")]
    assert len(opening.similarities) == 4
    everybody = {client.name for client in job.clients}
    with pytest.raises(QuorumLost, match=r"profiling the layers: .* \(phone-0: missed the deadline; "):
        Coordinator(job, Silent(LocalPool(job.base), everybody), CommitLog(tmp_path / "other")).open()


def test_a_profile_needs_rows(document: dict[str, Any], tmp_path: Path) -> None:
    document["fleet"]["clients"][0]["count"] = 40
    document["chain"] |= {"start": "auto"}
    with pytest.raises(InvalidJob, match=r"chain\.start is 'auto'; expected the index of a layer, since no client has"):
        a_job(document, tmp_path)


def test_a_family_that_cannot_be_streamed_is_refused(document: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("deberta-v2", vocab_size=30522, relative_attention=True, **sizes)
    folder = shutil.copytree(document["model"]["base"].removeprefix("path:"), tmp_path / "deberta")
    AutoModel.from_config(config).save_pretrained(folder)
    document["model"]["base"] = f"path:{folder}"
    with pytest.raises(InvalidJob, match=r"model\.base .* expected a model that can be streamed \("):
        a_job(document, tmp_path)


@pytest.mark.parametrize("shape", [False, True])
def test_nonsense_costs_a_turn_and_is_on_record(document: dict[str, Any], tmp_path: Path, shape: bool) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 2}
    job = a_job(document, tmp_path)
    pool = Spoilt(LocalPool(job.base), {"phone-1"}, shape)
    records = list(Coordinator(job, pool, CommitLog(tmp_path / "log")).rounds())
    for record in records:
        assert record.counted
        assert [turn.client for turn in record.turns] == ["phone-0", "phone-2", "phone-3"]
        assert [lost.client for lost in record.lost] == ["phone-1"]
        assert "head.linear.bias" in record.lost[0].reason


def test_without_a_quorum_the_job_ends_and_says_why(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"clients": 4, "quorum": 3}
    job = a_job(document, tmp_path)
    log = CommitLog(tmp_path / "log")
    with pytest.raises(QuorumLost, match=r"phone-1.*not finite"):
        list(Coordinator(job, Spoilt(LocalPool(job.base), {"phone-0", "phone-1"}), log).rounds())
    assert [record.counted for record in log.rounds()] == [False, False, False]


def test_a_chain_learns(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 8, "clients": 4}
    job = a_job(document, tmp_path)
    coordinator, _ = run(job, tmp_path / "log")
    ending = coordinator.finish()
    assert ending.accuracy > 0.9
    assert ending.peak_bytes["phone"] < job.clients[0].plan.planned_bytes


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
    opening, rounds = coordinator.open(), CommitLog(tmp_path / "log").rounds()
    assert rounds[-1].top == 3
    assert all(record.counted and not record.lost for record in rounds)
    untrained = AdapterStack.new(range(opening.start_layer, 4), 32, 8, 3, derive(3, "stack")).tensors()
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
