"""Promises of private jobs: the model is what the definition says, resumption draws nothing anew, and a limit is a limit.

Rows are read and dealt once for the file, and one finished job of each kind is what several tests look at.
"""

import base64
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from chainfed_ray.aggregation.privacy import key_of, sampling_seed
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.chain import Window
from chainfed_ray.client.pool import LocalPool
from chainfed_ray.client.privacy import Noise
from chainfed_ray.cluster.jobs.run import run_queued_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.totals import TotalsOfJobs
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import InvalidJob, QuorumLost
from chainfed_ray.federation.cohort import Cohort, Sampler
from chainfed_ray.federation.coordinator import Coordinator
from chainfed_ray.federation.run import in_this_process
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.planning.accountant import Release, epsilon
from chainfed_ray.planning.prepare import PlannedJob, check_fleet
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.result import JobResult
from chainfed_ray.records.rounds import FailedTurn
from chainfed_ray.spec.parse import parse_job
from tests.builders import (
    PRIVACY,
    a_document,
    a_job,
    a_round,
    a_start,
    assert_same,
    like,
    noise_of,
    run,
    story,
    with_secret,
)
from tests.pools import Heard, Killed, Nobody, dying, silent

pytestmark = pytest.mark.slow

ROUNDS = 3  # one of the lower window, two of the upper
BOTH = pytest.mark.parametrize("where", ["server", "client"])


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> PlannedJob:
    """A job of three rounds without privacy."""
    document = a_document(tiny_model_folder, tiny_data)
    document["rounds"]["total"] = ROUNDS
    return a_job(document, tmp_path_factory.mktemp("plain"))


@dataclass(frozen=True)
class Finished:
    """A job that has run; ``secret`` is that of its log, which has erased it."""

    job: PlannedJob
    folder: Path
    coordinator: Coordinator
    tensors: Tensors
    secret: bytes


