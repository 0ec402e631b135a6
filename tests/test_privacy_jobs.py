"""Promises of private jobs: the model is what the definition says, resumption draws nothing anew, and a limit is a limit."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from api.app import create_app
from api.service import Service
from chainfed_ray.accountant import Release, epsilon
from chainfed_ray.adapter import Tensors
from chainfed_ray.client import Client, Order, Training, Update
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.coordinator import Coordinator
from chainfed_ray.errors import InvalidJob
from chainfed_ray.job import Job
from chainfed_ray.pool import ClientPool, LocalPool, Outcome
from chainfed_ray.privacy import Noise, _key
from chainfed_ray.records import Record, Result
from cluster.job_store import JobStore
from tests.conftest import a_job
from tests.test_budgets import mixed as mixed
from tests.test_coordinator import Silent, assert_same, run, story

pytestmark = pytest.mark.slow

PRIVACY = {"clip": 0.5, "noise_multiplier": 0.8}
BOTH = pytest.mark.parametrize("where", ["server", "client"])


class Heard:
    """A pool that lets everything pass, and keeps it: what a reader of the messages sees."""

    def __init__(self, pool: ClientPool) -> None:
        self._pool = pool
        self.heard: list[tuple[Client, Training, Update]] = []

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        for place, result in self._pool.run(clients, order, deadline):
            if isinstance(result, Update) and isinstance(order, Training):
                self.heard.append((clients[place], order, result))
            yield Outcome(place, result)

    def close(self) -> None:
        self._pool.close()


class Killed(BaseException):
    """The end of a process, as far as it can be had within one."""


class Dying:
    """A pool whose coordinator dies once ``turns`` turns are taken."""

    def __init__(self, pool: ClientPool, turns: int) -> None:
        self._pool, self._left = pool, turns

    def run(self, clients: Sequence[Client], order: Order, deadline: float) -> Iterator[Outcome]:
        for outcome in self._pool.run(clients, order, deadline):
            if self._left == 0:
                raise Killed
            self._left -= 1
            yield outcome

    def close(self) -> None:
        self._pool.close()


def private(document: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**document, "privacy": {**PRIVACY, **changes}}


def with_secret_of(source: Path, folder: Path) -> Path:
    """A folder for a job that has the secret of another: what else would be the same two times?"""
    folder.mkdir(parents=True)
    (folder / "privacy.key").write_bytes(CommitLog(source).secret())
    return folder


def moved(job: Job, folder: Path, window: range) -> tuple[Tensors, Tensors, Heard]:
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
    """A round, worked out again from what each client sent: uniform weights, one norm, one denominator."""
    document["rounds"] |= {"total": 1, "clients": 4}
    document["chain"] |= {"start": 2}
    document["fleet"]["partition"] = {"scheme": "dirichlet", "alpha": 0.5}
    job = a_job(private(document), tmp_path)
    assert len({len(client.examples) for client in job.clients}) > 1, "counts that must not matter"
    secret = CommitLog(tmp_path / "log").secret()
    before, after, pool = moved(job, tmp_path / "log", range(2, 4))
    assert len(pool.heard) == 4
    names = sorted(pool.heard[0][2].tensors)
    sums = {name: np.zeros(before[name].shape) for name in names}
    norms = []
    for _, _, update in pool.heard:
        changes = {name: (update.tensors[name].double() - before[name].double()).numpy() for name in names}
        norms.append(np.sqrt(sum((change**2).sum() for change in changes.values())))
        for name, change in changes.items():
            sums[name] += change * min(1.0, 0.5 / norms[-1])
    assert max(norms) > 0.5, "something is clipped"
    noise = Noise(0.8 * 0.5, _key(secret, "server", 0))
    for name in names:
        expected = before[name].double().numpy() + (sums[name] + noise.of(name, before[name].shape).numpy()) / 4
        np.testing.assert_allclose(after[name].numpy(), expected, rtol=0, atol=1e-6, err_msg=name)


def test_what_clients_send_is_clipped_and_noised(document: dict[str, Any], tmp_path: Path) -> None:
    """Each update is that of the same job without privacy, clipped, plus the client's own noise; the server takes the mean."""
    document["rounds"] |= {"total": 1, "clients": 4}
    document["chain"] |= {"start": 2}
    _, _, plain = moved(a_job(document, tmp_path / "plain"), tmp_path / "plain-log", range(2, 4))
    job = a_job(private(document, where="client"), tmp_path)
    secret = CommitLog(tmp_path / "log").secret()
    before, after, pool = moved(job, tmp_path / "log", range(2, 4))
    for (client, _, sent), (same, _, trained) in zip(pool.heard, plain.heard, strict=True):
        assert client.name == same.name
        assert client.share
        assert client.share.noise.key == _key(secret, "client", 0, client.name, 2) != secret
        norm = np.sqrt(sum(((tensor - before[name]) ** 2).sum().item() for name, tensor in trained.tensors.items()))
        assert sent.tensors.keys() == trained.tensors.keys()
        for name, tensor in sent.tensors.items():
            clipped = (trained.tensors[name] - before[name]) * min(1.0, 0.5 / norm)
            noise = Noise(0.8 * 0.5 / 2, client.share.noise.key).of(name, tensor.shape)
            torch.testing.assert_close(tensor, before[name] + clipped + noise.float(), rtol=0, atol=1e-5)
    for name in pool.heard[0][2].tensors:
        mean = torch.stack([update.tensors[name] for _, _, update in pool.heard]).mean(0)
        torch.testing.assert_close(after[name], mean, rtol=0, atol=1e-5)


