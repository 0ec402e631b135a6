"""Promise: the early exit that a job keeps is the one that it measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.federation.run import run_job
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.model.saved_stack import SavedStack, exit_folder, load_stack
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.result import ExitScore, JobResult
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job
from tests.causal import causal_folder
from tests.models import chain_outputs

pytestmark = pytest.mark.slow


def ran(document: dict[str, Any], folder: Path) -> tuple[JobResult, list[Round]]:
    document["evaluation"] = {"whole_every": "never"}
    document["rounds"] |= {"clients": 2}
    started, *rounds, finished = list(run_job(parse_job(document), folder))
    assert isinstance(started, JobStarted)
    assert isinstance(finished, JobFinished)
    records = [record for record in rounds if isinstance(record, Round)]
    return JobResult.of("tiny", started, records, finished), records


@torch.no_grad()
def plain_loss(job: PlannedJob, saved: SavedStack) -> tuple[float, float]:
    """The mean loss and the accuracy of an exit on the job's validation rows, from all rows at once."""
    assert saved.run_layers is not None
    blocks, batch = (
        Blocks(job.base.folder, torch.float32),
        job.validation.batch(torch.arange(len(job.validation)).numpy()),
    )
    *below, last = chain_outputs(blocks, saved.stack, batch.ids, batch.mask)[: saved.run_layers]
    if saved.stack.head is not None:
        means = torch.stack([mean_over_tokens(hidden, batch.mask) for hidden in below], 1)
        return scored(saved.stack.head(last, batch.mask, means), batch.labels)
    assert batch.targets is not None
    reader = blocks.reader()
    finished = blocks.finish(last, batch.mask)
    logits = torch.cat([finished @ rows.T for _, rows in reader.slices(blocks.language_head)], dim=-1)
    reader.close()
    return scored(logits[:, :-1][batch.targets[:, 1:]], batch.ids[:, 1:][batch.targets[:, 1:]])


def scored(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    return float(cross_entropy(logits, labels)), float((logits.argmax(-1) == labels).double().mean())


def classifier(document: dict[str, Any], folder: Path) -> None:
    document["chain"] |= {"head": "fitted", "head_layers": 3}
    document["rounds"] |= {"total": 4}


def language_model(document: dict[str, Any], folder: Path) -> None:
    document["model"] = {"base": f"path:{causal_folder('llama', folder)}", "task": "causal-lm"}
    adapter = {"kind": "lora", "rank": 2}
    document["chain"] |= {"window": 1, "start": 0, "head": "model", "adapter": adapter, "look_ahead": "none"}
    document["rounds"] |= {"total": 2}


@pytest.mark.parametrize(("changed", "layers"), [(classifier, {3}), (language_model, {1})])
def test_an_exit_is_kept_with_what_was_measured(
    changed: Callable[[dict[str, Any], Path], None], layers: set[int], document: dict[str, Any], tmp_path: Path
) -> None:
    changed(document, tmp_path / "base")
    result, rounds = ran(document, tmp_path / "job")
    assert {score.layers for score in result.exits} == layers
    for score in result.exits:
        saved = load_stack(exit_folder(tmp_path / "job", score.layers))
        assert (saved.run_layers, saved.round) == (score.layers, score.round)
        assert max(saved.stack.layers) == score.layers - 1, "what is above takes no room"
        last = next(record for record in rounds if record.index == score.round)
        assert last.ended, "the stack that its stage ended with"
        loss, accuracy = plain_loss(a_job(document, tmp_path), saved)
        assert loss == pytest.approx(score.loss, abs=1e-5)
        assert accuracy == score.accuracy


def test_windows_that_take_turns_each_keep_their_newest_exit(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"schedule": "cyclic"}
    document["rounds"] |= {"total": 3}
    result, rounds = ran(document, tmp_path / "job")
    (score,) = result.exits
    saved = load_stack(exit_folder(tmp_path / "job", score.layers))
    assert score.round == max(record.index for record in rounds if record.top == score.layers - 1) == 1
    loss, _ = plain_loss(a_job(document, tmp_path), saved)
    assert loss == pytest.approx(score.loss, abs=1e-5)


def test_a_look_ahead_to_the_model_s_end_cuts_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    document["chain"] |= {"look_ahead": "exact"}
    document["rounds"] |= {"total": 2}
    result, _ = ran(document, tmp_path / "job")
    assert result.exits == ()
    assert not list((tmp_path / "job").glob("exit-*"))


def test_of_each_layer_the_newest_counts() -> None:
    def a_record(index: int, exit: int, accuracy: float | None) -> Round:
        return Round(
            index=index, stage=0, bottom=exit, top=exit, turns=(), failed_turns=(), counted=True, train_loss=None,
            held_out_loss=accuracy, accuracy=accuracy, movement=None, ended=None, seconds=0.0, exit=exit,
        )  # fmt: skip

    records = [a_record(0, 2, 0.1), a_record(1, 1, 0.2), a_record(2, 2, 0.3), a_record(3, 1, None), a_record(4, 3, 0.9)]
    found = [(score.layers, score.round, score.accuracy) for score in ExitScore.of(records, layers=4)]
    assert found == [(2, 1, 0.2), (3, 2, 0.3)]
