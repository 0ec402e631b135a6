"""Promise: with ``CHAINFED_LOG=json`` each line is JSON, and says which job, tenant, round, client or request it is about."""

import json
import logging
from collections.abc import Iterator, Mapping
from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from chainfed_ray.api.serve.front_door import add_front_door
from chainfed_ray.client.messages import Client, TurnOrder
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.cluster.jobs.controller import Controller, Coordinators
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.pool import actors
from chainfed_ray.cluster.resources import runtime_env
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.cluster.structured_logs import JOB_LINES, about, log_as_asked, log_as_json, what_lines_are_about
from chainfed_ray.model.source import ModelSource
from chainfed_ray.spec.parse import parse_job
from tests.builders import SPEC
from tests.pools import Altered, Answer


@pytest.fixture
def stream() -> Iterator[StringIO]:
    """What is logged as JSON. Afterwards the process logs as before."""
    loggers = (logging.getLogger(), logging.getLogger("chainfed_ray"), JOB_LINES)
    before = [(one.handlers[:], one.level) for one in loggers]
    log_as_json(told := StringIO())
    yield told
    for one, (handlers, level) in zip(loggers, before, strict=True):
        one.handlers = handlers
        one.setLevel(level)


def lines(stream: StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_process_logs_as_its_environment_says_and_hands_that_on(
    stream: StringIO, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CHAINFED_LOG", "json")
    asked = runtime_env()["env_vars"]
    assert asked["CHAINFED_LOG"] == "json"
    log_as_asked({"CHAINFED_LOG": "text"})
    logging.getLogger("chainfed_ray.somewhere").info("as before")
    assert [line["message"] for line in lines(stream)] == ["as before"]
    log_as_asked(asked)
    logging.getLogger("chainfed_ray.somewhere").info("in JSON")
    assert json.loads(capsys.readouterr().err)["message"] == "in JSON"


def test_a_line_has_what_it_is_about_and_an_error_its_traceback(stream: StringIO) -> None:
    log = logging.getLogger("chainfed_ray.somewhere")
    with about(job="a"), about(round=2):
        try:
            raise ValueError("two\nlines")
        except ValueError:
            log.exception("it failed: %s", "a ‘word’\n")
    log.debug("no line")
    log.info("outside")
    failed, outside = lines(stream)
    assert (failed["level"], failed["logger"], failed["job"], failed["round"]) == (
        "error", "chainfed_ray.somewhere", "a", 2,
    )  # fmt: skip
    assert failed["message"] == "it failed: a ‘word’\n"
    assert "ValueError: two\nlines" in failed["error"]
    assert outside.keys() == {"at", "level", "logger", "message"}


@pytest.mark.slow
def test_the_lines_of_a_job_name_it_and_those_of_turns_the_client(
    stream: StringIO, document: dict[str, Any], storage: Storage, store: JobStore
) -> None:
    document["rounds"] |= {"total": 2}
    with about(request="request-7"):
        job = store.seen_by("alice", False).submit(parse_job(document)).id
    store.move(job, "running")
    orders: list[Mapping[str, str | int]] = []

    def hear(client: Client, order: TurnOrder, answer: Answer) -> Answer:
        orders.append(what_lines_are_about())
        return answer

    run_queued_job(job, storage, lambda source, note: Altered(LocalPool(source), hear))
    assert store.get(job).status == "succeeded"
    assert {(of["job"], of["stage"], of["round"]) for of in orders} == {(job, 1, 1), (job, 2, 2)}, "it goes along"
    told = lines(stream)
    assert {(line["job"], line["tenant"], line["request"]) for line in told} == {(job, "alice", "request-7")}
    turns = [line for line in told if "client" in line]
    assert {(line["round"], line["stage"]) for line in turns} == {(1, 1), (2, 2)}
    assert all(line["client"] and "steps on" in line["message"] for line in turns)


def test_lines_of_a_client_s_process_say_which_turn_they_are_about(
    stream: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError("a disk")

    monkeypatch.setattr(actors, "take_turn", fails)
    client, told = cast(Client, SimpleNamespace(name="phone-3", speed=1.0)), {"job": "a", "stage": 1, "round": 2}
    with pytest.raises(ValueError, match="a disk"):
        actors.turn_of(client, None, cast(ModelSource, None), told)
    (line,) = lines(stream)
    assert {key: line[key] for key in ("job", "stage", "round", "client")} == {**told, "client": "phone-3"}
    assert "ValueError: a disk" in line["error"]


def test_a_request_has_a_line(stream: StringIO) -> None:
    app = FastAPI()
    add_front_door(app, [])

    @app.get("/v1/jobs/{job}/here")
    async def here(job: str) -> int:
        logging.getLogger("chainfed_ray.inside").warning("while it is answered")
        return 1

    TestClient(app, "http://localhost").get("/v1/jobs/tiny-1/here", headers={"X-Request-ID": "mine"})
    inside, request = lines(stream)
    assert inside["request"] == request["request"] == "mine"
    assert (request["method"], request["path"], request["status"]) == ("GET", "/v1/jobs/tiny-1/here", 200)
    assert request["job"] == "tiny-1"


def test_lines_of_the_controller_name_the_job_and_its_tenant(
    stream: StringIO, storage: Storage, store: JobStore
) -> None:
    job = store.seen_by("alice", everything=False).submit(SPEC).id

    def fails(*_: Any) -> None:
        raise ValueError("a disk")

    coordinators = SimpleNamespace(alive=set, ensure=fails, clear_scratch=fails)
    Controller(Settings(storage), store, cast(Coordinators, coordinators)).step()
    (line,) = lines(stream)
    assert (line["message"], line["job"], line["tenant"]) == (
        f"a step of the controller failed at job {job}", job, "alice",
    )  # fmt: skip


def test_otherwise_nothing_is_told_but_warnings(capfd: pytest.CaptureFixture[str]) -> None:
    JOB_LINES.warning("a turn failed")
    with about(job="a"):
        logging.getLogger("chainfed_ray.somewhere").info("no line")
    assert capfd.readouterr() == ("", "")
