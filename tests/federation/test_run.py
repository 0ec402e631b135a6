"""Promises of the way in from Python: the same job as everybody's, with rules of one's own that are used and checked."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_ray.aggregation.mean import RunningMean
from chainfed_ray.aggregation.robust import median
from chainfed_ray.aggregation.rule import WeightedUpdate
from chainfed_ray.client.messages import Client, Profile, TurnOrder, Update
from chainfed_ray.client.objective import chain_loss
from chainfed_ray.client.pool import Failure, LocalPool
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation.run import run_job
from chainfed_ray.federation.start import Start
from chainfed_ray.federation.state import stack_of
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.planning.prepare import prepare_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.parse import parse_job
from examples.equal_mean import equal_mean
from examples.misbehaving_client import Reversing
from examples.two_classes_each import two_classes_each
from tests.builders import PRIVACY, a_job, assert_same, run
from tests.pools import Altered, Answer, silent
from tests.project import ROOT

pytestmark = pytest.mark.slow


def ran(document: dict[str, Any], folder: Path, **rules: Any) -> tuple[JobStarted, list[Round], JobFinished, Tensors]:
    """A job from its first record to its last, and the stack that it came to."""
    started, *rounds, finished = list(run_job(parse_job(document), folder, **rules))
    assert isinstance(started, JobStarted)
    assert isinstance(finished, JobFinished)
    counted = [record for record in rounds if isinstance(record, Round)]
    assert len(counted) == len(rounds) == finished.rounds
    return started, counted, finished, stack_of(CommitLog(folder).tensors(finished.rounds - 1)).tensors()


def test_it_is_the_job_of_the_coordinator(document: dict[str, Any], tmp_path: Path) -> None:
    """The same records as in the commits, the same bits, and a model that can be loaded."""
    started, rounds, finished, stack = ran(document, tmp_path / "ours")
    log = CommitLog(tmp_path / "ours")
    assert (started, rounds, finished) == (log.job_started(), log.rounds(), log.job_finished())
    _, expected = run(a_job(document, tmp_path / "theirs"), tmp_path / "theirs")
    assert_same(stack, expected)
    assert_same(load_stack(tmp_path / "ours" / "model").stack.tensors(), expected)
    assert started.own_rules == {}


def test_who_stops_iterating_stops_the_job_and_may_go_on(document: dict[str, Any], tmp_path: Path) -> None:
    records = run_job(parse_job(document), tmp_path / "stopped")
    first = [next(records) for _ in range(3)]
    records.close()
    assert len(CommitLog(tmp_path / "stopped").rounds()) == 2
    started, rounds, _, stack = ran(document, tmp_path / "stopped")
    assert [started, *rounds[:2]] == first, "told once more"
    assert_same(stack, ran(document, tmp_path / "whole")[3])


def weighted_mean(updates: Sequence[WeightedUpdate]) -> Tensors:
    """What the job's own rule does, as a function. The sum of changes and the sum of values differ by what is rounded."""
    mean = RunningMean(
        {name: torch.zeros_like(tensor) for name, tensor in updates[0][0].items()},
        sum(examples for _, examples in updates),
    )
    for place, (tensors, examples) in enumerate(updates):
        mean.add(place, tensors, examples)
    return mean.result()


def test_an_aggregation_rule_is_used_and_recorded(document: dict[str, Any], tmp_path: Path) -> None:
    document["fleet"]["partition"] = {"scheme": "quantity", "alpha": 0.5}
    document["rounds"]["total"] = 1
    plain = ran(document, tmp_path / "plain")[3]
    started, _, _, stack = ran(document, tmp_path / "same", aggregation=weighted_mean)
    torch.testing.assert_close(stack, plain, rtol=0, atol=1e-6)
    assert started.own_rules == {"aggregation": f"{__name__}.weighted_mean"}
    other = ran(document, tmp_path / "other", aggregation=equal_mean)[3]
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in other.items())


def test_every_client_counts_the_same() -> None:
    updates = [({"x": torch.tensor([1.0]), "y": torch.tensor([5.0])}, 10), ({"x": torch.tensor([3.0])}, 1000)]
    assert_same(equal_mean(updates), {"x": torch.tensor([2.0]), "y": torch.tensor([5.0])})


