"""Promises of jobs whose commits are in S3: the bits of a job in a folder, on whichever machine it goes on, whatever fails."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.activity import Note
from chainfed_ray.client.messages import Client, Training, TurnOrder
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.cluster.files.artifacts import names_of
from chainfed_ray.cluster.files.job_log import LOG, lines_of
from chainfed_ray.cluster.jobs import commits
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.snapshots import Snapshots
from chainfed_ray.cluster.objects.working_copy import WorkingCopy
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import CommitConflict, CorruptCommit
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.records.fleet import clients_in
from chainfed_ray.records.secret import SECRET_BYTES, secret_path
from chainfed_ray.spec.parse import parse_job
from tests.builders import PRIVACY, a_document
from tests.pools import Altered, Answer, Killed, dying
from tests.s3 import Server

CLIENTS = 2


def a_short_job(model: Path, data: Path) -> dict[str, Any]:
    document = a_document(model, data)
    document["rounds"] |= {"total": 3, "clients": CLIENTS, "quorum": CLIENTS}
    document["fleet"]["clients"][0]["count"] = CLIENTS
    return document


@pytest.fixture
def short(tiny_model_folder: Path, tiny_data: Path) -> dict[str, Any]:
    return a_short_job(tiny_model_folder, tiny_data)


@pytest.fixture(scope="module")
def undisturbed(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the job's model, trained in a folder."""
    storage = Storage.at(tmp_path_factory.mktemp("near"))
    store = JobStore(storage.database)
    job = submitted(store, a_short_job(tiny_model_folder, tiny_data))
    run_queued_job(job, storage, in_this_process)
    store.close()
    return weights(storage, job)


@pytest.fixture
def records(far: Storage) -> Iterator[JobStore]:
    made = JobStore(far.database)
    yield made
    made.close()


def submitted(store: JobStore, document: dict[str, Any]) -> str:
    job = store.submit(parse_job(document)).id
    store.move(job, "validating")
    return job


def weights(storage: Storage, job: str) -> bytes:
    return (storage.model(job) / "adapter_model.safetensors").read_bytes()


def elsewhere(storage: Storage, folder: Path) -> Storage:
    """The same storage, as another machine has it."""
    return Storage.at(folder, storage.database, url=storage.url)


def store_of(storage: Storage) -> ObjectStore:
    assert storage.objects is not None
    return storage.objects


@pytest.mark.slow
def test_another_machine_goes_on_after_a_kill_between_tensors_and_record(
    short: dict[str, Any], undisturbed: bytes, far: Storage, records: JobStore, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job = submitted(records, short)
    create = ObjectStore.create

    def dies(self: ObjectStore, name: str, data: bytes) -> None:
        if name.endswith("snapshots/00000003"):
            raise Killed
        create(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "create", dies)
        with pytest.raises(Killed):
            run_queued_job(job, far, in_this_process)
    assert [event.data["index"] for event in records.of_kind(job, "round")] == [0], "the second was not told of"
    # What the machine has is ahead of the store, and lost with it.
    other = elsewhere(far, tmp_path / "other")
    run_queued_job(job, other, in_this_process)
    assert records.get(job).status == "succeeded"
    assert [event.data["index"] for event in records.of_kind(job, "round")] == [0, 1, 2]
    assert weights(other, job) == undisturbed

    reader = elsewhere(far, tmp_path / "reader")
    assert weights(reader, job) == undisturbed
    assert load_stack(reader.stack(job, None)).round is not None
    assert (reader.model(job) / "README.md").exists(), "the model's card"
    assert not (reader.committed(job) / "rounds").exists(), "only coordinators read them"
    artifacts = names_of(reader.committed(job), True, None)
    assert {"model/adapter_model.safetensors", "partition.json"} <= artifacts.keys()
    assert len(clients_in(reader.committed(job))) == CLIENTS
    said = [line.message for line in lines_of(reader.committed(job) / LOG)]
    assert any(message.startswith("the job is done after 3 rounds") for message in said)
    assert not other.scratch(job).exists(), "nothing is left where it ran"
    snapshots = Snapshots(store_of(far), job)
    kept = [snapshots.read(number) for number in snapshots.numbers()]
    named = set().union(*(snapshot.digests for snapshot in kept))
    assert set(store_of(far).files(f"jobs/{job}/content")) == named, "of those killed nothing is left"

    reader.remove(job)
    assert store_of(far).below(f"jobs/{job}") == []
    assert not reader.committed(job, at_once=True).exists()


@pytest.mark.slow
def test_a_store_that_is_away_is_waited_for(
    short: dict[str, Any], undisturbed: bytes, far: Storage, records: JobStore, s3: Server,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    job, waited = submitted(records, short), []

    def away(source: ModelSource, note: Note) -> Altered:
        turns = count()

        def shut(client: Client, order: TurnOrder, answer: Answer) -> Answer:
            if isinstance(order, Training):
                s3.door.shut = next(turns) == 2 * CLIENTS - 1  # as the second round ends
            return answer

        return Altered(LocalPool(source), shut)

    def back(seconds: float) -> None:
        waited.append(records.get(job))
        s3.door.shut = False

    monkeypatch.setattr(commits, "sleep", back)
    run_queued_job(job, far, away)
    assert [record.activity and record.activity["what"] for record in waited] == ["waiting for the storage"]
    assert records.get(job).status == "succeeded"
    assert weights(far, job) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "s3"])
