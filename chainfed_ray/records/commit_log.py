"""The commit log: it makes a job's records durable, so that a job killed at any time loses at most the round it was in.

A commit is a tensor file and then its record. Each is written to a temporary file, flushed and renamed into place. The record
comes last and has the digest of the tensor file, so a readable record proves that its commit is complete. Each record has its
own digest as well. The files::

    partition.json                                       the manifest; written before started.json, which has its hash
    clients.jsonl                                        the clients of the fleet, one on a line; written before started.json
    surveys.json                                         what sites told of their rows; written before started.json
    started.json                                         the JobStarted record
    privacy.key                                          the secret of a job with noise; erased when the job ends
    rounds/000000.safetensors, rounds/000000.json, …     tensors are kept of the two newest rounds and of the best
    finished.json                                        the JobFinished record

A disk may lose bytes all the same. If the newest round is damaged, it is set aside, as ``….damaged``, and the job goes on from
the round before.
"""

import json
import os
import secrets
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from safetensors.torch import load, save
from torch import Tensor

from chainfed_ray.errors import CorruptCommit
from chainfed_ray.record import VERSION, Document
from chainfed_ray.records.fleet import CLIENTS_FILE, FleetClient, clients_in
from chainfed_ray.records.manifest import Manifest
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.records.secret import SECRET_BYTES, erase_secret, secret_path

_SEAL = "record_digest"  # no class of clients is called so
_Kind = TypeVar("_Kind", bound=Document)


