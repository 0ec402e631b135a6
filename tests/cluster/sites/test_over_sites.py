"""Whole jobs over sites that keep their rows: real processes at the sites, on a real cluster."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoTokenizer

from chainfed_ray.activity import SILENT, Activity, Listener, no_listener
from chainfed_ray.aggregation.discriminant import candidates
from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import ClassSums, grid_losses
from chainfed_ray.client.messages import Update
from chainfed_ray.client.survey import Absence, Survey
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.sites.desk import Desk
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.data.examples import examples_of_site, rows_of_site, splits_of_site
from chainfed_ray.errors import SiteRefused
from chainfed_ray.evaluation.early_exit import pooled_features, predict_early_exit
from chainfed_ray.evaluation.score import ScoreSums
from chainfed_ray.federation.run import run_job
from chainfed_ray.federation.state import stack_of
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.source import ModelSource
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.fleet import clients_in
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.site.connection import Connection
from chainfed_ray.site.policy import Policy
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.spec.parse import parse_job
from tests.builders import a_start
from tests.sites import SitesService, a_service
from tests.watching import command_of, wait_for

pytestmark = pytest.mark.slow
SITES = ("north", "east", "south", "west")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sites")


@pytest.fixture(scope="module")
def storage(folder: Path) -> Storage:
    return Storage.at(folder / "storage")


@pytest.fixture(scope="module")
def leave() -> dict[str, Callable[[], None]]:
    """What makes each of the four sites leave."""
    return {}


@pytest.fixture(scope="module")
def service(storage: Storage, folder: Path, rows: None, leave: dict[str, Callable[[], None]]) -> Iterator[SitesService]:
    """A service that four sites have joined. A test may let others join."""
    store = JobStore(storage.database)
    with a_service(storage, store, folder) as made:
        for site in SITES:
            leave[site] = made.join(site, folder / "rows" / site)
        yield made
    store.close()


def rows_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(tiny_data: Path, folder: Path) -> None:
    """Rows as files: those that the server deals, those that it holds out, and at each site every fourth of the former."""
    every = rows_of(tiny_data)
    files = {"train": every[:96], "validation": every[96:108], "test": every[108:]}
    files |= {f"rows/{site}/notes": every[place:96:4] for place, site in enumerate(SITES)}
    for name, part in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))


@pytest.fixture
def dealt(document: dict[str, Any], folder: Path, rows: None) -> dict[str, Any]:
    """A job whose held-out rows are files of their own. It trains on rows that the server deals."""
    document["data"] |= {name: f"path:{folder / name}.jsonl" for name in ("train", "validation", "test")}
    document["chain"] |= {"head": "fitted"}
    document["rounds"] |= {"total": 2, "clients": 3}
    return document


def over(sites: Sequence[str], dealt: dict[str, Any]) -> dict[str, Any]:
    """The same job over sites."""
    document = json.loads(json.dumps(dealt))
    del document["data"]["train"]
    document["fleet"]["clients"] = [
        {"name": f"at-{site}", "memory": "64MiB", "site": site, "data": "site:notes.jsonl"} for site in sites
    ]
    return document


def one_round(sites: Sequence[str], dealt: dict[str, Any], **rounds: Any) -> dict[str, Any]:
    """A job of one round over two sites, without a fitted head."""
    document = over(sites, dealt)
    document["chain"] |= {"head": "zero"}
    document["rounds"] |= {"total": 1, "clients": 2, "quorum": 1, **rounds}
    return document


def every_fourth(labels: np.ndarray, groups: object, clients: int, seed: int) -> list[np.ndarray]:
    return [np.arange(place, len(labels), clients) for place in range(clients)]


def run(document: dict[str, Any], job: str, storage: Storage, listen: Listener = no_listener) -> list[Record]:
    """The records of a job whose clients run at sites."""
    desk = Desk(job, storage)
    return list(
        run_job(
            parse_job(document),
            storage.job(job),
            pool=lambda source, note: RayPool(source, 2, note, silence=60, at_site=desk.lease),
            sites=desk,
            listen=listen,
        )
    )


def rounds(records: list[Record]) -> list[Round]:
    return [record for record in records if isinstance(record, Round)]


def leaks(sent: bytes, rows: list[dict[str, Any]], tokenizer: Any, classes: list[str]) -> list[str]:
    """What of ``rows`` is in the bytes ``sent``: a text, the tokens of one, or the labels of several rows in their order.

    Numbers are looked for as JSON writes them, and as integers of 32 and 64 bits.
    """
    found = []
    for row in rows:
        words, tokens = row["text"].split(), tokenizer(row["text"])["input_ids"]
        found += [row["text"]] if " ".join(words[:2]).encode() in sent else []
        found += [f"tokens of {row['text']!r}"] if any(form in sent for form in forms(tokens[:4])) else []
    labels = [row["label"] for row in rows]
    numbers = [classes.index(label) for label in labels]
    if any(form in sent for form in [*forms(numbers[:12]), json.dumps(labels[:4]).encode()]):
        found.append("labels")
    return found


def forms(numbers: list[int]) -> list[bytes]:
    arrays = [np.array(numbers, dtype=kind).tobytes() for kind in ("<i4", "<i8")]
    return [*arrays, json.dumps(numbers)[1:-1].encode(), json.dumps(numbers, separators=(",", ":"))[1:-1].encode()]


def test_a_job_over_sites_has_the_bits_of_one_whose_rows_the_server_deals_and_no_row_crosses(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    alone = list(run_job(parse_job(dealt), tmp_path / "alone", partition=every_fourth))
    records = run(over(SITES, dealt), "job-1", storage)

    assert [turn.loss for one in rounds(records) for turn in one.turns] == [
        turn.loss for one in rounds(alone) for turn in one.turns
    ]
    ours, theirs = (CommitLog(folder).tensors(1) for folder in (storage.job("job-1"), tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(records[-1], JobFinished)

    classes, tokenizer = ["sea", "sky", "soil"], AutoTokenizer.from_pretrained(dealt["model"]["base"][5:])
    for site in SITES:
        rows = rows_of(folder / "rows" / site / "notes.jsonl")
        assert leaks(service.wire.bytes, rows, tokenizer, classes) == []
        # The search finds what it looks for: a message that quotes a row, tokens as numbers, labels in their order.
        quoted = service.wire.bytes + json.dumps({"reason": f"row 3 is {rows[3]['text']!r}"}).encode()
        assert set(leaks(quoted, rows, tokenizer, classes)) == {rows[3]["text"]}
        tokens = np.array(tokenizer(rows[5]["text"])["input_ids"], dtype="<i4").tobytes()
        assert leaks(service.wire.bytes + tokens, rows, tokenizer, classes)
        labels = json.dumps([classes.index(row["label"]) for row in rows]).encode()
        assert leaks(service.wire.bytes + labels, rows, tokenizer, classes) == ["labels"]
        # The site's own transcript has every request, and people can read it.
        lines = [json.loads(line) for line in (folder / f"{site}.log").read_text().splitlines()]
        assert {line["path"].rpartition("/")[2] for line in lines} >= {"session", "next", "tensors", "answer"}

    # When the job is over, the sites are told, and delete what they kept of it.
    caches = [cache for site in SITES for cache in (folder / f"site-{site}").glob("slots-*/0/job-1")]
    assert len(caches) == len(SITES)
    service.mailbox.forget("job-1")
    wait_for(lambda: not any(cache.exists() for cache in caches), "end of the caches", 60)


def test_a_site_that_is_killed_in_a_turn_is_replaced_and_its_turn_is_taken(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    document = one_round(["mortal", "east"], dealt, local_steps=600, quorum=2)
    process = service.process("mortal", folder / "rows" / "north")
    with ThreadPoolExecutor() as executor:
        job = executor.submit(run, document, "job-2", storage)
        wait_for(lambda: service.wire.has("mortal", "/heartbeat") or job.done(), "turn at the site")
        workers = psutil.Process(process.pid).children(recursive=True)
        assert workers
        assert not any("CHAINFED_SITE_KEY" in worker.environ() for worker in workers), "the key is for its parent alone"
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(command_of, workers)), "end of the workers", 30)
        service.process("mortal", folder / "rows" / "north")
        records = job.result()
    assert [len(one.turns) for one in rounds(records)] == [2]


def test_a_coordinator_that_is_made_again_finds_the_answers_of_its_orders(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, leave: dict[str, Callable[[], None]]
) -> None:
    """Two of the four sites leave for good, and nobody asks them again."""
    document = one_round(["north", "south"], dealt)
    once = run(document, "job-3", storage)
    for site in ("north", "south"):
        leave[site]()
    commits = [path for path in storage.job("job-3").iterdir() if path.name != "sites"]
    for path in commits:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = run(document, "job-3", storage)
    assert [turn.loss for one in rounds(again) for turn in one.turns] == [
        turn.loss for one in rounds(once) for turn in one.turns
    ]


def test_a_site_that_refuses_is_on_record_in_words_and_sites_and_simulated_clients_go_on_together(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    document = one_round(["picky", "parted"], dealt, clients=5, quorum=5)
    document["data"]["train"] = dealt["data"]["train"]
    document["fleet"]["clients"].insert(1, {"name": "phone", "count": 2, "memory": "64MiB"})
    service.join("picky", folder / "rows" / "north", Policy(("*",), memory=2**20))
    service.join("parted", folder / "rows" / "east", parts=3)
    started, one, *_ = run(document, "job-4", storage)
    assert isinstance(started, JobStarted)
    assert isinstance(one, Round)
    taking_part = [client.client for client in clients_in(storage.job("job-4"))]
    assert taking_part == ["phone-0", "phone-1", "at-parted-0", "at-parted-1", "at-parted-2"]
    assert [turn.client for turn in one.turns] == taking_part
    assert [turn.examples for turn in one.turns] == [48, 48, 8, 8, 8]
    assert [client.reason for client in started.excluded] == [
        "site picky takes no part: it gives a client at most 1MiB; the job asks for 64MiB"
    ]


def test_a_site_that_does_not_come_is_named_while_it_is_waited_for(
    service: SitesService, dealt: dict[str, Any], storage: Storage
) -> None:
    spec = parse_job(one_round(["absent", "prompt"], dealt, deadline="3s"))
    service.liar("prompt", [])
    heard = list[Activity]()
    desk, base = Desk("job-5", storage), Path(spec.model.base[5:])
    found = desk.survey(spec, base, heard.append)
    assert isinstance(found["at-prompt"], Survey)
    assert found["at-absent"] == Absence("it did not answer within 3 s", may_come=True)
    assert "not joined: absent" in [activity.note for activity in heard]

    # It comes later, and its answer is there before a round. A coordinator that is made again finds the answer as well.
    assert desk.late(()) == {}
    service.liar("absent", [])
    wait_for(lambda: desk.late(()), "answer of the site")
    assert desk.late(()) == {"at-absent": found["at-prompt"]}
    assert desk.late({"at-absent"}) == {}
    CommitLog(storage.job("job-5")).commit_started(a_start())
    again = Desk("job-5", storage)
    assert again.survey(spec, base, no_listener) == found, "those with which the job began"
    assert again.late(()) == {"at-absent": found["at-prompt"]}


def test_a_process_with_the_key_of_another_site_is_refused_and_ends_no_other(service: SitesService) -> None:
    before = service.mailbox.sessions({"east"})
    mistaken = Connection(service.address, "east", 32 * "e", Transcript(None), Event(), print)
    with closing(mistaken), pytest.raises(SiteRefused, match="the key is that of site east, not of west"):
        mistaken.join("1.0", "west")
    assert service.mailbox.sessions({"east"}) == before
    assert before["east"]


LIES: dict[str, Callable[[Update], Update]] = {
    "NaN": lambda update: replace(update, tensors={name: t * torch.nan for name, t in update.tensors.items()}),
    "shapes": lambda update: replace(update, tensors={name: t.flatten()[:1] for name, t in update.tensors.items()}),
    "names": lambda update: replace(update, tensors={f"x.{name}": t for name, t in update.tensors.items()}),
    "steps": lambda update: replace(update, steps=-1),
    "seconds": lambda update: replace(update, cpu_seconds=1e30),
    "loss": lambda update: replace(update, loss=math.inf),
}


def test_an_answer_that_lies_costs_its_turn_alone(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    """The liar answers each round's order with another lie; east is honest."""
    document = one_round(["liar", "east"], dealt, total=len(LIES))
    service.liar("liar", list(LIES.values()))
    found = rounds(run(document, "job-6", storage))
    assert len(found) == len(LIES)
    for one in found:
        assert [turn.client for turn in one.turns] == ["at-east-0"]
        assert [failed.client for failed in one.failed_turns] == ["at-liar-0"]
        assert "was refused" in one.failed_turns[0].reason


