"""Promises of jobs that read uploads: they are as those that read the same file, and nobody reads another tenant's."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.cluster.files.upload_sources import rules_of_job
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.data.sources import read_table
from chainfed_ray.errors import InvalidJob
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.reading import EVERYTHING, reading_by
from chainfed_ray.spec.parse import parse_job


def added(uploads: UploadStore, tenant: str, rows: bytes, name: str = "rows.jsonl") -> str:
    own = uploads.seen_by(tenant, everything=False)
    upload = own.begin(name, len(rows), sha256(rows).hexdigest())
    with own.receive(upload.id, 0) as file:
        file.append(rows)
        return own.finish(upload.id, file).id


@pytest.mark.slow
def test_a_job_on_an_upload_is_that_on_the_file(
    uploads: UploadStore, store: JobStore, storage: Storage, document: dict[str, Any], tiny_data: Path
) -> None:
    document["rounds"] |= {"total": 1, "clients": 2}
    upload = added(uploads, "alice", tiny_data.read_bytes())
    jobs = []
    for train in (f"path:{tiny_data}", f"upload:{upload}"):
        document["data"]["train"] = train
        jobs.append(store.seen_by("alice", everything=False).submit(parse_job(document)).id)
        assert store.move(jobs[-1], "running")
        run_queued_job(jobs[-1], storage, in_this_process)
    one, other = (store.get(job) for job in jobs)
    assert one.status == other.status == "succeeded"
    assert one.result is not None
    assert other.result is not None
    for key in ("accuracy", "loss", "classes"):
        assert one.result[key] == other.result[key], key
    manifests = [(storage.job(job) / "partition.json").read_text() for job in jobs]
    assert manifests[0].replace(f"path:{tiny_data}", f"upload:{upload}") == manifests[1]


def test_a_job_that_names_what_is_not_its_tenants_is_refused_in_the_same_words(
    uploads: UploadStore, store: JobStore, document: dict[str, Any], tiny_data: Path
) -> None:
    whole = added(uploads, "alice", tiny_data.read_bytes())
    half = uploads.seen_by("bob", everything=False).begin("half.csv", 5, sha256(b"rows!").hexdigest()).id
    told = set()
    for train in (whole, half, "0" * 16, "", "../../etc/passwd"):
        document["data"]["train"] = f"upload:{train}"
        with pytest.raises(InvalidJob) as refused:
            store.seen_by("bob", everything=False).submit(parse_job(document))
        (problem,) = refused.value.problems
        assert problem.field == "data.train"
        told.add(problem.expected)
    assert len(told) == 1
    assert store.page() == []


@pytest.mark.parametrize(("name", "rows"), [("a.csv", b"text\nx\ny\n"), ("a.JSONL", b'{"text": "x"}\n{"text": "y"}\n')])
def test_the_form_is_that_of_the_name(uploads: UploadStore, name: str, rows: bytes) -> None:
    upload = added(uploads, "alice", rows, name)
    document = {"data": {"validation": f"upload:{upload}"}}
    with reading_by(rules_of_job(EVERYTHING, False, uploads.files, "alice", document)):
        table = read_table("data.validation", f"upload:{upload}", "validation")
        assert list(table.columns["text"]) == ["x", "y"]
    for tenant, source in (("bob", upload), ("alice", "none")):
        rules = rules_of_job(EVERYTHING, True, uploads.files, tenant, document)
        with (
            reading_by(rules),
            pytest.raises(InvalidJob, match=r"data\.test is .*; expected the id of an upload of yours"),
        ):
            read_table("data.test", f"upload:{source}", "test")


def test_outside_of_a_service_there_are_none() -> None:
    with pytest.raises(InvalidJob, match="in a job for the service"):
        read_table("data.train", f"upload:{'0' * 16}", "train")
