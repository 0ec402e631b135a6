"""Promises of artifacts: each is what its size and SHA-256 say, and the model is one that PEFT loads."""

import json
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.testclient import TestClient
from peft import PeftModel
from transformers import AutoTokenizer

from chainfed_ray.api.jobs import artifacts, report
from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.files.artifacts import Artifact
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import ArtifactNotFound, ServiceFailed
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.hub import resolve
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.peft_method import SequenceClassifier
from chainfed_ray.spec.parse import parse_job
from tests.apps import an_app, served
from tests.builders import SPEC

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
WEIGHTS = "model/adapter_model.safetensors"


@pytest.fixture
def app(store: JobStore, storage: Storage) -> FastAPI:
    return an_app(store, folder_of=storage.job)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, "http://localhost", raise_server_exceptions=False) as made:
        yield made


@pytest.fixture
def job(store: JobStore, storage: Storage, document: dict[str, Any]) -> str:
    """A job of two rounds, done."""
    document["rounds"] |= {"total": 2, "clients": 2}
    document["evaluation"] = {"whole_every": "round", "serve": "best"}
    done = store.submit(parse_job(document)).id
    assert store.move(done, "running")
    run_queued_job(done, storage, in_this_process)
    assert store.get(done).status == "succeeded"
    return done


@pytest.mark.slow
def test_a_finished_job_leaves_its_stacks_report_and_partition(
    app: FastAPI, client: TestClient, job: str, storage: Storage, tmp_path: Path, document: dict[str, Any]
) -> None:
    found = {one["name"]: one for one in client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]}
    stacks = {
        f"{stack}/{file}"
        for stack in ("model", "last", "best")
        for file in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    report = {f"report/{name}" for name in ("report.txt", "report.json", "accuracy.png", "memory.png")}
    assert stacks | report | {"partition.json"} <= found.keys()
    for name, one in found.items():
        answer = client.get(f"/v1/jobs/{job}/artifacts/{name}")
        assert (answer.status_code, len(answer.content)) == (200, one["bytes"]), name
        assert sha256(answer.content).hexdigest() == one["sha256"], name
        assert answer.headers["etag"] == f'"{one["sha256"]}"'
        assert answer.headers["content-type"].partition(";")[0] == one["media_type"]
        assert str(storage.root).encode() not in answer.content, "no path of the service's machine"
    assert found["best/adapter_model.safetensors"]["sha256"] == found[WEIGHTS]["sha256"], "the best one is served"
    assert json.loads(client.get(f"/v1/jobs/{job}/artifacts/report/report.json").text)["rounds"] == 2
    assert "test accuracy" in client.get(f"/v1/jobs/{job}/artifacts/report/report.txt").text

    out = tmp_path / "model"
    with served(app) as address:
        downloads = Client(address)
        for artifact in downloads.send(calls.list_artifacts(job)).artifacts:
            if artifact.name.startswith("model/"):
                downloads.finish(
                    exchanges.download(job, artifact.name, artifact.sha256, out / Path(artifact.name).name)
                )
        downloads.close()
    check_loads(out, storage.model(job))
    check_card((out / "README.md").read_text(), document)


def check_loads(downloaded: Path, kept: Path) -> None:
    """What was downloaded answers as the service does."""
    saved = load_stack(kept)
    model = PeftModel.from_pretrained(SequenceClassifier.from_folder(resolve(saved.base)), str(downloaded)).eval()
    words = AutoTokenizer.from_pretrained(resolve(saved.base))
    batch = words(["salt tide"], return_tensors="pt", truncation=True, max_length=saved.max_length)
    with torch.no_grad():
        found = model(batch["input_ids"], batch["attention_mask"]).softmax(-1)
    expected = Classifier(saved.base, torch.float32).probabilities(saved, ["salt tide"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def check_card(card: str, document: dict[str, Any]) -> None:
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "tiny"
    for line in (
        "## How it was trained", "| seed | 3 |", "| train | path:rows.jsonl |", "| licence | not stated in its folder |",
        "| phone | 64MiB |", "| schedule | staged", "| accuracy |", "| rounds | 2 at most, 2 clients in each |",
        "| sha256 of the partition |", "on the validation rows |",
    ):  # fmt: skip
        assert line in text, line
    rows = Path(document["data"]["train"].removeprefix("path:")).read_text().splitlines()
    assert not any(json.loads(row)["text"] in text for row in rows)


@pytest.fixture
def left(store: JobStore, storage: Storage) -> str:
    """A job that was cancelled, and what it has left."""
    made = store.submit(SPEC).id
    folder = storage.job(made)
    for name, content in (("partition.json", b"{}"), ("last/adapter_model.safetensors", bytes(range(256)) * 40)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "secret.key").write_bytes(b"secret")
    return made


def names(client: TestClient, job: str) -> list[str]:
    return [one["name"] for one in client.get(f"/v1/jobs/{job}/artifacts").json()["artifacts"]]


def test_only_what_is_listed_is_given(client: TestClient, left: str, store: JobStore) -> None:
    assert names(client, left) == ["partition.json"], "stacks are replaced while a job runs"
    store.move(left, "cancelled")
    assert names(client, left) == ["last/adapter_model.safetensors", "partition.json"]
    for name in ("secret.key", "../chainfed.db", "..%2F..%2Fchainfed.db", "model", "last", "last/none", "%00"):
        answer = client.get(f"/v1/jobs/{left}/artifacts/{name}")
        assert answer.status_code == 404, name
    assert client.get("/v1/jobs/none/artifacts").json()["type"].endswith("job-not-found")
    assert client.get(f"/v1/jobs/{left}/artifacts/none").json()["type"].endswith("artifact-not-found")


def test_parts_and_files_that_did_not_change(client: TestClient, left: str, store: JobStore, storage: Storage) -> None:
    store.move(left, "cancelled")
    path = f"/v1/jobs/{left}/artifacts/last/adapter_model.safetensors"
    whole = client.get(path)
    tag = whole.headers["etag"]
    part = client.get(path, headers={"Range": "bytes=100-199", "If-Range": tag})
    assert (part.status_code, part.content) == (206, whole.content[100:200])
    other = client.get(path, headers={"Range": "bytes=100-199", "If-Range": '"other"'})
    assert (other.status_code, other.content) == (200, whole.content)
    for outside in ("bytes=999999-", "bytes=10240-", "bytes=-0"):
        refused = client.get(path, headers={"Range": outside})
        assert (refused.status_code, refused.headers["content-range"]) == (416, "bytes */10240")
        assert refused.headers["content-type"] == "application/problem+json"
    for unknown in ("bytes=5-1", "bytes=0-1,3-4", "lines=1-2", "bytes=-", "x"):
        assert client.get(path, headers={"Range": unknown}).content == whole.content, unknown
    assert client.get(path, headers={"Range": "bytes=-10"}).content == whole.content[-10:]
    same = client.get(path, headers={"If-None-Match": tag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    (storage.job(left) / "last" / "adapter_model.safetensors").write_bytes(b"changed")
    changed = client.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.content) == (200, b"changed")


def test_parts_are_asked_for_as_programs_ask_for_them(
    client: TestClient, left: str, store: JobStore, storage: Storage
) -> None:
    store.move(left, "cancelled")
    path = f"/v1/jobs/{left}/artifacts/last/adapter_model.safetensors"
    whole = client.get(path)
    tag, content = whole.headers["etag"], whole.content
    assert (whole.headers["accept-ranges"], whole.headers["cache-control"]) == ("bytes", "private, no-cache")
    for asked, first, last in (
        ("bytes=0-0", 0, 0),
        ("Bytes=100-", 100, 10239),
        ("bytes=10000-999999999999999999", 10000, 10239),
        ("bytes=-999999999999999999", 0, 10239),
        (" bytes=5-6 ", 5, 6),
    ):
        part = client.get(path, headers={"Range": asked, "If-Range": tag})
        assert (part.status_code, part.content) == (206, content[first : last + 1]), asked
        assert part.headers["content-range"] == f"bytes {first}-{last}/10240"
        assert (part.headers["etag"], part.headers["content-length"]) == (tag, str(last - first + 1))
    for still in (whole.headers["last-modified"], f"W/{tag}", '"other"', "x"):
        for asked in ("bytes=1-2", "bytes=9-3", "bytes=99999-", "lines=1-2"):
            answer = client.get(path, headers={"Range": asked, "If-Range": still})
            assert (answer.status_code, answer.content) == (200, content), (still, asked)
    two = client.get(path, headers=[("Range", "bytes=1-2"), ("Range", "bytes=4-5")])
    assert (two.status_code, two.content) == (200, content)
    for known in (f"W/{tag}", f'"other", {tag}', "*"):
        same = client.get(path, headers={"If-None-Match": known, "Range": "bytes=1-2"})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag), known
    lines = client.get(path, headers=[("If-None-Match", '"other"'), ("If-None-Match", tag)])
    assert lines.status_code == 304
    for other in (f'"a{tag[1:]}', tag.strip('"'), f"x{tag}"):
        assert client.get(path, headers={"If-None-Match": other}).status_code == 200, other
    head = client.head(path, headers={"Range": "bytes=1-2"})
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "10240")
    assert client.head(path, headers={"If-None-Match": tag}).status_code == 304
    (storage.job(left) / "last" / "adapter_model.safetensors").write_bytes(b"")
    for asked, status in (("bytes=0-", 416), ("bytes=-5", 416), ("bytes=-0", 416), ("bytes=5-1", 200)):
        empty = client.get(path, headers={"Range": asked})
        kind = "application/problem+json" if status == 416 else "application/octet-stream"
        assert (empty.status_code, empty.headers["content-type"]) == (status, kind), asked


def test_a_download_goes_on_and_is_checked(
    app: FastAPI, left: str, store: JobStore, storage: Storage, tmp_path: Path
) -> None:
    store.move(left, "cancelled")
    file = storage.job(left) / "last" / "adapter_model.safetensors"
    with served(app) as address:
        client = Client(address)
        one = next(one for one in client.send(calls.list_artifacts(left)).artifacts if one.name.startswith("last/"))
        for received in (0, 1000, one.bytes):
            out = tmp_path / str(received) / "out"
            out.parent.mkdir()
            (out.parent / f"out.{one.sha256[:16]}.partial").write_bytes(file.read_bytes()[:received])
            client.finish(exchanges.download(left, one.name, one.sha256, out))
            assert out.read_bytes() == file.read_bytes()
            assert [path.name for path in out.parent.iterdir()] == ["out"]
        file.write_bytes(b"changed")
        with pytest.raises(ServiceFailed, match="list it again"):
            client.finish(exchanges.download(left, one.name, one.sha256, tmp_path / "changed"))
        file.unlink()
        with pytest.raises(ArtifactNotFound, match=left):
            client.finish(exchanges.download(left, one.name, one.sha256, tmp_path / "gone"))
        client.close()
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize("asked", [{}, {"Range": "bytes=5-9"}])
def test_a_file_that_goes_before_it_is_sent_is_not_found(
    client: TestClient, left: str, store: JobStore, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]
) -> None:
    store.move(left, "cancelled")
    known = artifacts.artifact

    def looked_at(name: str, path: Path) -> Artifact:
        found = known(name, path)
        if name.startswith("last/"):
            deleted.append(path)
        return found

    deleted: list[Path] = []
    send = FileResponse.__call__

    async def deleted_first(self: FileResponse, *given: Any) -> None:
        deleted.pop().unlink()
        await send(self, *given)

    monkeypatch.setattr(artifacts, "artifact", looked_at)
    monkeypatch.setattr(FileResponse, "__call__", deleted_first)
    answer = client.get(f"/v1/jobs/{left}/artifacts/last/adapter_model.safetensors", headers=asked)
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:chainfed:problem:artifact-not-found")
    assert (answer.headers["content-type"], deleted) == ("application/problem+json", [])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mkdtemp", "draw_if_possible"])
def test_a_report_of_a_job_that_is_being_deleted_is_not_found(
    client: TestClient, job: str, storage: Storage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    known = getattr(report, where)

    def deleted(*given: Any, **named: Any) -> Any:
        shutil.rmtree(storage.job(job))
        return known(*given, **named)

    monkeypatch.setattr(report, where, deleted)
    answer = client.get(f"/v1/jobs/{job}/artifacts")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:chainfed:problem:job-not-found")
    assert not storage.job(job).exists()
