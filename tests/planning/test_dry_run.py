"""Promises of the dry run: what it says of a job is what becomes of it, and of a change, what the change does."""

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from fastapi.testclient import TestClient
from rich.console import Console
from torch import Tensor

import chainfed_ray.planning.dry_run
from chainfed_ray.api.command.cli import app
from chainfed_ray.api.report.forecast_picture import png
from chainfed_ray.api.report.forecast_table import forecast_table
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.model.prefix import PrefixRunner
from chainfed_ray.planning import duration
from chainfed_ray.planning.changes import changed
from chainfed_ray.planning.dry_run import dry_run
from chainfed_ray.planning.duration import Duration
from chainfed_ray.planning.pace import EvaluationPace, Pace
from chainfed_ray.planning.prepare import PlannedJob, plan_job
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_job
from tests.project import COMMAND

_PNG = b"\x89PNG\r\n"


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is trained: the time is as if it had been measured."""
    monkeypatch.setattr(chainfed_ray.planning.dry_run, "duration", lambda *_: Duration(95.0, {"phone": 0.25}))


def a_draft(document: dict[str, Any]) -> PlannedJob:
    return plan_job(parse_job(document), Path())


def classes(*budgets: tuple[str, int, int]) -> dict[str, Any]:
    """A fleet of classes with a name, a count and the bytes of a client."""
    return {"clients": [{"name": name, "count": count, "memory": memory} for name, count, memory in budgets]}


def needed(document: dict[str, Any]) -> int:
    """The bytes with which every client of ``document`` joins, and with one less does not."""
    excluded = a_draft({**document, "fleet": classes(("small", 4, 1))}).admission.excluded
    return 1 + max(shortfall for _, shortfall in excluded)


@pytest.fixture
def streamed(document: dict[str, Any]) -> dict[str, Any]:
    """A job whose base model has layers larger than the buffers in which matrices are streamed."""
    return {**document, "model": {"base": "builtin:minilm"}, "chain": {"window": 2, "start": 1}}


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_one_byte_decides_who_joins(streamed: dict[str, Any]) -> None:
    enough = needed(streamed)
    streamed["fleet"] = classes(("phone", 2, enough), ("tablet", 2, enough - 1))
    streamed["rounds"]["clients"] = 4
    told = dry_run(parse_job(streamed), at_once=1)
    tablet, phone = told.classes
    assert (tablet.joins, tablet.excluded, tablet.shortfall_bytes) == (0, 2, 1)
    assert (phone.joins, phone.excluded, phone.shortfall_bytes) == (2, 0, 0)
    assert tablet.planned_bytes == enough
    for row in told.classes:
        assert sum(row.parts.values()) == row.planned_bytes <= enough
    assert (told.joins, told.clients, told.refused) == (2, 4, None)


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_a_change_does_what_is_said_of_it(streamed: dict[str, Any]) -> None:
    now = parse_job(streamed)
    spec = {
        name: changed(now, field, value).document()
        for name, field, value in (
            ("brief", "data.max_length", now.data.max_length // 2),
            ("thin", "chain.adapter.bottleneck", now.chain.adapter.bottleneck // 2),
            ("thinner", "chain.adapter.bottleneck", now.chain.adapter.bottleneck // 4),
            ("shallow", "chain.head_layers", 1),
        )
    }
    budgets = [(name, 1, needed(document)) for name, document in spec.items()]
    streamed["fleet"] = classes(("phone", 2, needed(streamed)), ("silo", 1, 2**30), *budgets)
    told = dry_run(parse_job(streamed), at_once=1)
    assert told.joins < told.clients
    joining = {change.field for change in told.changes if change.joins_delta > 0}
    assert joining >= {"chain.adapter.bottleneck", "chain.head_layers"}
    for change in told.changes:
        document = json.loads(json.dumps(streamed))
        *sections, key = change.field.split(".")
        section = document
        for name in sections:
            section = section.setdefault(name, {})
        section[key] = change.value
        admission = a_draft(document).admission
        assert len(admission.admitted) == change.joins == told.joins + change.joins_delta
        if change.joins_delta > 0:
            assert f" {change.value} lets {change.joins_delta} more join" in change.words
        if change.field == "chain.window":
            whole = sum(len(plan.window) == change.value for _, plan in admission.admitted)
            assert f"; {whole} of {change.joins} train " in change.words


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_a_job_without_a_quorum_is_told_as_well(document: dict[str, Any]) -> None:
    document["fleet"] = classes(("watch", 4, 2**20))
    document["chain"]["head"] = "fitted"
    document["chain"]["adapter"]["bottleneck"] = 1  # which no change could halve
    told = dry_run(parse_job(document), at_once=1)
    assert (told.joins, told.estimated_seconds, told.sent_bytes_per_round, told.head_sums_bytes) == (0, None, 0, 0)
    assert told.refused is not None
    assert told.refused.startswith("fleet.clients")
    assert told.classes[0].shortfall_bytes > 0
    assert png(told).startswith(_PNG)
    assert "would be refused" in words(told)


@pytest.mark.slow
@pytest.mark.parametrize("trains", ["head", "upper"])
@pytest.mark.usefixtures("untimed")
def test_bytes_sent_are_those_of_a_real_turn(document: dict[str, Any], tmp_path: Path, trains: str) -> None:
    document["chain"]["global_trains"] = trains
    told = dry_run(parse_job(document), at_once=1)
    job = a_job(document, tmp_path)
    coordinator = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    stack, cut = coordinator.stack().tensors(), coordinator.stack().up_to(2).tensors()
    turns = next(coordinator.rounds()).turns
    assert {turn.sent_bytes for turn in turns} == {told.classes[0].sent_bytes}
    assert sum(turn.sent_bytes for turn in turns) == told.sent_bytes_per_round
    assert sum(tensor.nbytes for tensor in stack.values()) == told.received_bytes
    assert sum(tensor.nbytes for tensor in cut.values()) == told.exits_bytes, "one exit, below the top of the model"
    assert "at most for early exits" in words(told)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["server", "client"])
@pytest.mark.usefixtures("untimed")
def test_bytes_sent_by_who_trains_less_of_a_window(streamed: dict[str, Any], tmp_path: Path, where: str) -> None:
    """With noise of its own a client sends all of the window, so that nobody sees what it trained."""
    streamed["chain"]["head"] = "zero"
    streamed["rounds"]["clients"] = 4
    streamed["fleet"] = classes(("small", 2, needed(streamed)), ("large", 2, 2**30))
    streamed["privacy"] = {"clip": 1.0, "noise_multiplier": 4.0, "where": where}
    told = dry_run(parse_job(streamed), at_once=1)
    assert [row.window for row in told.classes] == [(1, 1), (2, 2)]
    job = a_job(streamed, tmp_path)
    turns = next(Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).rounds()).turns
    said = {row.name: row.sent_bytes for row in told.classes}
    assert {turn.client_class: turn.sent_bytes for turn in turns} == said
    assert (said["small"] == said["large"]) == (where == "client")


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_who_does_not_answer_sends_nothing(document: dict[str, Any]) -> None:
    always = dry_run(parse_job(document), at_once=1).sent_bytes_per_round
    document["fleet"]["clients"][0]["availability"] = 0.5
    assert dry_run(parse_job(document), at_once=1).sent_bytes_per_round == always // 2


@pytest.mark.slow
@pytest.mark.usefixtures("untimed")
def test_the_sums_of_a_fitted_head_are_those_of_a_real_one(document: dict[str, Any], tmp_path: Path) -> None:
    assert dry_run(parse_job(document), at_once=1).head_sums_bytes == 0
    document["chain"]["head"] = "fitted"
    told = dry_run(parse_job(document), at_once=1)
    job = a_job(document, tmp_path)
    rounds = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).rounds()
    fits = [record.head_fit for record in rounds if record.head_fit]
    assert max(fit.sent_bytes / fit.clients for fit in fits) == told.head_sums_bytes
    assert "of sums each time that a head is fitted" in words(told)


@pytest.mark.slow
def test_rounds_are_those_that_the_privacy_limit_allows(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["rounds"]["total"] = 20
    document["privacy"] = {"clip": 1.0, "noise_multiplier": 4.0, "epsilon": 8.0}
    timed = list[int]()
    monkeypatch.setattr(
        chainfed_ray.planning.dry_run,
        "duration",
        lambda job, *_: timed.append(job.spec.rounds.total) or Duration(1.0, {}),
    )
    told = dry_run(parse_job(document), at_once=1)
    job = a_job(document, tmp_path)
    job_started = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).open()
    assert 0 < told.rounds < 20
    assert timed == [told.rounds] == [job_started.total_rounds]
    assert told.stopped is not None
    assert "one more round could take ε to" in " ".join(words(told).split())


@pytest.mark.usefixtures("untimed")
def test_a_limit_that_allows_no_round_is_told_as_well(document: dict[str, Any]) -> None:
    document["privacy"] = {"clip": 1.0, "noise_multiplier": 0.5, "epsilon": 0.1}
    told = dry_run(parse_job(document), at_once=1)
    assert (told.rounds, told.estimated_seconds) == (0, None)
    assert told.refused is not None
    assert told.refused.startswith("privacy.epsilon")
    assert "4 of 4 clients can join, and it is refused" in words(told)


@pytest.mark.parametrize(("schedule", "total", "judged"), [("staged", 1, 1), ("staged", 9, 2), ("cyclic", 9, 1)])
def test_there_are_no_more_stages_than_rounds(document: dict[str, Any], schedule: str, total: int, judged: int) -> None:
    """The whole model is judged as a stage ends; two windows have two stages, if there are rounds for them."""
    document["chain"]["schedule"] = schedule
    document["rounds"]["total"] = total
    assert duration.times(a_draft(document), "stage") == judged


def test_the_time_is_that_of_turns_one_after_the_other(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document["rounds"] |= {"total": 6, "clients": 3, "local_epochs": 2}
    job = a_job(document, tmp_path)
    monkeypatch.setattr(duration, "evaluation_pace", lambda *_: EvaluationPace(0, 0, 0, 0))
    mean = sum(len(client.examples) for client in job.clients) / len(job.clients)
    for pace, turn in ((Pace(turn=1, step=0, layer=0, load=0), 1.0), (Pace(turn=0, step=1, layer=0, load=0), 2 * mean)):
        monkeypatch.setattr(duration, "pace_of", lambda *_, found=pace: found)
        assert duration.duration(job, at_once=3).seconds == pytest.approx(6 * turn)
        assert duration.duration(job, at_once=2).seconds == pytest.approx(2 * 6 * turn)
        assert duration.duration(job, at_once=1).seconds == pytest.approx(3 * 6 * turn)


@pytest.mark.parametrize("head", ["zero", "fitted"])
@pytest.mark.parametrize("disk", [None, "1KiB"])
@pytest.mark.slow
def test_layers_below_the_window_are_counted_as_they_are_run(
    document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: str | None, head: str
) -> None:
    """Where every client is in every round, an example's way through one layer is counted exactly."""
    document["chain"] |= {"head": head}
    document["rounds"] |= {"total": 4, "clients": 4, "local_epochs": 2, "convergence": {"rule": "none"}}
    document["rounds"] |= {"restore_best": False}  # a stage that goes back to its beginning is cheaper
    every_row = Path(document["data"]["train"].removeprefix("path:")).read_text().splitlines()
    rows = [json.loads(row) for row in every_row[::2]]
    labels = [row["label"] for row in rows]
    shuffled = np.random.default_rng(0).permutation(labels).tolist()  # there is something left to be learnt
    noisy = tmp_path / "noisy.jsonl"
    noisy.write_text("\n".join(json.dumps(row | {"label": label}) for row, label in zip(rows, shuffled, strict=True)))
    document["data"]["train"] = f"path:{noisy}"
    document["fleet"]["clients"][0] |= {"disk": disk} if disk else {}
    job = a_job(document, tmp_path)
    monkeypatch.setattr(duration, "evaluation_pace", lambda *_: EvaluationPace(0, 0, 0, 0))
    monkeypatch.setattr(duration, "pace_of", lambda *_: Pace(turn=0, step=0, layer=1, load=0))
    told = duration.duration(job, at_once=1).seconds
    run, counted = PrefixRunner.run, 0

    def counting(self: PrefixRunner, *arguments: Any) -> Tensor:
        nonlocal counted
        *_, examples, indices, _ = arguments
        counted += len(indices) if examples is not job.validation else 0
        return run(self, *arguments)

    monkeypatch.setattr(PrefixRunner, "run", counting)
    assert len(list(Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).rounds())) == 4
    assert told == pytest.approx(counted)


