"""Promises of the manifest: the same deal has the same hash anywhere, and any other deal another."""

import json
from collections.abc import Callable
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chainfed_ray.client.pool import LocalPool
from chainfed_ray.data.partition import partition_examples
from chainfed_ray.data.sources import load
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.planning.manifest import manifest_of, simulated
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.manifest import Manifest
from chainfed_ray.records.result import JobResult
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job

JOB: dict[str, Any] = {
    "name": "wards",
    "model": {"base": "builtin:minilm"},
    "data": {"train": "path:rows.jsonl"},
    "fleet": {
        "partition": {"scheme": "dirichlet", "alpha": 0.5},
        "clients": [{"name": "phone", "count": 2, "memory": "64MiB"}, {"name": "silo", "memory": "1GiB"}],
    },
    "rounds": {"clients": 3},
    "seed": 3,
}
ROWS = [{"text": f"sentence {index}, «é»", "label": "abc"[index % 3], "site": f"{index % 4}"} for index in range(40)]
HASH = "791861d96bbb58b7489bcb096ceb8b1f4c11501508fa47fd6eb663980c138a30"

Change = Callable[[dict[str, Any], list[dict[str, Any]]], object]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a path of a job file leads to is not the job's: the same job, wherever it lies."""
    monkeypatch.chdir(tmp_path)


def manifest(document: dict[str, Any] = JOB, rows: list[dict[str, Any]] = ROWS) -> Manifest:
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = parse_job(document)
    corpus = load(spec.data, spec.seed, spec.fleet.partition.column)
    numbers = [corpus.classes.index(label) for label in corpus.train.labels]
    shares = partition_examples(
        spec.fleet.partition, np.array(numbers), corpus.train.groups, len(spec.fleet.members), spec.seed
    )
    clients = [
        simulated(name, group.name, share, corpus.train.labels)
        for (name, group), share in zip(spec.fleet.members, shares, strict=True)
    ]
    return manifest_of(spec.data, spec.fleet.partition, spec.seed, corpus, clients)


def test_the_same_job_has_the_same_hash_on_any_machine() -> None:
    """A hash that was found once: it depends on no path and no process. With other draws of numpy it would be another."""
    assert manifest().hash == HASH


def test_the_document_by_hand() -> None:
    """Every digest, from the rows and indices themselves."""
    spec = parse_job(JOB)
    made, corpus = manifest(), load(spec.data, spec.seed)
    shares = partition_examples(
        spec.fleet.partition, np.array([ord(label) for label in corpus.train.labels]), (), 3, spec.seed
    )
    text = json.dumps(
        {
            "version": 2, "scheme": "dirichlet", "alpha": 0.5, "column": None, "seed": 3,
            "splits": [
                {
                    "split": name, "source": "path:rows.jsonl", "rows": len(split),
                    "sha256": sha256("".join(
                        f'["{text}","{label}"]\n'.replace("«é»", r"\u00ab\u00e9\u00bb")
                        for text, label in zip(split.texts, split.labels, strict=True)
                    ).encode()).hexdigest(),
                }
                for name, split in (("train", corpus.train), ("validation", corpus.validation), ("test", corpus.test))
            ],
            "clients": [
                {
                    "client": client, "client_class": client[:-2], "rows": len(share),
                    "rows_per_class": {
                        label: count for label in "abc"
                        if (count := sum(corpus.train.labels[row] == label for row in share))
                    },
                    "sha256": sha256(str(share.tolist()).replace(" ", "").encode()).hexdigest(),
                }
                for client, share in zip(("phone-0", "phone-1", "silo-0"), shares, strict=True)
            ],
        },
        sort_keys=True, separators=(",", ":"),
    )  # fmt: skip
    assert made.canonical().decode() == text
    assert made.hash == sha256(text.encode()).hexdigest()
    assert Manifest.model_validate_json(made.canonical()) == made


@pytest.mark.parametrize(
    "change",
    [
        lambda job, rows: rows[7].update(text="another sentence"),
        lambda job, rows: rows[7].update(label="c"),
        lambda job, rows: rows.reverse(),
        lambda job, rows: rows.pop(),
        lambda job, rows: job.update(seed=4),
        lambda job, rows: job["fleet"]["partition"].update(alpha=0.4),
        lambda job, rows: job["fleet"]["partition"].update(scheme="quantity"),
        lambda job, rows: job["fleet"].update(partition={"scheme": "iid"}),
        lambda job, rows: job["fleet"]["clients"][0].update(name="tablet"),
        lambda job, rows: job["fleet"]["clients"][0].update(count=3),
    ],
    ids=["text", "label", "order", "fewer rows", "seed", "alpha", "scheme", "iid", "class", "count"],
)
def test_another_deal_has_another_hash(change: Change) -> None:
    job, rows = deepcopy(JOB), deepcopy(ROWS)
    change(job, rows)
    assert manifest(job, rows).hash != manifest().hash


def test_a_value_of_the_column_counts() -> None:
    job, rows = deepcopy(JOB), deepcopy(ROWS)
    job["fleet"]["partition"] = {"scheme": "column", "column": "site"}
    before = manifest(job, rows)
    assert (before.alpha, before.column) == (None, "site")
    for row in rows:
        row["site"] = row["site"].replace("3", "4")  # which moves no row to another client
    after = manifest(job, rows)
    assert [client.sha256 for client in after.clients] == [client.sha256 for client in before.clients]
    assert after.hash != before.hash


def test_what_is_no_part_of_the_deal_does_not_change_it() -> None:
    job = deepcopy(JOB)
    job["fleet"]["clients"][0] |= {"memory": "2GiB", "availability": 0.5, "speed": 0.5}
    job["rounds"] |= {"total": 9}
    assert manifest(job).hash == manifest().hash


@pytest.mark.slow
def test_it_is_kept_and_its_hash_is_on_record(document: dict[str, Any], tmp_path: Path) -> None:
    document["rounds"]["total"] = 1
    job, log = a_job(document, tmp_path), CommitLog(tmp_path / "log")
    coordinator = Coordinator(job, LocalPool(job.base), log)
    job_started, rounds, job_finished = coordinator.open(), list(coordinator.rounds()), coordinator.finish()
    kept = (tmp_path / "log" / "partition.json").read_bytes()
    assert Manifest.model_validate_json(kept) == job.manifest
    result = JobResult.of("tiny", job_started, rounds, job_finished)
    assert sha256(kept).hexdigest() == job.manifest.hash == job_started.partition_hash == result.partition_hash
    assert [client.rows for client in job.manifest.clients] == [len(client.examples) for client in job.clients]


@pytest.mark.slow
def test_a_job_does_not_go_on_with_other_rows(document: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = Path(document["data"]["train"].removeprefix("path:")).read_text()
    path.write_text(text)
    document["data"]["train"] = f"path:{path}"
    job, log = a_job(document, tmp_path), CommitLog(tmp_path / "log")
    next(Coordinator(job, LocalPool(job.base), log).rounds())
    path.write_text(text.replace("wave", "foam", 1))
    other = a_job(document, tmp_path)
    with pytest.raises(InvalidJob, match=r"data\.train is 'path:.*expected the rows with which the job began \(their "):
        next(Coordinator(other, LocalPool(job.base), log).rounds())
    path.write_text(text)
    next(Coordinator(a_job(document, tmp_path), LocalPool(job.base), log).rounds())
