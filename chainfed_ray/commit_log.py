"""What was decided, made durable: a job killed at any time loses at most the round it was in.

A commit is a tensor file and then its record, each written aside, flushed and renamed into place. The record comes
last and carries the tensor file's digest, so a record that can be read is a commit that is whole. ::

    opening.json
    rounds/000000.safetensors, rounds/000000.json, …     (tensors of the newest round only)
    ending.json
"""

import json
import os
from hashlib import blake2b
from pathlib import Path

from safetensors.torch import load, save

from chainfed_ray.adapter import Tensors
from chainfed_ray.errors import CorruptCommit
from chainfed_ray.records import Ending, Opening, Round


class CommitLog:
    """The commits of one job in ``folder``. One writer at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rounds = folder / "rounds"
        self._rounds.mkdir(parents=True, exist_ok=True)

    def opening(self) -> Opening | None:
        """The opening, if it was committed."""
        path = self._folder / "opening.json"
        return Opening.model_validate_json(path.read_bytes()) if path.exists() else None

    def ending(self) -> Ending | None:
        """The ending, if it was committed."""
        path = self._folder / "ending.json"
        return Ending.model_validate_json(path.read_bytes()) if path.exists() else None

    def rounds(self) -> list[Round]:
        """Every committed round in order.

        Raises:
            CorruptCommit: a round is missing between two others.
        """
        records = [Round.model_validate(self._commit(path)["record"]) for path in sorted(self._rounds.glob("*.json"))]
        for index, record in enumerate(records):
            if record.index != index:
                raise CorruptCommit(str(self._rounds), f"round {index} is missing")
        return records

    def tensors(self, index: int) -> Tensors:
        """The tensors committed with round ``index``.

        Raises:
            CorruptCommit: they are missing, or not those that were written.
        """
        path = self._tensor_path(index)
        if not path.exists():
            raise CorruptCommit(str(path), "missing")
        data = path.read_bytes()
        if _digest(data) != self._commit(self._record_path(index))["digest"]:
            raise CorruptCommit(str(path), "its bytes are not those that were written")
        return load(data)

    def commit_opening(self, opening: Opening) -> None:
        """Make the opening durable."""
        _write(self._folder / "opening.json", opening.model_dump_json().encode())

    def commit_round(self, record: Round, tensors: Tensors) -> None:
        """Make a round durable, and let the tensors of the one before go."""
        data = save(tensors)
        _write(self._tensor_path(record.index), data)
        commit = {"digest": _digest(data), "record": record.model_dump(mode="json")}
        _write(self._record_path(record.index), json.dumps(commit).encode())
        for path in self._rounds.glob("*.safetensors"):
            if path.stem < f"{record.index:06d}":
                path.unlink()

    def commit_ending(self, ending: Ending) -> None:
        """Make the ending durable."""
        _write(self._folder / "ending.json", ending.model_dump_json().encode())

    def _commit(self, path: Path) -> dict[str, object]:
        commit: dict[str, object] = json.loads(path.read_bytes())
        return commit

    def _record_path(self, index: int) -> Path:
        return self._rounds / f"{index:06d}.json"

    def _tensor_path(self, index: int) -> Path:
        return self._rounds / f"{index:06d}.safetensors"


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write aside, flush to disk, rename: a reader sees the old file or the new one, never half of one."""
    aside = path.with_name(path.name + ".partial")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