@pytest.fixture(scope="module", params=["server", "client"])
def finished(request: pytest.FixtureRequest, plain: PlannedJob, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    job = like(plain, folder, privacy={**PRIVACY, "where": request.param})
    secret = CommitLog(folder / "log").secret()
    coordinator, tensors = run(job, folder / "log")
    return Finished(job, folder / "log", coordinator, tensors, secret)


def moved(job: PlannedJob, folder: Path, window: range) -> tuple[Tensors, Tensors, Heard]:
    """The stack before and after a job of one round, and what was heard."""
    coordinator = Coordinator(job, pool := Heard(LocalPool(job.base)), CommitLog(folder))
    before = coordinator.stack().tensors()
    (record,) = coordinator.rounds()
    assert (record.bottom, record.top) == (window.start, window.stop - 1)
    after = coordinator.stack().tensors()
    for name, tensor in before.items():
        trained = name.startswith("head.") or int(name.split(".")[1]) in window
        assert torch.equal(tensor, after[name]) != trained, name
    return before, after, pool


def test_noise_of_the_server_is_what_the_definition_says(document: dict[str, Any], tmp_path: Path) -> None:
    """A round, worked out again from what each client trained: uniform weights, one norm, one denominator.

    A client sends what it trained after it has clipped it, so nobody ever holds an update that was not.
    """
    document["rounds"] |= {"total": 1, "clients": 4}
    document["chain"] |= {"start": 2}
    document["fleet"]["partition"] = {"scheme": "dirichlet", "alpha": 0.5}
    _, _, bare = moved(a_job(document, tmp_path / "bare"), tmp_path / "bare-log", range(2, 4))
    trained = {client.name: update.tensors for client, _, update in bare.updates}
    job = a_job({**document, "privacy": PRIVACY}, tmp_path)
    assert len({len(client.examples) for client in job.clients}) > 1, "counts that must not matter"
    secret = CommitLog(tmp_path / "log").secret()
    before, after, pool = moved(job, tmp_path / "log", range(2, 4))
    assert len(pool.updates) == 4
    names = sorted(pool.updates[0][2].tensors)
    sums = {name: np.zeros(before[name].shape) for name in names}
    norms = []
    for client, _, update in pool.updates:
        assert update.tensors.keys() == trained[client.name].keys()
        changes = {name: (trained[client.name][name].double() - before[name].double()).numpy() for name in names}
        norms.append(np.sqrt(sum((change**2).sum() for change in changes.values())))
        for name, change in changes.items():
            clipped = change * min(1.0, 0.5 / norms[-1])
            sent = (update.tensors[name].double() - before[name].double()).numpy()
            np.testing.assert_allclose(sent, clipped, rtol=0, atol=1e-6, err_msg=name)
            sums[name] += clipped
    assert max(norms) > 0.5, "something is clipped"
    noise = Noise(0.8 * 0.5, key_of(secret, "server", 0))
    for name in names:
        expected = before[name].double().numpy() + (sums[name] + noise_of(noise, name, before[name].shape).numpy()) / 4
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


def test_what_clients_send_is_clipped_and_noised(plain: PlannedJob, tmp_path: Path) -> None:
    """Each update is that of the same job without privacy, clipped, plus the client's own noise; the server takes the mean."""
    changes = {"rounds": {"total": 1, "clients": 4}, "chain": {"start": 2}}
    _, _, bare = moved(like(plain, tmp_path / "bare", **changes), tmp_path / "bare-log", range(2, 4))
    job = like(plain, tmp_path, **changes, privacy={**PRIVACY, "where": "client"})
    secret = CommitLog(tmp_path / "log").secret()
    before, after, pool = moved(job, tmp_path / "log", range(2, 4))
    for (client, _, sent), (same, _, trained) in zip(pool.updates, bare.updates, strict=True):
        assert client.name == same.name
        assert client.privacy
        assert client.privacy.noise
        assert client.privacy.noise.key == key_of(secret, "client", 0, client.name, 2) != secret
        norm = np.sqrt(sum(((tensor - before[name]) ** 2).sum().item() for name, tensor in trained.tensors.items()))
        assert sent.tensors.keys() == trained.tensors.keys()
        for name, tensor in sent.tensors.items():
            clipped = (trained.tensors[name] - before[name]) * min(1.0, 0.5 / norm)
            noise = noise_of(Noise(0.8 * 0.5 / 2, client.privacy.noise.key), name, tensor.shape)
            torch.testing.assert_close(tensor, before[name] + clipped + noise.float(), rtol=0, atol=1e-5)
    for name in pool.updates[0][2].tensors:
        mean = torch.stack([update.tensors[name] for _, _, update in pool.updates]).mean(0)
        torch.testing.assert_close(after[name], mean, rtol=0, atol=1e-5)


def test_killed_and_resumed_is_never_killed(finished: Finished, tmp_path: Path) -> None:
    """In the middle of a round, with an update of it there, and between two rounds: each time with the same noise again."""
    resumed = with_secret(finished.secret, tmp_path / "log")
    job = like(finished.job, tmp_path / "a")
    with pytest.raises(Killed):
        run(job, resumed, dying(LocalPool(job.base), turns=4))
    assert len(CommitLog(resumed).rounds()) == 1
    rounds = Coordinator(job, LocalPool(job.base), CommitLog(resumed)).rounds()
    next(rounds)
    rounds.close()
    again, tensors = run(like(finished.job, tmp_path / "b"), resumed)
    assert_same(tensors, finished.tensors)
    assert story(resumed) == story(finished.folder)
    assert again.finish().epsilon == finished.coordinator.finish().epsilon


def test_another_secret_is_another_model(finished: Finished, tmp_path: Path) -> None:
    """With the same seed and the same sample: the noise is another."""
    job = like(finished.job, tmp_path, rounds={"total": 1, "clients": 4})
    first, second = (run(job, with_secret(bytes([byte] * 32), tmp_path / str(byte)))[1] for byte in (1, 2))
    assert not torch.equal(first["head.linear.weight"], second["head.linear.weight"])


def cohorts(job: PlannedJob, secret: bytes, history: list[Any], count: int) -> list[Cohort]:
    admitted, sampler = [candidate for candidate, _ in job.admitted], Sampler.of(job.spec, sampling_seed(secret))
    window = Window(1, 2)
    return [Cohort.of(sampler, job.planner, admitted, index, window, history) for index in range(count)]


def test_another_secret_is_another_sample(plain: PlannedJob, tmp_path: Path) -> None:
    """With the same seed: it does not tell who took part."""
    job = like(plain, tmp_path, privacy=PRIVACY)
    samples = {
        tuple(tuple(client.name for client in cohort.clients) for cohort in cohorts(job, bytes([byte] * 32), [], 10))
        for byte in (1, 2, 3)
    }
    assert len(samples) == 3


def test_an_excluded_client_is_sampled_all_the_same(plain: PlannedJob, tmp_path: Path) -> None:
    """Else the others were likelier to be, and that somebody was tells of the samples before. Its turn counts as lost."""
    job = like(plain, tmp_path, privacy=PRIVACY)
    gone = FailedTurn(client="phone-1", client_class="phone", reason="it took too much", over_budget=True)
    history = [a_round(0, a_start(), failed_turns=(gone,))]
    before, after = cohorts(job, bytes(32), [], 20), cohorts(job, bytes(32), history, 20)
    assert [cohort.sampled for cohort in after] == [cohort.sampled for cohort in before]
    absent = [(client.name, failure.reason) for cohort in after for client, failure in cohort.absent]
    assert set(absent) == {("phone-1", "the client is excluded: it took too much")}
    assert all("phone-1" not in {client.name for client in cohort.clients} for cohort in after)
    assert len(absent) == sum("phone-1" in {candidate.name for candidate in cohort.sampled} for cohort in before)


def test_epsilon_is_on_record_and_is_that_of_the_library(finished: Finished) -> None:
    coordinator, rounds = finished.coordinator, CommitLog(finished.folder).rounds()
    spent = [record.epsilon for record in rounds]
    assert spent == [epsilon([Release(3 / 4, 0.8)] * (index + 1), 1e-5) for index in range(ROUNDS)]
    job_finished = coordinator.finish()
    assert job_finished.epsilon == spent[-1]
    assert job_finished.stopped is None
    result = JobResult.of("tiny", coordinator.open(), rounds, job_finished)
    assert (result.epsilon, result.stopped) == (job_finished.epsilon, None)
    assert not (finished.folder / "privacy.key").exists(), "with it, the noise could be taken away"
    assert coordinator.finish() == job_finished


@BOTH
def test_clients_that_do_not_answer_add_zero(plain: PlannedJob, tmp_path: Path, where: str) -> None:
    """The denominator is that of the job, and all noise is there: of clients, the server adds what is missing."""
    rounds = {"total": 1, "clients": 4, "quorum": 2}
    job = like(plain, tmp_path, rounds=rounds, privacy={**PRIVACY, "where": where})
    before = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).stack().tensors()
    secret = CommitLog(tmp_path / "log").secret()
    pool = Heard(LocalPool(job.base))
    _, after = run(job, tmp_path / "log", silent(pool, {"phone-0", "phone-1", "phone-3"}))
    (record,) = CommitLog(tmp_path / "log").rounds()
    assert (len(record.turns), len(record.failed_turns)) == (1, 3)
    assert record.counted, "that a round was not released would tell who was sampled"
    (_, _, update), name = pool.updates[2], "head.linear.bias"
    change = update.tensors[name].double() - before[name].double()
    missing = 0.8 * 0.5
    if where == "server":
        norm = sum(
            (tensor.double() - before[other].double()).square().sum().item() for other, tensor in update.tensors.items()
        )
        change = change * min(1.0, 0.5 / norm**0.5)
    else:
        missing *= (3 / 4) ** 0.5
    change = change + noise_of(Noise(missing, key_of(secret, "server", 0)), name, change.shape)
    torch.testing.assert_close(after[name].double(), before[name].double() + change / 4, rtol=0, atol=1e-6)
    assert record.epsilon == epsilon([Release(1.0, 0.8)], 1e-5)


