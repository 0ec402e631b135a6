"""Promise: what was found out about a model's files is asked again as soon as a file has changed, and not before."""

import os
from pathlib import Path

import pytest

from chainfed_ray.streaming.unchanged import while_unchanged


def test_an_answer_holds_while_the_files_are_the_same(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    weights, asked = tmp_path / "one" / "model.safetensors", list[str]()

    def found(folder: str, question: str) -> int:
        def answer() -> int:
            asked.append(question)
            return len(asked)

        return while_unchanged(tmp_path / folder, question, answer)

    weights.write_bytes(b"1234")
    assert [found("one", "a"), found("one", "a"), found("one", "b"), found("other", "a")] == [1, 1, 2, 3]
    before = weights.stat()
    weights.write_bytes(b"4321")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [found("one", "a"), found("one", "a"), found("other", "a")] == [4, 4, 3]
    (tmp_path / "one" / "config.json").touch()
    assert found("one", "a") == 5
    before, other = weights.stat(), tmp_path / "of the same size and time"
    other.write_bytes(b"9876")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(weights)
    assert found("one", "a") == 6


def test_an_error_is_no_answer(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        while_unchanged(tmp_path, "a", lambda: 1 // 0)
    assert while_unchanged(tmp_path, "a", lambda: 1) == 1