def test_sites_evaluate_on_rows_that_they_hold_out_and_the_server_has_none(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    document = one_round(["secretive", "east"], dealt, total=2)
    del document["data"]["validation"], document["data"]["test"]
    document["data"]["classes"] = ["sea", "sky", "soil"]
    document["evaluation"] = {"rows": "sites", "whole_every": "round"}
    service.join("secretive", folder / "rows" / "north", tells_classes=False)
    records = run(document, "job-7", storage)
    finished = records[-1]
    assert isinstance(finished, JobFinished)
    assert finished.evaluation

    # The same, computed here: each site holds out the rows that ``splits_of_site`` says.
    spec, tokens = parse_job(document), AutoTokenizer.from_pretrained(document["model"]["base"][5:])
    log = CommitLog(storage.job("job-7"))
    stack = stack_of(log.tensors(log.rounds()[-1].index))
    parts = []
    for site in ("north", "east"):
        rows = rows_of_site(spec.model, spec.data, f"path:{folder / 'rows' / site / 'notes.jsonl'}")
        test = splits_of_site(spec.evaluation, spec.seed, rows).test
        numbers = np.array([("sea", "sky", "soil").index(label) for label in test.labels])
        held_out = replace(examples_of_site(spec.model, spec.data, spec.evaluation, tokens, test), labels=numbers)
        base = ModelSource(Path(document["model"]["base"][5:]), torch.float32, tmp_path / "here" / site)
        predictions = predict_early_exit(held_out, base, base.scratch / "test", stack, Window(3, 3), SILENT)
        parts.append(ScoreSums.of(predictions, held_out.labels, 3))
    total = ScoreSums.total(parts, 3)
    assert finished.evaluation.loss == total.score.loss
    assert (finished.accuracy, finished.evaluation.macro_f1) == (total.score.accuracy, total.macro_f1)
    assert [(one.client, one.examples, one.loss) for one in finished.evaluation.clients] == [
        (name, part.examples, part.score.loss)
        for name, part in zip(("at-secretive-0", "at-east-0"), parts, strict=True)
    ]
    assert all(one.held_out_loss is not None and one.evaluation for one in rounds(records))


def test_a_head_is_fitted_without_a_row_of_the_server(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, folder: Path, tmp_path: Path
) -> None:
    """The classifier has the least loss of all that the sites were asked to try, on their rows together."""
    document = over(["east", "west"], dealt)
    del document["data"]["validation"], document["data"]["test"]
    document["evaluation"] = {"rows": "sites"}
    document["rounds"] |= {"total": 1, "clients": 2, "quorum": 2}
    spec, (one,) = parse_job(document), rounds(run(document, "job-8", storage))
    assert one.head_fit

    tokens, base = AutoTokenizer.from_pretrained(spec.model.base[5:]), Path(spec.model.base[5:])
    trained = stack_of(CommitLog(storage.job("job-8")).tensors(0))
    new, window = AdapterStack.new(range(1, 4), 32, 8, 3, 0, trained.head_layers), Window(1, 2)
    assert new.head
    total, held_out = ClassSums.zeros(3, new.head.features(2), torch.float64), []
    for site in ("east", "west"):
        rows = rows_of_site(spec.model, spec.data, f"path:{folder / 'rows' / site / 'notes.jsonl'}")
        splits = splits_of_site(spec.evaluation, spec.seed, rows)
        for split in (splits.train, splits.validation):
            numbers = np.array([("sea", "sky", "soil").index(label) for label in split.labels])
            examples = replace(examples_of_site(spec.model, spec.data, spec.evaluation, tokens, split), labels=numbers)
            source = ModelSource(base, torch.float32, tmp_path / site)
            means, labels = pooled_features(examples, source, tmp_path / site / str(len(examples)), new, window)
            features = layer_norm(means, means.shape[-1:]).flatten(1)
            if split is splits.validation:
                held_out.append((features, labels))
            else:
                total.count(features.double(), labels)
    features, labels = (torch.cat(part) for part in zip(*held_out, strict=True))
    tried = [grid_losses(weight, bias, features, labels)[0] for weight, bias in candidates(total)]
    assert one.head_fit.held_out_loss == pytest.approx(min(map(min, tried)) / len(labels), rel=1e-3)