@BOTH
def test_a_round_that_nobody_answers_is_released_and_priced(plain: PlannedJob, tmp_path: Path, where: str) -> None:
    """Three of them in a row end the job, as without privacy."""
    job = like(plain, tmp_path, rounds={"total": 9}, privacy={**PRIVACY, "where": where})
    coordinator = Coordinator(job, Nobody(), log := CommitLog(tmp_path / "log"))
    stacks = [coordinator.stack().tensors()["head.linear.weight"]]
    rounds = coordinator.rounds()
    for _ in range(3):
        next(rounds)
        stacks.append(coordinator.stack().tensors()["head.linear.weight"])
    with pytest.raises(QuorumLost, match="rounds 1 to 3: fewer than 2 clients answered"):
        next(rounds)
    for first, second in pairwise(stacks):
        assert (first != second).all()
    assert [record.counted for record in log.rounds()] == [True] * 3
    assert [record.epsilon for record in log.rounds()] == [
        epsilon([Release(3 / 4, 0.8)] * count, 1e-5) for count in (1, 2, 3)
    ]


def test_narrower_windows_add_zero_to_the_rest(mixed: PlannedJob, tmp_path: Path) -> None:
    """Two clients train three adapters, and two train the uppermost; with noise of their own, all send all three."""
    for where in ("server", "client"):
        job = like(mixed, tmp_path / where, privacy={**PRIVACY, "noise_multiplier": 0.01, "where": where})
        pool = Heard(LocalPool(job.base))
        coordinator = Coordinator(job, pool, CommitLog(tmp_path / where / "log"))
        before = coordinator.stack().tensors()
        (record,) = coordinator.rounds()
        assert [turn.bottom for turn in record.turns] == [1, 1, 3, 3]
        lowest = "adapters.1.up.weight"
        assert [lowest in update.tensors for _, _, update in pool.updates] == [
            True,
            True,
            where == "client",
            where == "client",
        ]
        noise = [
            (update.tensors[lowest] - before[lowest]).norm().item()
            for _, _, update in pool.updates
            if lowest in update.tensors
        ]
        if where == "client":
            # Of two that did not train it: their noise alone, 0.01 · 0.5 / 2 a value.
            assert noise[2:] == pytest.approx([0.0025 * before[lowest].numel() ** 0.5] * 2, rel=0.02)
        after = coordinator.stack().tensors()[lowest]
        # No more than two clients' clipped changes over four, and the noise.
        assert (after - before[lowest]).norm() < 2 * 0.5 / 4 + 2 * 0.01 * 0.5 / 4 * before[lowest].numel() ** 0.5
        for turn in record.turns:
            assert turn.peak_bytes is None or turn.peak_bytes <= turn.planned_bytes


