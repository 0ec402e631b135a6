"""Promises of a mailbox whose tensors are in S3: pieces may come to any process of the API, any machine reads the answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.objects.object_store import ObjectStore
from chainfed_ray.cluster.objects.pieces import Pieces
from chainfed_ray.cluster.sites.files import StoredSiteFiles
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import AnswerRefused
from chainfed_ray.wire.codec import survey_order, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, JobDocument

SESSION = 32 * "1"


@pytest.mark.slow
def test_orders_and_answers_across_machines_that_share_no_folder(far: Storage, tmp_path: Path) -> None:
    JobStore(far.database).close()
    coordinator, *api = (Mailbox(Storage.at(tmp_path / name, far.database, url=far.url)) for name in "abc")
    api[0].join("a", SESSION, "1.0")
    new = coordinator.files.local_tensors("job", "new")
    new.parent.mkdir(parents=True)
    write_tensors({"stack": torch.arange(10.0)}, new)
    brought, content = HashedFile.of(new), new.read_bytes()
    coordinator.files.keep_tensors("job", new, brought.sha256)
    document = JobDocument(spec={"name": "tiny"})
    order = survey_order(
        "job", "tiny", coordinator.files.keep_document("job", document), 64 * "0", "silo", "site:rows.jsonl"
    )
    order = order.model_copy(update={"most_bytes": 10_000, "tensors": brought})
    coordinator.give("a", order)

    assert api[0].next("a", SESSION) == order
    assert JobDocument.read(api[1].document_of("a", order.id)) == document
    file = api[1].tensors_of("a", order.id)
    assert file is not None
    assert file.read_bytes() == content

    write_tensors({"update": torch.arange(100.0)}, tmp_path / "sent")
    sent, described = (tmp_path / "sent").read_bytes(), HashedFile.of(tmp_path / "sent")
    assert api[0].receive("a", order.id, SESSION, 0, b"y" + sent[1:]) == len(sent)
    with pytest.raises(AnswerRefused):
        api[1].answer("a", order.id, SESSION, Done(content={}, tensors=described))
    assert api[0].receive("a", order.id, SESSION, 0, sent[:100]) == 100
    assert api[1].receive("a", order.id, SESSION, 0, sent[:100]) == 100, "a piece that comes twice counts once"
    assert api[1].receive("a", order.id, SESSION, 300, sent[300:]) == 100, "a piece too early is not kept"
    assert api[1].receive("a", order.id, SESSION, 100, sent[100:]) == len(sent)
    assert api[0].received("a", order.id) == len(sent)
    api[0].answer("a", order.id, SESSION, Done(content={}, tensors=described))
    assert coordinator.files.answer("job", order.id).read_bytes() == sent

    coordinator.forget("job")
    assert far.objects is not None
    assert far.objects.below("jobs/job/sites") == []
    for mailbox in (coordinator, *api):
        mailbox.close()


@pytest.mark.parametrize("moment", ["before the first is read", "after the first is read"])
def test_an_answer_that_is_sent_twice_at_once_is_kept(
    moment: str, far: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, of = StoredSiteFiles(ObjectStore(str(far.url)), far), HashedFile.of
    write_tensors({"update": torch.arange(100.0)}, tmp_path / "sent")
    sent, described = (tmp_path / "sent").read_bytes(), HashedFile.of(tmp_path / "sent")
    assert files.receive("job", "order", 0, sent) == len(sent)
    read = Pieces.read

    def again() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Pieces, "read", read)
            patch.setattr(HashedFile, "of", of)
            assert files.keep_answer("job", "order", described)

    def reads_late(self: Pieces) -> Iterator[bytes]:
        again()
        yield from read(self)

    def is_checked_late(file: Path) -> HashedFile:
        again()
        return of(file)

    if moment.startswith("before"):
        monkeypatch.setattr(Pieces, "read", reads_late)
    else:
        monkeypatch.setattr(HashedFile, "of", is_checked_late)
    assert files.keep_answer("job", "order", described)
    assert files.answer("job", "order").read_bytes() == sent
    assert [path.name for path in files.local_answer("job", "order").parent.iterdir()] == ["order.safetensors"]


def test_who_serves_orders_keeps_the_tensors_of_the_newest_alone(far: Storage, tmp_path: Path) -> None:
    objects = ObjectStore(str(far.url))
    coordinator = StoredSiteFiles(objects, far)
    api = StoredSiteFiles(objects, Storage.at(tmp_path / "api", far.database, url=far.url))
    digests = []
    for text in ("of the first round", "of the second round"):
        new = coordinator.local_tensors("job", "new")
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(text)
        digests.append(HashedFile.of(new).sha256)
        coordinator.keep_tensors("job", new, digests[-1])
        assert api.tensors("job", digests[-1]).read_text() == text
    assert [path.stem for path in api.local_tensors("job", "x").parent.iterdir()] == digests[1:]
