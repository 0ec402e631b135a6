"""Promises of `chain.start: best-exit`: the chain starts at the window whose fitted head has the least held-out loss."""

import json
import random
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.commit_log import CommitLog
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.errors import QuorumLost
from chainfed_ray.pool import LocalPool
from chainfed_ray.records import HeadFit, Opening
from chainfed_ray.start_search import best_exit
from tests.conftest import a_job
from tests.test_coordinator import Silent


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


def opened(document: dict[str, Any], folder: Path, silent: Collection[str] = ()) -> Opening:
    job = a_job(document, folder)
    return Coordinator(job, Silent(LocalPool(job.base), set(silent)), CommitLog(folder / "log")).open()


def untrained(document: dict[str, Any], folder: Path) -> HeadFit:
    """The head that the job's first stage begins with."""
    job = a_job(document, folder)
    record = next(Coordinator(job, LocalPool(job.base), CommitLog(folder / "log")).rounds())
    assert record.head_fit
    return record.head_fit


def test_each_exit_is_where_a_chain_from_there_would_begin(document: dict[str, Any], tmp_path: Path) -> None:
    opening = opened(document, tmp_path / "best-exit")
    begins = []
    for start in range(3):
        document["chain"] |= {"start": start, "head_layers": 1}
        begins.append(untrained(document, tmp_path / str(start)))
    assert [fit.held_out_loss for fit in opening.exits] == pytest.approx([fit.held_out_loss for fit in begins])
    assert [(fit.accuracy, fit.examples) for fit in opening.exits] == [(fit.accuracy, fit.examples) for fit in begins]
    assert [fit.sent_bytes for fit in opening.exits] == [fit.sent_bytes for fit in begins]
    losses = [fit.held_out_loss or 0.0 for fit in begins]
    assert len(set(losses)) == 3
    assert opening.start_layer == losses.index(min(losses))
    assert opening.stages == 3 - opening.start_layer
    assert opening.similarities == ()
    assert opening.profile_cpu_seconds == sum(fit.cpu_seconds for fit in opening.exits) > 0


def test_a_client_that_is_silent_is_on_record_and_the_others_are_enough(
    document: dict[str, Any], tmp_path: Path
) -> None:
    opening = opened(document, tmp_path, {"phone-2"})
    assert [(lost.client, lost.reason) for lost in opening.lost] == [("phone-2", "missed the deadline")] * 3
    assert [fit.clients for fit in opening.exits] == [3, 3, 3]


def test_without_anybody_s_sums_the_job_ends_and_says_why(document: dict[str, Any], tmp_path: Path) -> None:
    everybody = {f"phone-{index}" for index in range(4)}
    words = r"fitting heads to find the chain's start: .* \(phone-0: missed the deadline; "
    with pytest.raises(QuorumLost, match=words):
        opened(document, tmp_path, everybody)


def test_a_start_that_was_found_is_not_looked_for_again(document: dict[str, Any], tmp_path: Path) -> None:
    opening = opened(document, tmp_path)
    everybody = {f"phone-{index}" for index in range(4)}
    assert opened(document, tmp_path, everybody) == opening


def test_the_chain_is_trained_from_there(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    rounds, start = list(coordinator.rounds()), coordinator.open().start_layer
    assert (rounds[0].bottom, rounds[-1].top) == (start, 3)
    assert coordinator.stack().layers == tuple(range(start, 4))
    assert coordinator.finish().rounds == len(rounds)


@given(st.lists(st.none() | st.sampled_from([0.25, 0.5, 0.75]), min_size=1))
def test_the_best_exit_has_the_least_loss_and_is_the_highest_of_them(losses: list[float | None]) -> None:
    found = [loss for loss in losses if loss is not None]
    best = best_exit(losses)
    if best is None:
        assert not found
        return
    assert losses[best] == min(found)
    assert min(found) not in losses[best + 1 :]