def test_a_job_with_a_limit_is_one_of_as_many_rounds_as_it_allows(plain: PlannedJob, tmp_path: Path) -> None:
    """Its stages, its rates, its last window: bit for bit those of a job that asks for so many rounds."""
    limit = epsilon([Release(3 / 4, 0.8)] * 2, 1e-5) + 0.01
    jobs = {
        "limited": like(plain, tmp_path / "a", rounds={"total": 40}, privacy={**PRIVACY, "epsilon": limit}),
        "short": like(plain, tmp_path / "b", rounds={"total": 2}, privacy=PRIVACY),
    }
    ran = {name: run(job, with_secret(bytes(32), tmp_path / name)) for name, job in jobs.items()}
    assert_same(ran["limited"][1], ran["short"][1])
    assert story(tmp_path / "limited") == story(tmp_path / "short")
    (coordinator, stack), job = ran["limited"], jobs["limited"]
    rounds, job_finished = CommitLog(tmp_path / "limited").rounds(), coordinator.finish()
    assert coordinator.open().total_rounds == len(rounds) == job_finished.rounds == 2
    assert [(record.top, record.ended) for record in rounds] == [(2, "round limit"), (3, "round limit")]
    assert job_finished.epsilon == rounds[-1].epsilon == pytest.approx(limit - 0.01)
    assert job_finished.stopped
    assert job_finished.stopped.startswith("privacy limit: one more round could take ε to ")
    assert JobResult.of("tiny", coordinator.open(), rounds, job_finished).stopped == job_finished.stopped
    assert ran["short"][0].finish().stopped is None
    assert_same(coordinator.models()["last"].stack.tensors(), stack)
    assert list(Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "limited")).rounds()) == []


def test_a_limit_below_the_first_round_is_refused(plain: PlannedJob, tmp_path: Path) -> None:
    job = like(plain, tmp_path, privacy={**PRIVACY, "epsilon": 0.5})
    with pytest.raises(InvalidJob, match=r"privacy\.epsilon is 0\.5; expected .* or more: the first round costs that"):
        check_fleet(job)


