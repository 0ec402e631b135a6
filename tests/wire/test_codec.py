"""What crosses the boundary comes out as it went in; and what no honest site sends is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from chainfed_ray.chain import Window
from chainfed_ray.client.first_pass import StartGuess
from chainfed_ray.client.messages import (
    Client,
    Evaluating,
    Fitting,
    HeadLosses,
    HeadSums,
    Metrics,
    Profile,
    Profiling,
    Training,
    Update,
)
from chainfed_ray.client.survey import ClientSurvey, SiteRows, Survey
from chainfed_ray.data.tokens import NO_EXAMPLES, ExampleCounts
from chainfed_ray.errors import InvalidUpdate
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.wire.codec import (
    client_of,
    job_document,
    memory_of,
    result_document,
    result_of,
    survey_document,
    survey_of,
    turn_of,
    turn_order,
    write_tensors,
)
from chainfed_ray.wire.envelope import HashedFile, Heartbeat, JobDocument, Joining, Order
from tests.builders import a_job

COUNTS = ExampleCounts(10, 12, 90)
ROWS = SiteRows("a", "site:rows.jsonl", 1, 4, COUNTS, ("no", "yes"))


@pytest.fixture
def job(document: dict[str, Any], tmp_path: Path) -> PlannedJob:
    return a_job(document, tmp_path)


def turns(job: PlannedJob) -> list[Any]:
    tensors = job.new_stack(range(1, 4), seed=1).tensors()
    window = Window(1, 2)
    training = Training(tensors, window, 2, 1, 8, 0.01, 0.1, 0.1, "window", 2**63 - 1, None, 0.1, 1.0)
    guess = StartGuess(0.5, 2, 1)
    return [training, Fitting(tensors, window, 2), Evaluating(tensors, window, "test"), Profiling(40, 7, guess)]


def test_orders_come_out_as_they_went_in(job: PlannedJob, tmp_path: Path) -> None:
    client = replace(job.clients[0], examples=NO_EXAMPLES, remote=ROWS)
    document = job_document(job.spec.document(), job.planner.costs, ROWS.classes)
    described = document.described()
    for turn in turns(job):
        file = None
        if not isinstance(turn, Profiling):
            write_tensors(turn.tensors, file := tmp_path / "sent.safetensors")
        sent = turn_order("job", "tiny", described, 64 * "0", client, turn, file and HashedFile.of(file))
        received = Order.model_validate_json(sent.model_dump_json())
        assert received.model_dump_json() == sent.model_dump_json()
        again = turn_of(received, file)
        assert again.__class__ is turn.__class__
        assert {k: v for k, v in vars(again).items() if k != "tensors"} == {
            k: v for k, v in vars(turn).items() if k != "tensors"
        }
        if file:
            assert all(torch.equal(again.tensors[name], tensor) for name, tensor in turn.tensors.items())
        found: Client = client_of(received)
        assert (found.name, found.plan, found.cap_bytes) == (client.name, client.plan, client.cap_bytes)
    (tmp_path / "document").write_bytes(document.content())
    assert HashedFile.of(tmp_path / "document") == described
    known = JobDocument.read(tmp_path / "document")
    assert (known.spec, memory_of(known), known.classes) == (job.spec.document(), job.planner.costs, ROWS.classes)


def test_an_order_is_named_by_what_it_asks(job: PlannedJob) -> None:
    client = replace(job.clients[0], examples=NO_EXAMPLES, remote=ROWS)
    profiling = Profiling(40, 7)

    document = job_document(job.spec.document())

    def name(given: Client, turn: Any, asked: JobDocument = document) -> str:
        return turn_order("job", "tiny", asked.described(), 64 * "0", given, turn, None).id

    assert name(client, profiling) == name(client, Profiling(40, 7))
    others = [name(replace(client, name="b"), profiling), name(client, Profiling(40, 8))]
    others.append(name(client, profiling, job_document(job.spec.document(), classes=("no",))))
    assert len({name(client, profiling), *others}) == 4


@pytest.mark.parametrize(
    ("kind", "result"),
    [
        ("profiling", Profile((0.5, 1.0), 40, 1.5, 7)),
        ("training", Update({"a": torch.arange(4.0)}, 10, 0.5, 3, 1.0, 2.0, None)),
        ("fitting", HeadSums({"counts": torch.ones(2)}, 10, 1.0, 8)),
        ("evaluating", Metrics(10, 10, 3.5, 7, (3, 4), (10, 10), 0.5, 9)),
        ("calibrating", HeadLosses(10, ((0.5, 1.0), (2.0, 3.0)), (7, 8), 0.5, None)),
    ],
)
def test_results_come_out_as_they_went_in(kind: Any, result: Any, tmp_path: Path) -> None:
    content, tensors = result_document(result)
    file = None
    if tensors:
        write_tensors(tensors, file := tmp_path / "sent.safetensors")
    found = result_of("a", kind, json.loads(json.dumps(content)), file)
    assert {k: v for k, v in vars(found).items() if k != "tensors"} == {
        k: v for k, v in vars(result).items() if k != "tensors"
    }
    assert all(torch.equal(vars(found)["tensors"][name], tensor) for name, tensor in tensors.items())


@pytest.mark.slow
@given(
    st.sampled_from(["profiling", "training", "fitting", "evaluating", "calibrating"]),
    st.dictionaries(st.sampled_from(["cka", "examples", "loss", "x", "hits"]), st.none() | st.integers() | st.text()),
)
def test_what_is_no_result_is_refused(kind: Any, content: dict[str, Any]) -> None:
    with pytest.raises(InvalidUpdate):
        result_of("a", kind, content, None)


@pytest.mark.parametrize(
    "lie",
    [{"hits": 5}, {"loss": "low"}, {"cpu_seconds": None}, {"peak_bytes": "0"}, {"examples": 1.5}, {"hits": [[1]]}],
)
def test_a_number_that_is_none_is_refused(lie: dict[str, Any]) -> None:
    content, _ = result_document(Metrics(10, 10, 3.5, 7, (3, 4), (10, 10), 0.5, 9))
    with pytest.raises(InvalidUpdate):
        result_of("a", "evaluating", {**json.loads(json.dumps(content)), **lie}, None)


@pytest.mark.parametrize("name", ["../../out", "/etc", "a b", "", "a" * 200])
def test_a_name_that_leads_elsewhere_is_refused(job: PlannedJob, name: str) -> None:
    client = replace(job.clients[0], examples=NO_EXAMPLES, remote=ROWS, name=name)
    sent = turn_order("j", "tiny", job_document({}).described(), 64 * "0", client, Profiling(40, 7), None)
    with pytest.raises(ValueError, match="name"):
        client_of(sent)


def test_what_a_terminal_or_a_counter_cannot_take_is_no_message() -> None:
    beat = {"session": 32 * "0", "doing": "training", "worked": 1.0}
    joining = {"session": 32 * "0", "protocol": 2}
    Heartbeat(**beat, done=3, total=4)
    Joining(**joining, version="0.1.0rc1+local.5")
    for more in ({"done": 10**4000}, {"total": 10**4000}, {"done": -1}):
        with pytest.raises(ValidationError):
            Heartbeat(**beat, **more)
    for version in ("\x1b[31m1.0", "1.0\n", "", "1" * 51):
        with pytest.raises(ValidationError):
            Joining(**joining, version=version)


def test_a_survey_comes_out_as_it_went_in() -> None:
    survey = Survey((ClientSurvey(COUNTS, {"no": 4, "yes": 6}), ClientSurvey(ExampleCounts(1, 3, 3), {})))
    assert survey_of(json.loads(json.dumps(survey_document(survey))), 16) == survey


@pytest.mark.parametrize(
    "lie",
    [
        {"examples": -1},
        {"examples": 10**13},
        {"longest": 0},
        {"longest": 17},
        {"tokens": 5},
        {"tokens": 10**9},
        {"tokens": "many"},
        {"classes": {"no": -4, "yes": 14}},
        {"classes": {"no": 4}},
        {"classes": {"x" * 2000: 10}},
        {"classes": {"\x1b[2Jcleared": 10}},
    ],
)
def test_a_survey_that_nobody_can_have_is_refused(lie: dict[str, Any]) -> None:
    honest = {"examples": 10, "longest": 12, "tokens": 90, "classes": {"no": 4, "yes": 6}}
    with pytest.raises(ValueError):  # noqa: PT011  its words are shown to people
        survey_of({"clients": [{**honest, **lie}]}, 16)
    for empty in ({"clients": []}, {}, {"clients": [honest] * 2000}):
        with pytest.raises(ValueError):  # noqa: PT011
            survey_of(empty, 16)
