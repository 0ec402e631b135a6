"""Promises of `chain.look_ahead: exact`: one loss, that of the whole model, from whichever side the window comes."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.chain import Chain
from chainfed_ray.errors import InvalidJob
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job, assert_same, run, run_some

EXACT = {"look_ahead": "exact", "start": 0, "head": "fitted"}


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["up", "down"])
def test_each_round_trains_and_evaluates_the_whole_model(
    direction: str, document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"] |= EXACT | {"direction": direction, "slide": 2}
    document["evaluation"] = {"whole_every": "round"}
    run(a_job(document, tmp_path), tmp_path / "log")
    records = CommitLog(tmp_path / "log").rounds()
    bottoms = [record.bottom for record in records]
    assert bottoms == sorted(bottoms, reverse=direction == "down")
    assert set(bottoms) == {0, 2}
    for record in records:
        assert record.counted
        assert not record.failed_turns
        assert record.evaluation
        if not record.restored:  # a stage that goes back to an earlier stack evaluates that one
            assert record.held_out_loss == pytest.approx(record.evaluation.loss, rel=1e-5)
    assert [bool(record.head_fit) for record in records] == [True, False, False, False], "one head for the whole job"


@pytest.mark.slow
def test_a_window_of_all_layers_looks_ahead_exactly_anyway(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"window": 4, "start": 0, "head": "fitted"}
    _, plain = run(a_job(document, tmp_path / "plain"), tmp_path / "plain" / "log")
    document["chain"] |= {"look_ahead": "exact"}
    _, exact = run(a_job(document, tmp_path / "exact"), tmp_path / "exact" / "log")
    assert_same(plain, exact)


@pytest.mark.slow
def test_downwards_stopped_and_resumed_is_never_stopped(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= EXACT | {"direction": "down"}
    _, straight = run(a_job(document, tmp_path / "one"), tmp_path / "one" / "log")
    for rounds in (1, 2):
        run_some(a_job(document, tmp_path / "two"), tmp_path / "two" / "log", rounds)
    _, resumed = run(a_job(document, tmp_path / "two"), tmp_path / "two" / "log")
    assert_same(straight, resumed)


@pytest.mark.slow
def test_clients_with_narrower_windows_take_part(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= EXACT | {"window": 3}
    document["fleet"]["clients"] = [
        {"name": "laptop", "count": 2, "memory": "64MiB"},
        {"name": "phone", "count": 2, "memory": "7300KiB"},
    ]
    document["rounds"] |= {"clients": 4, "total": 2}
    run(a_job(document, tmp_path), tmp_path / "log")
    records = CommitLog(tmp_path / "log").rounds()
    turns = [turn for record in records for turn in record.turns]
    assert len({turn.bottom for turn in turns if turn.client_class == "phone"} - {0}) > 0
    assert all(not record.failed_turns for record in records)


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        ({"direction": "down"}, "chain.look_ahead is 'adapters'; expected 'exact' with chain.direction down"),
        ({"look_ahead": "exact", "global_weight": 0.3}, "chain.global_weight is 0.3; expected no value"),
        ({"look_ahead": "none", "global_weight": 0.3}, "chain.global_weight is 0.3; expected no value"),
        ({"slide": 0}, "chain.slide is 0"),
        ({"slide": 3}, "chain.slide is 3; expected at most 2, chain.window"),
        ({"look_ahead": "exact", "global_trains": "upper"}, "chain.global_trains is 'upper'; expected no value"),
    ],
)
def test_keys_that_contradict_each_other(chain: dict[str, Any], expected: str, document: dict[str, Any]) -> None:
    document["chain"] |= chain
    with pytest.raises(InvalidJob, match=expected.replace("'", ".")):
        parse_job(document)


def test_no_layer_is_skipped_where_the_window_is_narrowed(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= EXACT | {"window": 4, "slide": 4}
    job = a_job(document, tmp_path)
    narrow = replace(job, admission=replace(job.admission, width=1))
    assert [window.bottom for window in narrow.chain_from(0).windows] == [0, 1, 2, 3]


@pytest.mark.slow
def test_a_resumed_job_keeps_its_window(document: dict[str, Any], tmp_path: Path) -> None:
    """Also if another version of the planner finds room for a wider one."""
    document["chain"] |= EXACT
    job = a_job(document, tmp_path)
    run_some(replace(job, admission=replace(job.admission, width=1)), tmp_path / "log", 1)
    run(job, tmp_path / "log")
    records = CommitLog(tmp_path / "log").rounds()
    assert {record.top - record.bottom for record in records} == {0}
    assert [record.bottom for record in records] == [0, 1, 2, 3]


@pytest.mark.slow
def test_no_stage_ends_worse_than_the_one_before(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= EXACT | {"start": 1, "head": "zero"}
    document["rounds"] |= {"total": 6, "learning_rate": 0.5, "head_learning_rate": 0.5, "convergence": {"rule": "none"}}
    run(a_job(document, tmp_path), tmp_path / "log")
    kept = [record.kept_loss for record in CommitLog(tmp_path / "log").rounds() if record.ended]
    assert len(kept) == 2
    assert all(after <= before for before, after in pairwise(kept) if before is not None and after is not None)


def test_the_last_window_is_at_an_end_of_the_chain() -> None:
    for direction in ("up", "down"):
        windows = Chain(30, 3, 8, 5, direction, "exact").windows
        ordered = windows if direction == "up" else windows[::-1]
        assert (ordered[0].bottom, ordered[-1].top) == (3, 29)
        assert all(below.bottom < above.bottom <= below.bottom + 5 for below, above in pairwise(ordered))


@pytest.mark.parametrize(
    ("task", "chain", "expected"),
    [
        ("sequence-classification", {"kind": "lora"}, "chain.look_ahead is 'adapters'; expected 'exact' or 'none'"),
        ("causal-lm", {"kind": "lora", "bottleneck": 8}, "chain.adapter.bottleneck is 8; expected no value"),
        ("causal-lm", {"rank": 4}, "chain.adapter.rank is 4; expected no value"),
        ("causal-lm", {"kind": "lora", "targets": []}, "chain.adapter.targets is"),
        ("causal-lm", {"kind": "lora"}, "chain.look_ahead is 'adapters'; expected 'exact' or 'none'"),
    ],
)
def test_keys_of_an_adapter_that_do_not_fit(
    task: str, chain: dict[str, Any], expected: str, document: dict[str, Any]
) -> None:
    document["model"]["task"] = task
    del document["chain"]["head"]
    document["chain"] |= {"adapter": chain, "look_ahead": "adapters"}
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    assert expected in str(caught.value)