def test_a_partition_is_used_and_recorded(document: dict[str, Any], tmp_path: Path) -> None:
    job = prepare_job(parse_job(document), tmp_path / "scratch", partition=two_classes_each)
    for share in job.manifest.clients:
        assert len(share.rows_per_class) <= 3, "two pieces, each of at most two classes that lie side by side"
    usual = a_job(document, tmp_path / "usual")
    assert sum(len(share.rows_per_class) for share in job.manifest.clients) < sum(
        len(share.rows_per_class) for share in usual.manifest.clients
    )
    assert job.manifest.scheme == "examples.two_classes_each.two_classes_each"
    started, *_ = ran(document, tmp_path / "ran", partition=two_classes_each)
    assert started.partition_hash == job.manifest.hash
    assert started.own_rules == {"partition": job.manifest.scheme}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[0, 1], [2], [3]], r"gives rows to each of 4 clients; it gave \[2, 1, 1\]"),
        ([[0, 1], [2], [3], []], r"gives rows to each of 4 clients; it gave \[2, 1, 1, 0\]"),
        ([[0, 1], [2], [3], [4]], "gives each of the 96 training rows to exactly one client"),
    ],
    ids=["few", "empty", "missing"],
)
def test_a_partition_that_is_none_is_refused(
    rows: list[list[int]], expected: str, document: dict[str, Any], tmp_path: Path
) -> None:
    def wrong(labels: np.ndarray, groups: Sequence[str], clients: int, seed: int) -> list[list[int]]:
        return rows

    with pytest.raises(InvalidJob, match=rf"partition is '.*wrong'; expected a rule that {expected}"):
        next(run_job(parse_job(document), tmp_path, partition=wrong))


def test_a_misbehaving_client_moves_the_mean_and_not_the_median(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"] |= {"total": 2, "clients": 4}

    def distance(name: str, **rules: Any) -> float:
        honest = ran(document, tmp_path / name, **rules)[3]
        fooled = ran(
            document,
            tmp_path / f"{name}-fooled",
            pool=lambda source, _: Reversing(LocalPool(source), "phone-0"),
            **rules,
        )[3]
        return sum(float((tensor - fooled[name]).square().sum()) for name, tensor in honest.items()) ** 0.5

    assert distance("mean") > 4 * distance("median", aggregation=median)


def test_a_start_rule_is_used_and_what_it_gives_is_checked(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["start"] = "auto"
    started, *_ = ran(document, tmp_path / "one", start=lambda job, pool, listen: Start(1))
    assert (started.start_layer, started.stages, started.cka) == (1, 2, ())
    with pytest.raises(
        InvalidJob, match="expected a rule that gives a layer from 0 to 2, where a window fits; it gave 3"
    ):
        next(run_job(parse_job(document), tmp_path / "three", start=lambda job, pool, listen: Start(3)))


def test_an_objective_is_used(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"]["global_weight"] = 0.3
    plain = ran(document, tmp_path / "plain")[3]
    same = partial(chain_loss, global_weight=0.3, head_follows_global=True)
    assert_same(ran(document, tmp_path / "same", objective=same)[3], plain)
    other = ran(document, tmp_path / "other", objective=partial(same, global_weight=0.9))[3]
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in other.items())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"x": torch.zeros(1)}, "a rule that gives tensors of the window only; it gave x"),
        (
            {"head.linear.bias": torch.zeros(7)},
            r"head.linear.bias as finite torch.float32 \[3\]; it gave torch.float32 \[7\]",
        ),
        ({"head.linear.bias": torch.full((3,), torch.nan)}, r"head.linear.bias as finite"),
    ],
    ids=["unknown", "shape", "nan"],
)
def test_an_aggregate_that_is_none_is_refused(
    given: Tensors, expected: str, document: dict[str, Any], tmp_path: Path
) -> None:
    def wrong(updates: Sequence[WeightedUpdate]) -> Tensors:
        return given

    with pytest.raises(InvalidJob, match=rf"aggregation is '.*wrong'; expected .*{expected}"):
        list(run_job(parse_job(document), tmp_path, aggregation=wrong))
    assert CommitLog(tmp_path).rounds() == []


