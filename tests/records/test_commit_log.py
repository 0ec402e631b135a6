"""Promise: killed between any two steps, a log holds whole commits only; what was changed since is noticed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import FINISHED, a_round, a_start
from tests.pools import Killed

ROUNDS = 3


def whole(log: CommitLog) -> None:
    """Write a short job, from wherever the log is."""
    job_started = log.job_started() or a_start()
    log.commit_started(job_started)
    for index in range(len(log.rounds()), ROUNDS):
        log.commit_round(a_round(index, job_started), {"x": torch.full((2, 3), float(index))})
    log.commit_finished(FINISHED)


@pytest.mark.parametrize("step", ["fsync", "replace", "unlink"])
def test_killed_between_any_two_steps(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner: Any = os if step == "fsync" else Path
    original, deaths = getattr(owner, step), 0
    for fatal in range(100):
        folder, calls = tmp_path / str(fatal), 0

        def dies(*arguments: Any, at: int = fatal, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Killed
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, dies)
            try:
                whole(CommitLog(folder))
                break
            except Killed:
                deaths += 1
        log = CommitLog(folder)
        done = log.rounds()
        if done:
            newest = log.tensors(len(done) - 1)
            assert newest["x"].unique().tolist() == [float(len(done) - 1)]
        whole(log)
        assert log.job_finished() == FINISHED
        assert [record.index for record in log.rounds()] == list(range(ROUNDS))
    assert deaths >= ROUNDS - 1


@pytest.mark.parametrize("name", ["started.json", "finished.json", "rounds/000001.json", "rounds/000002.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_what_was_damaged_is_noticed(name: str, damage: str, tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    with pytest.raises(CorruptCommit, match=name.rpartition("/")[2]):
        everything(CommitLog(tmp_path))


@pytest.mark.parametrize("name", ["started.json", "finished.json", "rounds/000001.json"])
def test_a_document_of_another_version_is_refused(name: str, tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    document = json.loads((tmp_path / name).read_bytes())
    assert document["version"] == 2
    (tmp_path / name).write_text(json.dumps(document | {"version": 1}))
    with pytest.raises(CorruptCommit, match="it has version 1; this chainfed-ray reads version 2"):
        everything(CommitLog(tmp_path))


def everything(log: CommitLog) -> object:
    return log.job_started(), log.job_finished(), log.rounds(), log.tensors(ROUNDS - 1)


def test_a_flipped_bit_in_the_tensors_is_noticed(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    path = tmp_path / "rounds" / f"{ROUNDS - 1:06d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCommit, match="not what was written"):
        CommitLog(tmp_path).tensors(ROUNDS - 1)


def test_a_round_that_is_missing_is_noticed(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    (tmp_path / "rounds" / "000001.json").unlink()
    with pytest.raises(CorruptCommit, match="round 1 is missing"):
        CommitLog(tmp_path).rounds()


def test_only_the_newest_tensors_are_kept(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    assert [path.name for path in (tmp_path / "rounds").glob("*.safetensors")] == ["000002.safetensors"]
