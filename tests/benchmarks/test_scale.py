"""``python -m benchmarks scale``: modelled clients make the same job each time, and every round is metered once."""

from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.scale_players import answer_to
from benchmarks.scale_pool import MeteredPool, ModelledPool
from chainfed_ray.aggregation.checks import check_update
from chainfed_ray.client.messages import Training, Update
from chainfed_ray.client.objective import trained_names
from chainfed_ray.client.survey import SiteRows
from chainfed_ray.data.tokens import NO_EXAMPLES
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.wire.codec import job_document, result_of, survey_of, survey_order, turn_order, write_tensors
from chainfed_ray.wire.envelope import HashedFile
from tests.builders import a_job, assert_same, story


def test_modelled_clients_are_the_same_each_time_and_metered_by_round(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"]["convergence"] = {"rule": "none"}
    job, stacks = a_job(document, tmp_path), []
    for run in ("first", "second"):
        pool = MeteredPool(ModelledPool(), store=partial(next, count(0, 1000)))
        coordinator = Coordinator(job, pool, CommitLog(tmp_path / run))
        records = list(coordinator.rounds())
        pool.end_round()
        assert len(pool.rounds) == len(records) == 4
        for seen, record in zip(pool.rounds, records, strict=True):
            assert seen.turns >= len(record.turns) + len(record.failed_turns) == 3
            assert seen.cpu_seconds > 0
            assert seen.peak_bytes > 0
            assert seen.stored_bytes == 1000, "it is asked as an order comes, and before the next one"
        stacks.append(coordinator.stack().tensors())
    assert_same(*stacks)
    assert story(tmp_path / "first") == story(tmp_path / "second")


def test_a_modelled_site_answers_as_an_honest_one(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    known, digest = job_document(job.spec.document(), job.planner.costs).described(), 64 * "0"
    told = survey_of(answer_to(survey_order("j", "tiny", known, digest, "at-a", "site:a"), None, tmp_path).content, 8)
    (counts,) = [client.counts for client in told.clients]
    client = replace(job.clients[0], examples=NO_EXAMPLES, remote=SiteRows("a", "site:a", 0, 1, counts))
    tensors, sent = job.new_stack(range(1, 4), seed=1).tensors(), tmp_path / "sent"
    write_tensors(tensors, file := tmp_path / "order")
    turn = Training(tensors, client.plan.window, client.plan.window.top, 1, 8, 0.01, 0.1, 0.1, "window", 1)
    order = turn_order("j", "tiny", known, digest, client, turn, HashedFile.of(file))
    answer = answer_to(order, file, sent)
    assert answer.tensors == HashedFile.of(sent)
    update = result_of(client.name, "training", answer.content, sent)
    assert isinstance(update, Update)
    names = trained_names(tensors, client.plan.window, 0.1, "window")
    check_update(client.name, update.tensors, {name: tensors[name] for name in names}, counts.examples)


def test_a_modelled_turn_stays_in_its_plan(document: dict[str, Any], tmp_path: Path) -> None:
    job = a_job(document, tmp_path)
    (first, *_) = Coordinator(job, ModelledPool(), CommitLog(tmp_path / "log")).rounds()
    for turn in first.turns:
        assert turn.peak_bytes is not None
        assert 0.7 * turn.planned_bytes <= turn.peak_bytes + 1 <= turn.planned_bytes + 1
        assert turn.seconds > 0