def test_who_can_take_part_may_not_change_meanwhile(plain: PlannedJob, tmp_path: Path) -> None:
    """Samples, and with them their price, follow from who is admitted."""
    Coordinator(plain, Nobody(), CommitLog(tmp_path)).open()
    fewer = replace(plain, admission=replace(plain.admission, admitted=plain.admitted[1:]))
    with pytest.raises(
        InvalidJob, match=r"fleet\.clients is '3 that can take part'; .*missing now: phone-0; new: none"
    ):
        Coordinator(fewer, Nobody(), CommitLog(tmp_path)).open()
    assert Coordinator(plain, Nobody(), CommitLog(tmp_path)).open().taking_part == 4


def test_without_privacy_nothing_of_it_is_there(plain: PlannedJob, tmp_path: Path) -> None:
    """That the bits are those of plain FedAvg is in test_coordinator."""
    coordinator, _ = run(like(plain, tmp_path, rounds={"total": 1}), tmp_path / "log")
    assert {record.epsilon for record in CommitLog(tmp_path / "log").rounds()} == {None}
    assert coordinator.finish().epsilon is None
    assert not (tmp_path / "log" / "privacy.key").exists()


@pytest.mark.parametrize("changes", [{"optimizer": "adam"}, {"optimizer": "momentum"}, {"proximal": 0.1}], ids=str)
def test_what_follows_the_noise_costs_nothing(plain: PlannedJob, tmp_path: Path, changes: dict[str, Any]) -> None:
    job = like(plain, tmp_path, rounds={"total": 1}, aggregation=changes, privacy=PRIVACY)
    coordinator, _ = run(job, tmp_path / "log")
    assert coordinator.finish().epsilon == epsilon([Release(3 / 4, 0.8)], 1e-5)


def test_a_job_that_failed_in_the_service_keeps_no_secret(plain: PlannedJob, tmp_path: Path) -> None:
    """It is final there: no round of it is run again."""
    document = plain.spec.document() | {"data": {"train": f"path:{tmp_path / 'gone.jsonl'}"}}
    storage = Storage.at(tmp_path)
    store = JobStore(storage.database)
    try:
        job = store.submit(parse_job(document)).id
        store.move(job, "running")
        with_secret(bytes(32), storage.job(job))
        run_queued_job(job, storage, in_this_process)
        assert store.get(job).status == "failed"
    finally:
        store.close()
    assert not (storage.job(job) / "privacy.key").exists()


def test_no_record_and_no_route_shows_the_secret(finished: Finished, tmp_path: Path) -> None:
    job, folder, coordinator, secret = finished.job, finished.folder, finished.coordinator, finished.secret
    result = JobResult.of("tiny", coordinator.open(), CommitLog(folder).rounds(), coordinator.finish())
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    try:
        name = store.submit(job.spec).id
        store.move(name, "running")
        records: list[tuple[str, Record]] = [("started", coordinator.open())]
        records += [(f"round-{record.index}", record) for record in CommitLog(folder).rounds()]
        records.append(("finished", coordinator.finish()))
        for key, record in records:
            store.publish(name, key, key.partition("-")[0], record.model_dump(mode="json"))
        store.move(name, "succeeded", result=result.model_dump(mode="json"))
        with TestClient(
            create_app(cast("Service", SimpleNamespace(store=store, totals={None: TotalsOfJobs(store)}))),
            "http://localhost",
        ) as client:
            answers = [
                client.get(path) for path in ("/v1/jobs", f"/v1/jobs/{name}", f"/v1/jobs/{name}/events", "/metrics")
            ]
    finally:
        store.close()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert answers[1].json()["result"]["epsilon"] == coordinator.finish().epsilon
    assert f'chainfed_epsilon{{job="{name}"}}' in answers[3].text
    kept = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    for data in [answer.content for answer in answers] + kept:
        for key in (secret, *(key_of(secret, "client", 0, f"phone-{place}", 1) for place in range(4))):
            for form in (key, key.hex().encode(), base64.b64encode(key), str(int.from_bytes(key)).encode()):
                assert form not in data