def test_a_damaged_commit_is_said_and_the_one_before_is_used(
    place: str, short: dict[str, Any], undisturbed: bytes, far: Storage, records: JobStore, tmp_path: Path
) -> None:
    storage = far if place == "s3" else Storage.at(tmp_path / "near", far.database)
    job = submitted(records, short)
    with pytest.raises(Killed):
        run_queued_job(job, storage, lambda source, note: dying(LocalPool(source), 2 * CLIENTS + 1))
    newest = storage.job(job) / "rounds" / "000001.safetensors"
    if place == "folder":
        newest.write_bytes(newest.read_bytes()[:-1])
    else:
        snapshots, objects = Snapshots(store_of(far), job), store_of(far)
        digest = snapshots.read(snapshots.numbers()[0]).files["rounds/000001.safetensors"].sha256
        objects.delete([f"jobs/{job}/content/{digest}"])
        storage = elsewhere(far, tmp_path / "other")
    run_queued_job(job, storage, in_this_process)
    assert records.get(job).status == "succeeded"
    (event,) = records.of_kind(job, "damaged")
    assert "000001.safetensors" in event.data["reason"]
    assert "the commit before is used" in event.data["reason"]
    assert weights(storage, job) == undisturbed


@pytest.mark.slow
def test_of_two_writers_one_commits_and_the_other_goes_on_from_there(far: Storage, tmp_path: Path) -> None:
    first, second = (WorkingCopy(store_of(far), "job", tmp_path / name) for name in ("first", "second"))
    for copy, name in ((first, "first"), (second, "second")):
        copy.begin()
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "started.json").write_text(name)
    first.commit()
    with pytest.raises(CommitConflict):
        second.commit()
    assert second.begin() == []
    assert (tmp_path / "second" / "started.json").read_text() == "first"
    for number in range(5):  # so many that the number of the other one's next commit has been deleted
        (tmp_path / "second" / "round").write_text(f"{number}")
        second.commit()
    (tmp_path / "first" / "round").write_text("of the first")
    with pytest.raises(CommitConflict):
        first.commit()
    first.begin()
    assert (tmp_path / "first" / "round").read_text() == "4"


@pytest.mark.slow
def test_an_object_that_is_cut_is_noticed_by_who_works_and_by_who_reads(far: Storage, tmp_path: Path) -> None:
    objects, copy, folder = store_of(far), WorkingCopy(store_of(far), "job", tmp_path / "job"), tmp_path / "job"
    copy.begin()
    folder.mkdir()
    for text in ("the first", "the second"):
        (folder / "started.json").write_text(text)
        copy.commit()
    digest = Snapshots(objects, "job").read(2).files["started.json"].sha256
    objects.put(f"jobs/job/content/{digest}", b"the")
    other = WorkingCopy(objects, "job", tmp_path / "other")
    assert other.begin() == ["the object of started.json is not what was written"]
    assert (tmp_path / "other" / "started.json").read_text() == "the first"
    assert (far.committed("job") / "started.json").read_text() == "the first"
    (tmp_path / "other" / "started.json").write_text("the third")
    other.commit()
    assert (far.committed("job", at_once=True) / "started.json").read_text() == "the third"
    assert Snapshots(objects, "job").numbers() == [3, 1], "the damaged one is gone"