class CommitLog:
    """The commits of one job in ``folder``. Only one process may write at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rounds = folder / "rounds"
        self._rounds.mkdir(parents=True, exist_ok=True)

    def job_started(self) -> JobStarted | None:
        """The ``JobStarted`` record, or None if none was committed.

        Raises:
            CorruptCommit: the file is not what was written.
        """
        return _read(self._folder / "started.json", JobStarted)

    def job_finished(self) -> JobFinished | None:
        """The ``JobFinished`` record, or None if none was committed.

        Raises:
            CorruptCommit: the file is not what was written.
        """
        return _read(self._folder / "finished.json", JobFinished)

    def rounds(self) -> list[Round]:
        """All committed rounds in order.

        Raises:
            CorruptCommit: a round before the last one is missing, or a file is not what was written.
        """
        found = (_read(path, _Commit) for path in sorted(self._rounds.glob("*.json")))
        records = [commit.record for commit in found if commit]
        for index, record in enumerate(records):
            if record.index != index:
                raise CorruptCommit(str(self._rounds), f"round {index} is missing")
        return records

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors committed with round ``index``.

        Raises:
            CorruptCommit: the file is missing, or is not what was written.
        """
        path = self._tensor_path(index)
        if not path.exists():
            raise CorruptCommit(str(path), "missing")
        data, commit = path.read_bytes(), _read(self._record_path(index), _Commit)
        if commit is None or _digest(data) != commit.digest:
            raise CorruptCommit(str(path), "its bytes are not what was written")
        return load(data)

    def commit_partition(self, manifest: Manifest) -> None:
        """Make the manifest durable, as the bytes from which its hash is computed."""
        _write(self._folder / "partition.json", [manifest.canonical()])

    def commit_clients(self, clients: Iterable[FleetClient]) -> None:
        """Make the list of the fleet's clients durable: those that take part, and then the others."""
        _write(self._folder / CLIENTS_FILE, (client.model_dump_json().encode() + b"\n" for client in clients))

    def clients(self) -> list[FleetClient]:
        """The list of the fleet's clients; empty if none was committed.

        Raises:
            CorruptCommit: the file is not what was written.
        """
        return clients_in(self._folder)

    def commit_started(self, job_started: JobStarted) -> None:
        """Make the ``JobStarted`` record durable."""
        _write(self._folder / "started.json", [_sealed(job_started.model_dump(mode="json"))])

    def commit_surveys(self, surveys: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the answers of sites durable, as documents by the names of the classes of clients."""
        _write(self._folder / "surveys.json", [_sealed(surveys)])

    def surveys(self) -> dict[str, dict[str, Any]] | None:
        """The answers of sites, or None if none were committed.

        Raises:
            CorruptCommit: the file is not what was written.
        """
        path = self._folder / "surveys.json"
        try:
            surveys, seal = _parted(path, path.read_bytes())
        except FileNotFoundError:
            return None
        _check_seal(path, surveys, seal)
        if not all(isinstance(told, dict) for told in surveys.values()):
            raise CorruptCommit(str(path), "it is not what was written")
        return surveys

    def set_aside_damaged(self) -> str | None:
        """Set the newest round aside if it is not what was written, and the round before is. Returns what is wrong with it.

        The end of a job is set aside with its newest round, and also if it is damaged itself. Nothing is done if no round
        would be left to go on from, or if the records have another version: reading them says what is wrong.
        """
        newest = max((int(path.stem) for path in self._rounds.glob("*.json")), default=None)
        wrong, finished = None, self._folder / "finished.json"
        if newest is not None and (wrong := self._damage(newest)):
            if newest and self._damage(newest - 1):
                return None
            found = [finished, self._record_path(newest), self._tensor_path(newest)]
        else:
            try:
                self.job_finished()
                return None
            except CorruptCommit as error:
                if _has_other_version(finished):
                    return None
                wrong, found = str(error), [finished]
        for path in found:  # the record goes before its tensors: without it, nobody looks for them
            if path.exists():
                path.replace(path.with_name(path.name + ".damaged"))
        return wrong

    def _damage(self, index: int) -> str | None:
        """What is wrong with a round; None if nothing is, or if it has another version."""
        if _has_other_version(self._record_path(index)):
            return None
        try:
            _read(self._record_path(index), _Commit)
            self.tensors(index)
        except CorruptCommit as error:
            return str(error)
        return None

    def commit_round(self, record: Round, tensors: dict[str, Tensor], keep: int | None = None) -> None:
        """Make a round and its ``tensors`` durable. Of earlier rounds, the tensors of the one before and of ``keep`` stay."""
        data = save(tensors)
        _write(self._tensor_path(record.index), [data])
        sealed = _digest_of_record(json.loads(record.model_dump_json()))
        commit = _Commit(digest=_digest(data), record=record, record_digest=sealed)
        _write(self._record_path(record.index), [commit.model_dump_json().encode()])
        kept = {self._tensor_path(index) for index in (record.index, record.index - 1, keep) if index is not None}
        for path in self._rounds.glob("*.safetensors"):
            if path not in kept and path < self._tensor_path(record.index):
                path.unlink()

    def commit_finished(self, job_finished: JobFinished) -> None:
        """Make the ``JobFinished`` record durable."""
        _write(self._folder / "finished.json", [_sealed(job_finished.model_dump(mode="json"))])

    def secret(self) -> bytes:
        """The 256 bits from which the job's noise is derived, drawn at the first call. Only the owner may read their file.

        Raises:
            CorruptCommit: the file is not what was written, or it is missing though rounds were committed. With a new secret, a
                round that is run again would get other noise, and two draws of noise on one update weaken its privacy.
        """
        path = secret_path(self._folder)
        if not path.exists():
            if any(self._rounds.glob("*.json")):
                raise CorruptCommit(str(path), "missing, though rounds were committed")
            _write(path, [secrets.token_bytes(SECRET_BYTES)], mode=0o600)
        secret = path.read_bytes()
        if len(secret) != SECRET_BYTES:
            raise CorruptCommit(str(path), "its bytes are not what was written")
        return secret

    def erase_secret(self) -> None:
        """Delete the secret. Call this when no more noise is needed."""
        erase_secret(self._folder)

    def _record_path(self, index: int) -> Path:
        return self._rounds / f"{index:06d}.json"

    def _tensor_path(self, index: int) -> Path:
        return self._rounds / f"{index:06d}.safetensors"


class _Commit(Document):
    """A round's record with the digest of its tensor file, and its own, which records of earlier versions lack."""

    digest: str
    record: Round
    record_digest: str | None = None


def _digest_of_record(record: Any) -> str:
    """The digest of a record as JSON. It does not depend on what a later version adds to records."""
    return _digest(json.dumps(record, sort_keys=True).encode())


def _sealed(record: Mapping[str, Any]) -> bytes:
    """A record as JSON, with its digest beside its keys."""
    return json.dumps({**record, _SEAL: _digest_of_record(record)}).encode()


def _parted(path: Path, data: bytes) -> tuple[dict[str, Any], object]:
    """The record in a file's ``data``, and its digest apart, which one of an earlier version lacks.

    Raises:
        CorruptCommit: it is not what was written.
    """
    try:
        record = json.loads(data)
        seal = record.pop(_SEAL, None)
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        raise CorruptCommit(str(path), "it is not what was written") from error
    return record, seal


def _check_seal(path: Path, record: Any, seal: object) -> None:
    """Check a record against its digest, if it has one.

    Raises:
        CorruptCommit: it is not what was written.
    """
    if seal is not None and seal != _digest_of_record(record):
        raise CorruptCommit(str(path), "it is not what was written")


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    try:
        data = path.read_bytes()
        record, seal = _parted(path, data)
        found = kind.model_validate_json(data if kind is _Commit else json.dumps(record))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        others = (found["input"] for found in error.errors() if found["loc"][-1:] == ("version",))
        reasons = [f"it has version {other}; this chainfed-ray reads version {VERSION}" for other in others]
        if reasons:
            raise CorruptCommit(str(path), reasons[0]) from None
        raise CorruptCommit(str(path), "it is not what was written") from error
    _check_seal(path, record["record"] if isinstance(found, _Commit) else record, seal)
    return found


def _has_other_version(path: Path) -> bool:
    """Whether a file is a document of another version of this code."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("version", VERSION) != VERSION


def _digest(data: bytes) -> str:
    return blake2b(data, digest_size=16).hexdigest()


def _write(path: Path, parts: Iterable[bytes], mode: int = 0o666) -> None:
    """Write a temporary file, flush it and rename it: a reader sees the old file or the new one, never a part of one."""
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