@pytest.fixture
def fleet_of_many(document: dict[str, Any], untimed: None) -> Forecast:
    names = [(f"class-{number}-with-a-long-name", 1, (number + 4) * 2**20) for number in range(16)]
    document["chain"]["adapter"]["bottleneck"] = 1
    return dry_run(parse_job({**document, "fleet": classes(*names)}), at_once=1)


def words(told: Forecast) -> str:
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(forecast_table(told))
    return cast("io.StringIO", console.file).getvalue()


@pytest.mark.slow
def test_words_fit_a_terminal_and_a_picture_holds_many_classes(fleet_of_many: Forecast) -> None:
    text = words(fleet_of_many)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "about 1m 35s at most: an estimate, from steps timed on this machine" in text
    assert f"{fleet_of_many.joins} of 16 clients can join" in text
    assert png(fleet_of_many).startswith(_PNG)


@pytest.mark.slow
def test_the_command_tells_it_in_json_and_in_words_and_draws_it(
    document: dict[str, Any], tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model whose path has brackets, which are no markup."""
    job_file, picture = tmp_path / "job.yaml", tmp_path / "plan.png"
    bracketed = tmp_path / "v[" / "bold]"
    bracketed.parent.mkdir()
    bracketed.symlink_to(document["model"]["base"].removeprefix("path:"))
    document["model"]["base"] = f"path:{bracketed}"
    job_file.write_text(yaml.safe_dump(document))
    command = ["plan", str(job_file), "--picture", str(picture)]
    done = subprocess.run([*COMMAND, *command, "--json"], capture_output=True, text=True, timeout=120, check=True)
    told = Forecast.model_validate_json(done.stdout)
    assert (told.joins, told.clients) == (4, 4)
    assert told.estimated_seconds is not None
    assert told.estimated_seconds > 0
    assert told.classes[0].micro_step_seconds is not None
    assert picture.read_bytes().startswith(_PNG)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["v["]
    monkeypatch.setattr(sys, "__stdout__", told_in_words := io.StringIO())  # where a command answers
    app(command, standalone_mode=False)
    said = told_in_words.getvalue()
    assert "4 of 4 clients can join" in said
    assert "v[/bold]" in "".join(said.split())
    assert f"The picture is in {picture}." in " ".join(said.split())


@pytest.fixture
def client(untimed: None) -> Iterator[TestClient]:
    async def plan(spec: JobSpec, reads_anything: bool, tenant: str) -> Forecast:
        return dry_run(spec, at_once=1)

    unused = cast("Any", None)
    with TestClient(
        create_app(Service(unused, unused, plan, unused, unused, unused, {})),
        "http://localhost",
        raise_server_exceptions=False,
    ) as made:
        yield made


@pytest.mark.slow
def test_the_route_answers_with_words_or_a_picture(client: TestClient, document: dict[str, Any]) -> None:
    told = client.post("/v1/plan", json=document)
    assert told.status_code == 200
    assert Forecast.model_validate(told.json()) == dry_run(parse_job(document), at_once=1)
    headers = {"Accept": "image/png", "Content-Type": "application/yaml"}
    drawn = client.post("/v1/plan", content=yaml.safe_dump(document), headers=headers)
    assert drawn.headers["content-type"] == "image/png"
    assert drawn.content.startswith(_PNG)


def test_a_bad_job_is_refused_by_the_route(client: TestClient, document: dict[str, Any]) -> None:
    document["chain"]["window"] = 9
    refused = client.post("/v1/plan", json=document)
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:chainfed:problem:invalid-job")
    assert refused.json()["errors"][0]["field"] == "chain.window"


@pytest.mark.slow
def test_look_aheads_are_compared_as_each_would_be_planned(
    document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A four-layer model; the windows are the layers 1 and 2, and then 2 and 3. One class holds one layer at a time."""
    monkeypatch.setattr(duration, "evaluation_pace", lambda *_: EvaluationPace(0, 0, 0, 0))
    monkeypatch.setattr(duration, "pace_of", lambda *_: Pace(turn=1, step=1, layer=0.25, load=0))
    small = needed(document)
    document["fleet"] = classes(("phone", 2, small), ("silo", 2, 2**30))
    told = dry_run(parse_job(document), at_once=1)
    rows = {(row.look_ahead, row.window): row for row in told.look_aheads}
    assert list(rows) == [("none", 2), ("adapters", 2), ("exact", 2), ("exact", 4)]
    assert [key for key, row in rows.items() if row.own] == [("adapters", 2)]
    for (look_ahead, window), row in rows.items():
        chain = {"look_ahead": look_ahead, "window": window, "start": 0 if window == 4 else 1}
        plans = a_draft({**document, "chain": document["chain"] | chain}).admission.admitted
        assert row.joins == len(plans)
        assert row.whole == sum(len(plan.window) == window for _, plan in plans)
        assert row.planned_bytes == {
            name: max(plan.planned_bytes for candidate, plan in plans if candidate.client_class == name)
            for name in {candidate.client_class for candidate, _ in plans}
        }
    alone = dry_run(parse_job({**document, "fleet": classes(("silo", 4, 2**30))}), at_once=1)
    assert [row.layer_passes for row in alone.look_aheads] == [2, 2, 3, 6]  # forward and backward
    assert rows["adapters", 2].estimated_seconds == told.estimated_seconds
    seconds = [row.estimated_seconds for row in alone.look_aheads]
    assert seconds[0] == seconds[1] < seconds[2] < seconds[3]  # type: ignore[operator]
    shown = words(told)
    assert "adapters *" in shown
    assert "exact all" in " ".join(shown.split())


@pytest.mark.usefixtures("untimed")
def test_a_look_ahead_that_contradicts_the_job_is_left_out(document: dict[str, Any]) -> None:
    document["chain"] |= {"look_ahead": "exact", "direction": "down"}
    told = dry_run(parse_job(document), at_once=1)
    assert {row.look_ahead for row in told.look_aheads} == {"exact"}