@BOTH
@pytest.mark.parametrize("killed_after", [1, 3])
def test_killed_between_rounds_and_resumed_is_never_killed(
    document: dict[str, Any], tmp_path: Path, where: str, killed_after: int
) -> None:
    job = private(document, where=where)
    resumed = with_secret_of(tmp_path / "a" / "log", tmp_path / "b" / "log")
    first, expected = run(a_job(job, tmp_path / "a"), tmp_path / "a" / "log")

    prepared = a_job(job, tmp_path / "b")
    rounds = Coordinator(prepared, LocalPool(prepared.base), CommitLog(resumed)).rounds()
    for _ in range(killed_after):
        next(rounds)
    rounds.close()
    again, tensors = run(a_job(job, tmp_path / "c"), resumed)
    assert_same(tensors, expected)
    assert story(resumed) == story(tmp_path / "a" / "log")
    assert again.finish().epsilon == first.finish().epsilon


@BOTH
@pytest.mark.parametrize("turns", [2, 3])
def test_a_round_that_is_run_again_has_the_same_noise(
    document: dict[str, Any], tmp_path: Path, where: str, turns: int
) -> None:
    """Killed in the middle of a round: with all its updates there, with some, with none."""
    job = private(document, where=where)
    resumed = with_secret_of(tmp_path / "a" / "log", tmp_path / "b" / "log")
    _, expected = run(a_job(job, tmp_path / "a"), tmp_path / "a" / "log")
    prepared = a_job(job, tmp_path / "b")
    with pytest.raises(Killed):
        run(prepared, resumed, Dying(LocalPool(prepared.base), turns))
    assert len(CommitLog(resumed).rounds()) == turns // 3
    assert_same(run(prepared, resumed)[1], expected)


@BOTH
def test_another_secret_is_another_model_and_another_sample(
    document: dict[str, Any], tmp_path: Path, where: str
) -> None:
    """With the same seed: it tells neither the noise nor who took part."""
    document["fleet"]["clients"][0]["count"] = 12
    document["rounds"] |= {"total": 3, "clients": 2, "quorum": 1}
    job = a_job(private(document, where=where), tmp_path)
    samples, stacks = set(), []
    for name in "abc":
        _, stack = run(job, tmp_path / name)
        stacks.append(stack["head.linear.weight"])
        rounds = CommitLog(tmp_path / name).rounds()
        samples.add(tuple(turn.client for record in rounds for turn in record.turns))
    assert len(samples) > 1
    assert not torch.equal(stacks[0], stacks[1])


@BOTH
def test_epsilon_is_on_record_and_is_that_of_the_library(document: dict[str, Any], tmp_path: Path, where: str) -> None:
    job = a_job(private(document, where=where), tmp_path)
    coordinator, _ = run(job, tmp_path / "log")
    rounds = CommitLog(tmp_path / "log").rounds()
    spent = [record.epsilon for record in rounds]
    assert spent == [epsilon([Release(3 / 4, 0.8)] * (index + 1), 1e-5) for index in range(4)]
    ending = coordinator.finish()
    assert ending.epsilon == spent[-1]
    assert ending.stopped is None
    result = Result.of("tiny", job.classes, coordinator.open(), rounds, ending)
    assert (result.epsilon, result.stopped) == (ending.epsilon, None)
    assert not (tmp_path / "log" / "privacy.key").exists(), "with it, the noise could be taken away"
    assert coordinator.finish() == ending


@BOTH
def test_clients_that_do_not_answer_add_zero(document: dict[str, Any], tmp_path: Path, where: str) -> None:
    """The denominator is that of the job. Noise of the server is all there; that of clients is what was added."""
    document["rounds"] |= {"total": 1, "clients": 4, "quorum": 1}
    job = a_job(private(document, where=where), tmp_path)
    before = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log")).stack().tensors()
    secret = CommitLog(tmp_path / "log").secret()
    pool = Heard(LocalPool(job.base))
    _, after = run(job, tmp_path / "log", Silent(pool, {"phone-0", "phone-1", "phone-3"}))
    (record,) = CommitLog(tmp_path / "log").rounds()
    assert (len(record.turns), len(record.lost)) == (1, 3)
    (_, _, update), name = pool.heard[2], "head.linear.bias"
    change = update.tensors[name].double() - before[name].double()
    if where == "server":
        noise = Noise(0.8 * 0.5, _key(secret, "server", 0)).of(name, change.shape)
        norm = sum(
            (tensor.double() - before[other].double()).square().sum().item() for other, tensor in update.tensors.items()
        )
        change = change * min(1.0, 0.5 / norm**0.5) + noise
    torch.testing.assert_close(after[name].double(), before[name].double() + change / 4, rtol=0, atol=1e-6)
    noise_left = 0.8 if where == "server" else 0.8 / 2
    assert record.epsilon == epsilon([Release(1.0, noise_left)], 1e-5)


