"""What a worker answers says nothing of the rows, whatever goes wrong with them."""

import json
import os
import signal
import sys
from dataclasses import replace
from errno import EACCES, EIO, ESTALE, ETIMEDOUT
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Client, Evaluating, Fitting, Profiling, TurnOrder
from chainfed_ray.client.survey import SiteRows
from chainfed_ray.data.examples import rows_of_site
from chainfed_ray.data.sources import Split
from chainfed_ray.data.tokens import NO_EXAMPLES, ExampleCounts
from chainfed_ray.hub import digest_of
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.site.worker import Worker, tell_progress
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.wire.codec import job_document, survey_of, survey_order, turn_order, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, NotDone
from chainfed_ray.wire.reasons import in_words
from tests.builders import a_job

SECRET = "zephyr quartz"


@pytest.fixture
def asked(document: dict[str, Any]) -> dict[str, Any]:
    document["fleet"]["clients"] = [{"name": "silo", "memory": "64MiB", "site": "a", "data": "site:rows.jsonl"}]
    del document["data"]["train"]
    document["data"] |= {"validation": "path:v.csv", "test": "path:t.csv"}
    return document


def answer(document: dict[str, Any], rows: list[Any], folder: Path, parts: int = 1, **given: Any) -> Done | NotDone:
    data = folder / "rows"
    data.mkdir(exist_ok=True)
    (data / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = Path(document["model"]["base"].removeprefix("path:"))
    digest = given.pop("digest", digest_of(base))
    known = job_document(document)
    order = survey_order("job-1", "tiny", known.described(), digest, "silo", given.pop("data", "site:rows.jsonl"))
    worker = Worker(data, folder / "scratch", parts, given.pop("tells_classes", True))
    return worker.carry_out(order, known, None, folder / "sent")


def some(count: int) -> list[dict[str, str]]:
    return [{"text": f"wave {place} salt", "label": ("no", "yes")[place % 2]} for place in range(count)]


def test_a_survey_counts_rows_by_class(asked: dict[str, Any], tmp_path: Path) -> None:
    found = answer(asked, some(11), tmp_path, parts=2)
    assert isinstance(found, Done)
    first, second = survey_of(found.content, 16).clients
    assert (first.counts.examples, second.counts.examples) == (6, 5)
    assert (first.classes, second.classes) == ({"no": 6}, {"yes": 5})


@pytest.mark.parametrize(
    ("rows", "given", "reason"),
    [
        ([*some(4), {"text": SECRET}], {}, "job"),
        ([*some(4), {"text": [SECRET], "label": "no"}], {}, "job"),
        ([{"note": SECRET, "label": "no"}], {}, "job"),
        ([SECRET], {}, "job"),
        (some(4), {"data": f"site:{SECRET}"}, "plan"),  # which the job does not name
        (some(4), {"parts": 9}, "job"),
        (some(4), {"digest": 64 * "0"}, "model"),
        (some(4), {"tells_classes": False}, "classes"),
        ([{"text": "wave", "label": f"{SECRET} {place}"} for place in range(9)], {}, "classes"),
        ([{"text": "wave", "label": SECRET * 20} for place in range(9)], {}, "classes"),
    ],
)
def test_a_failure_is_told_without_a_word_of_the_rows(
    asked: dict[str, Any], tmp_path: Path, rows: list[Any], given: dict[str, Any], reason: str
) -> None:
    found = answer(asked, rows, tmp_path, **given)
    assert isinstance(found, NotDone)
    assert found.reason == reason
    assert not any(word in found.model_dump_json() + in_words(found) for word in SECRET.split())


def test_labels_that_the_job_does_not_list_are_told_without_a_word(asked: dict[str, Any], tmp_path: Path) -> None:
    asked["data"]["classes"] = ["no", "yes"]
    found = answer(asked, [*some(4), {"text": "wave", "label": SECRET}], tmp_path)
    assert isinstance(found, NotDone)
    assert SECRET not in found.model_dump_json()


def test_a_survey_waits_for_a_disk_that_does_not_answer(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it the job would do without this site. What is the rows' own is told at once."""
    troubles: list[OSError] = [OSError(number, os.strerror(number)) for number in (ETIMEDOUT, ESTALE, EIO)]
    waited, read = list[float](), rows_of_site

    def rows(*given: Any) -> Split:
        if troubles:
            raise troubles.pop()
        return read(*given)

    monkeypatch.setattr("chainfed_ray.site.worker.rows_of_site", rows)
    monkeypatch.setattr("chainfed_ray.site.worker.sleep", waited.append)
    assert isinstance(answer(asked, some(4), tmp_path), Done)
    assert len(waited) == 3
    troubles.append(OSError(EACCES, os.strerror(EACCES)))
    assert answer(asked, some(4), tmp_path) == NotDone(reason="error", kind="PermissionError")


def test_whatever_is_raised_is_told_by_its_name(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"cannot read {SECRET}")

    monkeypatch.setattr("chainfed_ray.site.worker.rows_of_site", broken)
    found = answer(asked, some(4), tmp_path)
    assert found == NotDone(reason="error", kind="RuntimeError")


def test_a_worker_whose_site_was_killed_ends_in_the_middle_of_its_turn() -> None:
    """The process from which it was forked may end later than the one that hears it."""

    def unheard() -> None:
        reads, writes = os.pipe()
        os.close(reads)
        sys.stdout = os.fdopen(writes, "w")
        telling = Thread(target=tell_progress, args=(Event(),), daemon=True)
        telling.start()
        telling.join()
        signal.raise_signal(signal.SIGKILL)  # it does not tell any more, and the turn would go on

    process = get_context("fork").Process(target=unheard)
    process.start()
    process.join(30)
    assert process.exitcode == 1


def test_an_order_that_its_job_does_not_have_is_not_carried_out(asked: dict[str, Any], tmp_path: Path) -> None:
    """Sums over another part of the rows than a client's, or of a job that fits no head, would tell of single rows."""
    job = a_job_of(asked, tmp_path)
    rows = SiteRows("a", "site:rows.jsonl", 0, 1, ExampleCounts(12, 5, 60), ("no", "yes"))
    own = replace(job.clients[0], name="silo-0", client_class="silo", examples=NO_EXAMPLES, remote=rows)
    tensors = job.new_stack(range(1, 4), seed=1).tensors()
    fitting, evaluating = Fitting(tensors, Window(1, 2), 2), Evaluating(tensors, Window(3, 3), "test")
    write_tensors(tensors, tmp_path / "given")
    worker = Worker(tmp_path / "rows", tmp_path / "scratch", 1, True)
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, some(12))))

    def answered(head: str, client: Client, turn: TurnOrder) -> Done | NotDone:
        document = json.loads(json.dumps(asked))
        document["chain"] |= {"head": head}
        known = job_document(parse_job(document).document(), job.planner.costs, rows.classes)
        digest, file = digest_of(job.base.folder), tmp_path / "given"
        order = turn_order(f"job-{head}", "tiny", known.described(), digest, client, turn, HashedFile.of(file))
        return worker.carry_out(order, known, file, tmp_path / "sent")

    assert answered("zero", own, fitting) == NotDone(reason="plan")
    assert answered("fitted", own, evaluating) == NotDone(reason="plan")
    for part, parts in ((0, 12), (1, 2), (-1, 1)):
        other = replace(own, remote=replace(rows, part=part, parts=parts))
        assert answered("fitted", other, fitting) == NotDone(reason="plan")
    (tmp_path / "rows" / "others.jsonl").write_text("\n".join(map(json.dumps, some(12))))
    other = replace(own, remote=replace(rows, data="site:others.jsonl"))
    assert answered("fitted", other, fitting) == NotDone(reason="plan")


