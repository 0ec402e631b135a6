"""The hours that a job has taken at a site are counted on by the next process."""

from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest

from chainfed_ray.errors import InvalidSetting
from chainfed_ray.site.agent import Agent, Offer
from chainfed_ray.site.connection import Connection
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.site.working_time import WorkingTime
from chainfed_ray.wire.codec import job_document, survey_order


def test_seconds_are_added_up_and_outlive_the_process(tmp_path: Path) -> None:
    folder = tmp_path / "worked"
    first = WorkingTime(folder)
    assert first.of("job-1") == 0.0
    assert first.add("job-1", 2.0) == 2.0
    assert WorkingTime(folder).of("job-1") == 2.0, "a process that is killed has kept the first of them"
    assert first.add("job-1", 1.0) == 3.0
    assert first.add("job-1", 0.5, is_over=True) == 3.5
    again = WorkingTime(folder)
    assert (again.of("job-1"), again.of("job-2")) == (3.5, 0.0)
    (folder / "job-1").unlink()
    assert WorkingTime(folder).of("job-1") == 0.0


def test_a_file_that_is_no_number_is_named(tmp_path: Path) -> None:
    (tmp_path / "job-1").write_text("many")
    with pytest.raises(InvalidSetting, match=f"{tmp_path / 'job-1'} has a number of seconds"):
        WorkingTime(tmp_path).of("job-1")


def test_a_process_that_joins_again_refuses_a_job_whose_hours_are_used_up(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    WorkingTime(tmp_path / "worked").add("job-1", 3700.0, is_over=True)
    document["fleet"]["clients"] = [{"name": "silo", "memory": "64MiB", "site": "a", "data": "site:rows.jsonl"}]
    document["data"] = {"validation": "path:v.csv", "test": "path:t.csv"}
    known = job_document(document)
    order = survey_order("job-1", "tiny", known.described(), 64 * "0", "silo", "site:rows.jsonl")
    stop, answers = Event(), list[bytes]()

    def service(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/answer"):
            answers.append(request.read())
            stop.set()
        if request.url.path.endswith("/document"):
            return httpx.Response(206, content=known.content())
        asks = request.url.path.endswith("/next")
        return httpx.Response(200, json={"order": order.model_dump(mode="json"), "over": []} if asks else {})

    client = httpx.Client(transport=httpx.MockTransport(service), base_url="http://localhost")
    monkeypatch.setattr(httpx, "Client", lambda **_: client)
    connection = Connection("http://localhost", "key", 32 * "1", Transcript(None), stop, print)
    offer = Offer(tmp_path, tmp_path, 1, 1, tells_classes=True, policy=Policy(("*",), hours=1))
    Agent(connection, offer, stop, print).run()
    assert b'"hours"' in answers[0]
    assert b"3700" in answers[0]
