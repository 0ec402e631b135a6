"""Promises of `chain.start: best-exit`: the chain starts at the window whose fitted head has the least held-out loss."""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation import head_fitting as head_fit
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.model.prefix import PrefixRunner
from chainfed_ray.planning import duration
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import HeadFit, JobStarted
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job
from tests.pools import silent

pytestmark = pytest.mark.slow


@pytest.fixture
def document(document: dict[str, Any], tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Of a chain of three windows, whose start is found by their exits; no head is perfect, since some labels are wrong."""
    rows = [json.loads(line) for line in tiny_data.read_text().splitlines()]
    draw = random.Random(0)
    for row in draw.sample(rows, 40):
        row["label"] = draw.choice(rows)["label"]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    document["chain"] |= {"start": "best-exit", "head": "fitted"}
    document["data"]["train"] = f"path:{tmp_path / 'rows.jsonl'}"
    return document


def opened(document: dict[str, Any], folder: Path, nobody: Collection[str] = ()) -> JobStarted:
    job = a_job(document, folder)
    return Coordinator(job, silent(LocalPool(job.base), nobody), CommitLog(folder / "log")).open()


def untrained(document: dict[str, Any], folder: Path) -> HeadFit:
    """The head that the job's first stage begins with."""
    job = a_job(document, folder)
    record = next(Coordinator(job, LocalPool(job.base), CommitLog(folder / "log")).rounds())
    assert record.head_fit
    return record.head_fit


def test_each_exit_is_where_a_chain_from_there_would_begin(document: dict[str, Any], tmp_path: Path) -> None:
    job_started = opened(document, tmp_path / "best-exit")
    begins = []
    for start in range(3):
        document["chain"] |= {"start": start, "head_layers": 1}
        begins.append(untrained(document, tmp_path / str(start)))
    assert [fit.held_out_loss for fit in job_started.exits] == pytest.approx([fit.held_out_loss for fit in begins])
    assert [(fit.accuracy, fit.examples) for fit in job_started.exits] == [
        (fit.accuracy, fit.examples) for fit in begins
    ]
    assert [fit.sent_bytes for fit in job_started.exits] == [fit.sent_bytes for fit in begins]
    losses = [fit.held_out_loss or 0.0 for fit in begins]
    assert len(set(losses)) == 3
    assert job_started.start_layer == losses.index(min(losses))
    assert job_started.stages == 3 - job_started.start_layer
    assert job_started.cka == ()
    assert job_started.profile_cpu_seconds == sum(fit.cpu_seconds for fit in job_started.exits) > 0


def test_a_client_that_is_silent_is_on_record_and_the_others_are_enough(
    document: dict[str, Any], tmp_path: Path
) -> None:
    job_started = opened(document, tmp_path, {"phone-2"})
    assert [(lost.client, lost.reason) for lost in job_started.failed_turns] == [("phone-2", "missed the deadline")]
    assert [fit.clients for fit in job_started.exits] == [3, 3, 3]


def test_an_exit_without_some_of_the_clients_is_passed_over(document: dict[str, Any], tmp_path: Path) -> None:
    best = opened(document, tmp_path / "all").start_layer
    job = a_job(document, tmp_path / "one")
    pool = silent(LocalPool(job.base), {"phone-1"}, exit_of=best + 1)
    job_started = Coordinator(job, pool, CommitLog(tmp_path / "one" / "log")).open()
    assert [fit.clients for fit in job_started.exits] == [3 if start == best else 4 for start in range(3)]
    assert job_started.start_layer != best


@pytest.mark.parametrize(("disk", "layers"), [(None, 4), ("1KiB", 2 + 3 + 4)])
def test_each_layer_is_run_once_where_there_is_disk(
    disk: str | None, layers: int, document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if disk:
        document["fleet"]["clients"][0]["disk"] = disk
    job = a_job(document, tmp_path)
    counted, run = list[int](), PrefixRunner.run

    def counting(self: PrefixRunner, index: int, *arguments: Any) -> LayerStates:
        _, _, examples, indices, _ = arguments
        if examples is not job.validation:  # those are the server's
            counted.append(len(indices))
        return run(self, index, *arguments)

    monkeypatch.setattr(PrefixRunner, "run", counting)
    Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).open()
    rows = sum(len(client.examples) for client in job.clients)
    assert sum(counted) == layers * rows
    assert duration.layers_of_exits(job, cached=disk is None) == layers


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chain": {"head": "zero"}}, "'auto' or the index of a layer with chain.head zero"),
        (
            {"aggregation": {"rule": "median"}},
            "the index of a layer with aggregation.rule median: 'best-exit' follows from",
        ),
        ({"privacy": {"clip": 1.0, "noise_multiplier": 1.0}}, "the index of a layer: privacy does not cover what"),
        (
            {"model": {"task": "causal-lm"}, "chain": {"head": "model"}},
            "'auto' or the index of a layer with chain.head model",
        ),
    ],
    ids=str,
)
def test_a_start_that_cannot_follow_from_heads_is_refused_once(
    changes: dict[str, Any], words: str, document: dict[str, Any]
) -> None:
    for section, keys in changes.items():
        document[section] = {**document.get(section, {}), **keys}
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    (problem,) = [problem for problem in caught.value.problems if problem.field == "chain.start"]
    assert problem.expected.startswith(words)


def test_without_anybody_s_sums_the_job_ends_and_says_why(document: dict[str, Any], tmp_path: Path) -> None:
    everybody = {f"phone-{index}" for index in range(4)}
    words = r"fitting heads to find the chain's start: .* \(phone-0: missed the deadline; "
    with pytest.raises(QuorumLost, match=words):
        opened(document, tmp_path, everybody)


def test_where_the_chain_is_one_window_nobody_is_asked(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["window"] = 4
    document["fleet"]["clients"][0]["memory"] = "1GiB"
    job_started = opened(document, tmp_path, {f"phone-{index}" for index in range(4)})
    assert (job_started.start_layer, job_started.stages, job_started.exits) == (0, 1, ())
    assert duration.layers_of_exits(a_job(document, tmp_path), cached=True) == 0


def test_where_no_head_can_be_fitted_the_chain_is_its_last_window(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_fit, "fitted", lambda *_: None)  # as of sums that have no inverse
    job_started = opened(document, tmp_path)
    assert [(fit.clients, fit.held_out_loss) for fit in job_started.exits] == [(4, None)] * 3
    assert (job_started.start_layer, job_started.stages) == (2, 1)


def test_a_start_that_was_found_is_not_looked_for_again(document: dict[str, Any], tmp_path: Path) -> None:
    job_started = opened(document, tmp_path)
    everybody = {f"phone-{index}" for index in range(4)}
    assert opened(document, tmp_path, everybody) == job_started


def test_the_chain_is_trained_from_there(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    rounds, start = list(coordinator.rounds()), coordinator.open().start_layer
    assert (rounds[0].bottom, rounds[-1].top) == (start, 3)
    assert coordinator.stack().layers == tuple(range(start, 4))
    assert coordinator.finish().rounds == len(rounds)