def a_job_of(asked: dict[str, Any], folder: Path) -> PlannedJob:
    """The job with simulated clients in place of those at the site."""
    rows = folder / "dealt.jsonl"
    rows.write_text("\n".join(map(json.dumps, some(40))))
    document = json.loads(json.dumps(asked))
    document["fleet"]["clients"] = [{"name": "silo", "count": 3, "memory": "64MiB"}]
    document["data"] |= {"train": f"path:{rows}", "validation": None, "test": None}
    return a_job(document, folder)


def test_rows_that_change_during_a_job_are_noticed(asked: dict[str, Any], tmp_path: Path) -> None:
    assert isinstance(answer(asked, some(12), tmp_path), Done)
    job = a_job_of(asked, tmp_path)
    (tmp_path / "rows" / "rows.jsonl").write_text("\n".join(map(json.dumps, some(11))))
    rows = SiteRows("a", "site:rows.jsonl", 0, 1, ExampleCounts(12, 5, 60), ("no", "yes"))
    client = replace(job.clients[0], name="silo-0", client_class="silo", examples=NO_EXAMPLES, remote=rows)
    asked["chain"] |= {"start": "auto"}
    known, digest = job_document(parse_job(asked).document(), job.planner.costs), digest_of(job.base.folder)
    order = turn_order("job-1", "tiny", known.described(), digest, client, Profiling(40, 1), None)
    restarted = Worker(tmp_path / "rows", tmp_path / "scratch", 1, True)
    assert restarted.carry_out(order, known, None, tmp_path / "sent") == NotDone(reason="changed")
