"""Promise: killed between any two steps, a log holds whole commits only; what was changed since is noticed."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.first_cause import first_cause
from tests.builders import FINISHED, a_round, a_start
from tests.pools import Killed

ROUNDS = 3


def whole(log: CommitLog) -> None:
    """Write a short job, from wherever the log is."""
    job_started = log.job_started() or a_start()
    log.commit_surveys({"clinic": {"absent": "it did not come"}})
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
    assert deaths >= ROUNDS - 2


@pytest.mark.parametrize(
    "name", ["surveys.json", "started.json", "finished.json", "rounds/000001.json", "rounds/000002.safetensors"]
)
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
    with pytest.raises(CorruptCommit, match="it has version 1; this chainfed-ray reads version 2") as refused:
        everything(CommitLog(tmp_path))
    assert first_cause(refused.value, None, []).message == str(refused.value), "and nothing of how it was found"


def everything(log: CommitLog) -> object:
    log.tensors(ROUNDS - 1)
    return log.surveys(), log.job_started(), log.job_finished(), log.rounds()


def test_a_flipped_bit_in_the_tensors_is_noticed(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    path = tmp_path / "rounds" / f"{ROUNDS - 1:06d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptCommit, match="not what was written"):
        CommitLog(tmp_path).tensors(ROUNDS - 1)


def test_a_changed_digit_in_a_round_is_noticed_and_one_without_a_digest_is_read(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    path = tmp_path / "rounds" / "000001.json"
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: value for name, value in document.items() if name != "record_digest"}))
    assert len(CommitLog(tmp_path).rounds()) == ROUNDS, "of an earlier version"
    path.write_text(json.dumps(document, indent=1))
    assert len(CommitLog(tmp_path).rounds()) == ROUNDS
    document["record"]["seconds"] += 1
    path.write_text(json.dumps(document))
    with pytest.raises(CorruptCommit, match=r"000001\.json.*not what was written"):
        CommitLog(tmp_path).rounds()


@pytest.mark.parametrize("name", ["surveys.json", "started.json", "finished.json"])
def test_a_changed_letter_is_noticed_and_a_document_without_a_digest_is_read(name: str, tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    path, before = tmp_path / name, everything(CommitLog(tmp_path))
    document = json.loads(path.read_bytes())
    path.write_text(json.dumps({key: value for key, value in document.items() if key != "record_digest"}))
    assert everything(CommitLog(tmp_path)) == before, "of an earlier version"
    path.write_text(json.dumps(document, indent=1))
    assert everything(CommitLog(tmp_path)) == before
    text = json.dumps(document)
    of_the_content = text.replace("0", "1", 1).replace("it did not come", "it did not cone")
    for changed in (text.replace("record_digest", "record_digesu"), of_the_content):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(CorruptCommit, match=rf"{name}.*not what was written"):
            everything(CommitLog(tmp_path))
    assert (CommitLog(tmp_path).set_aside_damaged() is not None) is (name == "finished.json"), (
        "the job goes on from there"
    )


def test_a_round_that_is_missing_is_noticed(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    (tmp_path / "rounds" / "000001.json").unlink()
    with pytest.raises(CorruptCommit, match="round 1 is missing"):
        CommitLog(tmp_path).rounds()


def test_only_the_two_newest_tensors_are_kept(tmp_path: Path) -> None:
    whole(CommitLog(tmp_path))
    kept = sorted(path.name for path in (tmp_path / "rounds").glob("*.safetensors"))
    assert kept == ["000001.safetensors", "000002.safetensors"]


@pytest.mark.parametrize("name", ["rounds/000002.json", "rounds/000002.safetensors"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""])
def test_a_damaged_newest_round_is_set_aside_for_the_one_before(
    name: str, damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    log = CommitLog(tmp_path)
    whole(log)
    assert log.set_aside_damaged() is None, "nothing is damaged"
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    told = log.set_aside_damaged()
    assert told is not None
    assert name.rpartition("/")[2] in told
    assert len(log.rounds()) == ROUNDS - 1
    assert log.job_finished() is None, "it was made from that round"
    assert log.tensors(ROUNDS - 2)["x"].unique().tolist() == [float(ROUNDS - 2)]
    assert (tmp_path / f"{name}.damaged").exists(), "it is kept for those who want to look"
    assert log.set_aside_damaged() is None
    whole(log)
    assert log.job_finished() == FINISHED


def test_nothing_is_set_aside_where_nothing_is_left_to_go_on_from(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    whole(log)
    for name in ("000001.json", "000002.json"):
        (tmp_path / "rounds" / name).write_bytes(b"")
    assert log.set_aside_damaged() is None
    with pytest.raises(CorruptCommit, match="000001"):
        log.rounds()


def test_a_round_of_another_version_is_not_damaged(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    whole(log)
    path = tmp_path / "rounds" / "000002.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"version": 1}))
    assert log.set_aside_damaged() is None
    with pytest.raises(CorruptCommit, match="it has version 1"):
        log.rounds()


def test_a_damaged_end_of_a_job_is_set_aside(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    whole(log)
    (tmp_path / "finished.json").write_bytes(b"{")
    assert "finished.json" in (log.set_aside_damaged() or "")
    assert log.job_finished() is None
    assert len(log.rounds()) == ROUNDS