def test_privacy_has_no_price_for_a_rule_of_ones_own(document: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="expected no rule of one's own in a job with privacy"):
        next(run_job(parse_job(document | {"privacy": PRIVACY}), tmp_path, aggregation=equal_mean))


def test_a_job_goes_on_with_the_rules_with_which_it_started(document: dict[str, Any], tmp_path: Path) -> None:
    records = run_job(parse_job(document), tmp_path, aggregation=equal_mean)
    next(records), next(records)
    records.close()
    with pytest.raises(InvalidJob, match=r"aggregation is 'none'; expected examples.equal_mean.equal_mean, with which"):
        next(run_job(parse_job(document), tmp_path))
    ran(document, tmp_path, aggregation=equal_mean)


def test_the_ten_lines_of_the_document_run(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model and rows that take seconds."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)[0]
    code = code.replace("builtin:minilm", document["model"]["base"]).replace(
        "builtin:docstrings", document["data"]["train"]
    )
    code = code.replace("\n    }\n)", '\n"rounds": {"total": 2}, "chain": {"window": 2, "start": 2}})')
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "python.md", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 4
    assert load_stack(tmp_path / "chainfed-python" / "libraries" / "model").stack.layers == (2, 3)


def test_a_job_in_which_no_round_counted_has_failed_and_saves_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    """Two rounds are fewer than the three without a quorum that end a longer job."""
    document["rounds"]["total"] = 2
    everybody = {f"phone-{index}" for index in range(4)}
    records = run_job(parse_job(document), tmp_path, pool=lambda source, _: silent(LocalPool(source), everybody))
    _, *rounds = [next(records) for _ in range(3)]
    assert [isinstance(record, Round) and record.counted for record in rounds] == [False, False]
    with pytest.raises(QuorumLost, match=r"all 2 rounds: fewer than 2 clients answered \(phone-\d: "):
        next(records)
    assert [name for name in ("model", "last", "best") if (tmp_path / name).exists()] == []
    assert CommitLog(tmp_path).job_finished() is None


@pytest.mark.parametrize(
    "claim",
    [{"seconds": float("nan")}, {"cpu_seconds": -1.0}, {"steps": True}, {"loss": float("inf")}, {"seconds": "1"}],
    ids=str,
)
def test_what_a_client_says_of_its_turn_is_checked(
    claim: dict[str, Any], document: dict[str, Any], tmp_path: Path
) -> None:
    """It goes on record: a number that is none would make the record one that cannot be read again."""
    document["rounds"] |= {"total": 1, "clients": 4}

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        lies = client.name == "phone-1" and isinstance(answer, Update)
        return replace(answer, **claim) if lies else answer

    _, (only,), _, _ = ran(document, tmp_path, pool=lambda source, _: Altered(LocalPool(source), alter))
    ((what, value),) = claim.items()
    assert [(turn.client, turn.reason) for turn in only.failed_turns] == [
        ("phone-1", f"its update was refused: its {what} is {value!r}")
    ]
    assert CommitLog(tmp_path).rounds() == [only]


@pytest.mark.parametrize("cka", [(1.0, 0.5), (1.0, 0.5, float("nan"), 0.1)], ids=["short", "nan"])
def test_a_profile_that_is_none_moves_no_start(
    cka: tuple[float, ...], document: dict[str, Any], tmp_path: Path
) -> None:
    """And a client's own count of its examples is no weight."""
    document["chain"] |= {"start": "auto", "profile_examples": 16}
    document["rounds"]["total"] = 1

    def alter(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        if not isinstance(answer, Profile):
            return answer
        return replace(answer, cka=cka) if client.name == "phone-0" else replace(answer, examples=10**9)

    started, *_ = ran(document, tmp_path / "lied", pool=lambda source, _: Altered(LocalPool(source), alter))
    assert [turn.client for turn in started.failed_turns] == ["phone-0"]
    assert "its profile was refused: its CKA is" in started.failed_turns[0].reason

    def fails(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        return Failure("died") if client.name == "phone-0" and isinstance(answer, Profile) else answer

    honest, *_ = ran(document, tmp_path / "honest", pool=lambda source, _: Altered(LocalPool(source), fails))
    assert (started.cka, started.start_layer) == (honest.cka, honest.start_layer)