def test_without_a_whole_commit_nothing_is_made_up(far: Storage, tmp_path: Path) -> None:
    objects, copy = store_of(far), WorkingCopy(store_of(far), "job", tmp_path / "job")
    copy.begin()
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "started.json").write_text("x")
    copy.commit()
    objects.put("jobs/job/snapshots/00000001", b"torn")
    with pytest.raises(CorruptCommit, match="commit 1 is not what was written"):
        WorkingCopy(objects, "job", tmp_path / "other").begin()


def test_a_secret_that_was_drawn_stays_until_the_store_has_one(far: Storage, tmp_path: Path) -> None:
    first, second = (WorkingCopy(store_of(far), "job", tmp_path / name) for name in ("first", "second"))
    for copy, name in ((first, "first"), (second, "second")):
        copy.begin()
        (tmp_path / name).mkdir(exist_ok=True)
        secret_path(tmp_path / name).write_text(name.rjust(SECRET_BYTES))
    first.begin()  # its coordinator was killed
    first.commit()
    with pytest.raises(CommitConflict):
        second.commit()
    second.begin()
    secrets = [secret_path(tmp_path / name).read_text() for name in ("first", "second")]
    assert [secret.strip() for secret in secrets] == 2 * ["first"]


@pytest.mark.slow
def test_the_round_before_is_kept_after_a_commit_of_the_log_alone(far: Storage, tmp_path: Path) -> None:
    objects, job, number = store_of(far), tmp_path / "job", count()
    copy = WorkingCopy(objects, "job", job)

    def commit(*names: str) -> None:
        for name in names:
            (job / name).parent.mkdir(parents=True, exist_ok=True)
            (job / name).write_text(f"{name} {next(number)}")
        copy.commit()

    commit("started.json", LOG)
    commit("rounds/000000.json")
    commit("rounds/000001.json")
    copy = WorkingCopy(objects, "job", job)
    copy.begin()  # it is resumed, twice
    commit(LOG)
    commit(LOG)
    damaged = Snapshots(objects, "job").read(5).files["rounds/000001.json"].sha256
    objects.put(f"jobs/job/content/{damaged}", b"torn")
    copy, job = WorkingCopy(objects, "job", tmp_path / "other"), tmp_path / "other"
    assert len(copy.begin()) == 2
    assert [path.name for path in (job / "rounds").iterdir()] == ["000000.json"]
    commit("rounds/000001.json")
    assert WorkingCopy(objects, "job", tmp_path / "third").begin() == []
    assert Snapshots(objects, "job").numbers() == [6, 2]


@pytest.mark.slow
def test_the_secret_of_noise_is_in_the_store_while_the_job_runs_and_no_longer(
    short: dict[str, Any], far: Storage, records: JobStore, tmp_path: Path
) -> None:
    job = submitted(records, short | {"privacy": PRIVACY})
    secret = Snapshots(store_of(far), job).secret
    with pytest.raises(Killed):  # before the first round is committed, of which clients may have sent updates
        run_queued_job(job, far, lambda source, note: dying(LocalPool(source), 1))
    assert Snapshots(store_of(far), job).numbers() == [1]
    drawn = store_of(far).get(secret)
    assert drawn == (far.job(job) / "privacy.key").read_bytes()
    other = elsewhere(far, tmp_path / "other")
    WorkingCopy(store_of(far), job, other.job(job)).begin()
    assert (other.job(job) / "privacy.key").read_bytes() == drawn
    assert (other.job(job) / "privacy.key").stat().st_mode & 0o077 == 0
    run_queued_job(job, other, in_this_process)
    assert records.get(job).status == "succeeded"
    assert not store_of(far).exists(secret)
    assert not any(drawn in store_of(far).get(found.name) for found in store_of(far).below(f"jobs/{job}"))