def test_narrower_windows_add_zero_to_the_rest(mixed: Job, tmp_path: Path) -> None:
    """Two clients train three adapters, and two train the uppermost; with noise of their own, all send all three."""
    for where in ("server", "client"):
        document = mixed.spec.document() | {"privacy": {**PRIVACY, "noise_multiplier": 0.01, "where": where}}
        job = a_job(document, tmp_path / where)
        pool = Heard(LocalPool(job.base))
        coordinator = Coordinator(job, pool, CommitLog(tmp_path / where / "log"))
        before = coordinator.stack().tensors()
        (record,) = coordinator.rounds()
        assert [turn.bottom for turn in record.turns] == [1, 1, 3, 3]
        lowest = "adapters.1.up.weight"
        assert [lowest in update.tensors for _, _, update in pool.heard] == [
            True,
            True,
            where == "client",
            where == "client",
        ]
        noise = [
            (update.tensors[lowest] - before[lowest]).norm().item()
            for _, _, update in pool.heard
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


@BOTH
@pytest.mark.parametrize("affordable", [1, 2])
def test_a_limit_ends_the_job_in_words_and_the_model_is_kept(
    document: dict[str, Any], tmp_path: Path, where: str, affordable: int
) -> None:
    """In the middle of the first stage, and between two."""
    limit = epsilon([Release(3 / 4, 0.8)] * affordable, 1e-5) + 0.01
    document["rounds"] |= {"quorum": 3}
    job = a_job(private(document, where=where, epsilon=limit), tmp_path)
    coordinator, stack = run(job, tmp_path / "log")
    rounds, ending = CommitLog(tmp_path / "log").rounds(), coordinator.finish()
    assert len(rounds) == ending.rounds == affordable
    assert ending.epsilon == rounds[-1].epsilon == pytest.approx(limit - 0.01)
    assert ending.stopped
    assert ending.stopped.startswith("privacy limit: one more round could take ε to ")
    result = Result.of("tiny", job.classes, coordinator.open(), rounds, ending)
    assert [stage.ended for stage in result.stages] == [ending.stopped if affordable == 1 else "round limit"]
    assert_same(coordinator.model().stack.tensors(), stack)
    again = Coordinator(job, LocalPool(job.base), CommitLog(tmp_path / "log"))
    assert list(again.rounds()) == []
    with pytest.raises(InvalidJob, match=r"privacy\.epsilon is 0\.5; expected .* which the first round may cost"):
        a_job(private(document, where=where, epsilon=0.5), tmp_path)


def test_without_privacy_nothing_of_it_is_there(document: dict[str, Any], tmp_path: Path) -> None:
    """That the bits are those of plain FedAvg is in test_coordinator."""
    coordinator, _ = run(a_job(document, tmp_path), tmp_path / "log")
    assert {record.epsilon for record in CommitLog(tmp_path / "log").rounds()} == {None}
    assert coordinator.finish().epsilon is None
    assert not (tmp_path / "log" / "privacy.key").exists()


@pytest.mark.parametrize("changes", [{"optimizer": "adam"}, {"optimizer": "momentum"}, {"proximal": 0.1}], ids=str)
@BOTH
def test_what_follows_the_noise_costs_nothing(
    document: dict[str, Any], tmp_path: Path, where: str, changes: dict[str, Any]
) -> None:
    document["aggregation"] = changes
    coordinator, _ = run(a_job(private(document, where=where), tmp_path), tmp_path / "log")
    assert coordinator.finish().epsilon == epsilon([Release(3 / 4, 0.8)] * 4, 1e-5)


@BOTH
def test_no_record_and_no_route_shows_the_secret(document: dict[str, Any], tmp_path: Path, where: str) -> None:
    job = a_job(private(document, where=where), tmp_path)
    folder = tmp_path / "log"
    secret = CommitLog(folder).secret()
    coordinator, _ = run(job, folder)
    result = Result.of("tiny", job.classes, coordinator.open(), CommitLog(folder).rounds(), coordinator.finish())
    store = JobStore(f"sqlite:///{tmp_path / 'jobs.db'}")
    try:
        name = store.submit(job.spec).id
        store.move(name, "running")
        records: list[tuple[str, Record]] = [("opening", coordinator.open())]
        records += [(f"round-{record.index}", record) for record in CommitLog(folder).rounds()]
        records.append(("ending", coordinator.finish()))
        for key, record in records:
            store.publish(name, key, key.partition("-")[0], record.model_dump(mode="json"))
        store.move(name, "succeeded", result=result.model_dump(mode="json"))
        with TestClient(create_app(cast("Service", SimpleNamespace(store=store)))) as client:
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
        for key in (secret, *(_key(secret, "client", 0, f"phone-{place}", 1) for place in range(4))):
            for form in (key, key.hex().encode(), base64.b64encode(key), str(int.from_bytes(key)).encode()):
                assert form not in data
