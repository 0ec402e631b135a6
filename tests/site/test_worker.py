"""What a worker answers says nothing of the rows, whatever goes wrong with them."""

import json
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.hub import digest_of
from chainfed_ray.site.codec import survey_of, survey_order
from chainfed_ray.site.envelope import Done, NotDone
from chainfed_ray.site.policy import in_words
from chainfed_ray.site.worker import Worker

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
    order = survey_order("job-1", "tiny", document, digest, "silo", given.pop("data", "site:rows.jsonl"))
    worker = Worker(data, folder / "scratch", parts, given.pop("tells_classes", True))
    return worker.carry_out(order, None, folder / "sent")


def some(count: int) -> list[dict[str, str]]:
    return [{"text": f"wave {place} salt", "label": ("no", "yes")[place % 2]} for place in range(count)]


def test_a_survey_counts_rows_by_class(asked: dict[str, Any], tmp_path: Path) -> None:
    found = answer(asked, some(11), tmp_path, parts=2)
    assert isinstance(found, Done)
    first, second = survey_of(found.content).clients
    assert (first.counts.examples, second.counts.examples) == (6, 5)
    assert (first.classes, second.classes) == ({"no": 6}, {"yes": 5})


@pytest.mark.parametrize(
    ("rows", "given", "reason"),
    [
        ([*some(4), {"text": SECRET}], {}, "job"),
        ([*some(4), {"text": [SECRET], "label": "no"}], {}, "job"),
        ([{"note": SECRET, "label": "no"}], {}, "job"),
        ([SECRET], {}, "job"),
        (some(4), {"data": f"site:{SECRET}"}, "job"),
        (some(4), {"parts": 9}, "job"),
        (some(4), {"digest": 64 * "0"}, "model"),
        (some(4), {"tells_classes": False}, "classes"),
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


def test_whatever_is_raised_is_told_by_its_name(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError(f"cannot read {SECRET}")

    monkeypatch.setattr("chainfed_ray.site.worker.rows_of_site", broken)
    found = answer(asked, some(4), tmp_path)
    assert found == NotDone(reason="error", kind="RuntimeError")
