"""Promises of clipping and noise: how far one client can move the sum, and what the noise is."""

import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from chainfed_ray.aggregation.privacy import PrivateMean, client_privacy, private_mean, sampling_seed
from chainfed_ray.api.report.progress import ProgressDisplay
from chainfed_ray.api.report.results import results
from chainfed_ray.chain import Window
from chainfed_ray.client.privacy import Noise, clip_factor
from chainfed_ray.errors import CorruptCommit, InvalidJob
from chainfed_ray.model.adapters import Tensors
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.spec.sections import PrivacySpec
from tests.builders import FINISHED, SPEC, a_console, a_round, a_start, noise_of, told

SECRET = bytes(range(32))
SERVER, CLIENT = (
    PrivacySpec(clip=2.0, noise_multiplier=0.5, where="server"),
    PrivacySpec(clip=2.0, noise_multiplier=0.5, where="client"),
)
WINDOW = Window(1, 2)
NONE = Noise(0.0, SECRET)

values = st.floats(-1e3, 1e3, width=32)
updates = st.lists(values, min_size=5, max_size=5).map(
    lambda found: {"a": torch.tensor(found[:3]), "b": torch.tensor(found[3:])}
)
bounds = st.floats(1e-3, 1e3)
START = {"a": torch.tensor([1.0, -2.0, 0.5]), "b": torch.tensor([0.25, 4.0])}


def flat(tensors: Tensors) -> np.ndarray:
    return np.concatenate([tensors[name].double().numpy().ravel() for name in sorted(tensors)])


@pytest.mark.slow
@given(updates, bounds)
def test_all_tensors_are_clipped_together(update: Tensors, bound: float) -> None:
    change = flat(update) - flat(START)
    norm = np.linalg.norm(change)
    plain = change * min(1.0, bound / norm) if norm else change
    factor = clip_factor(START, update, bound)
    np.testing.assert_allclose(change * factor, plain, rtol=1e-12)
    assert np.linalg.norm(change * factor) <= bound * (1 + 1e-12)
    assert factor == 1 or norm > bound


@pytest.mark.slow
@given(st.lists(updates, min_size=1, max_size=4), updates, st.integers(1, 1000), bounds, st.integers(4, 9))
def test_a_client_moves_the_sum_by_c_and_one_that_is_replaced_by_2c(
    others: list[Tensors], other: Tensors, examples: int, bound: float, clients: int
) -> None:
    """Whatever it sends, however many examples it has, and whoever else answers."""

    def summed(found: list[Tensors]) -> np.ndarray:
        mean = PrivateMean({name: tensor.double() for name, tensor in START.items()}, clients, bound, NONE)
        for update in found:
            mean.add(0, update, examples)
        moved = {name: mean.moved(name) for name in START}
        return (flat(moved) - flat(START)) * clients

    slack = 1e-9 * (1 + bound)
    assert np.linalg.norm(summed(others) - summed(others[:-1])) <= bound + slack
    assert np.linalg.norm(summed(others) - summed([*others[:-1], other])) <= 2 * bound + slack


def test_the_denominator_is_fixed_and_weights_are_alike() -> None:
    mean = PrivateMean(START, 10, clip=100.0, noise=NONE)
    for examples in (1, 500):
        mean.add(0, {name: tensor + 1 for name, tensor in START.items()}, examples)
    for name, tensor in mean.result().items():
        torch.testing.assert_close(tensor, START[name] + 0.2)


def test_a_narrower_window_adds_zero_to_the_rest() -> None:
    mean = PrivateMean(START, 2, clip=1.0, noise=NONE)
    mean.add(0, {"b": START["b"] + torch.tensor([3.0, 4.0])}, 1)  # a change of norm 5
    result = mean.result()
    assert torch.equal(result["a"], START["a"])
    torch.testing.assert_close(result["b"], START["b"] + torch.tensor([0.3, 0.4]))


def test_every_tensor_of_the_stage_gets_noise() -> None:
    """Else its absence would tell that nobody with a wide window was sampled."""
    result = private_mean(SERVER, SECRET, 0, START, 4).result()
    assert result.keys() == START.keys()
    assert all((tensor != START[name]).all() for name, tensor in result.items())


@pytest.mark.slow
@pytest.mark.parametrize("answering", [5, 3, 0])
def test_noise_has_the_deviation_that_was_asked_for(answering: int) -> None:
    """z·C on the sum, either way and whoever answers: over many rounds, of one value without any update."""
    start, rounds, clients = {"x": torch.zeros(50)}, 400, 5
    server = torch.stack([private_mean(SERVER, SECRET, index, start, clients).result()["x"] for index in range(rounds)])
    from_clients = []
    for index in range(rounds):
        mean = private_mean(CLIENT, SECRET, index, start, clients)
        for place in range(answering):
            share = client_privacy(CLIENT, SECRET, index, f"phone-{place}", WINDOW, clients)
            mean.add(place, share.applied(start, {}), 1)
        from_clients.append(mean.result()["x"])
    for drawn in (server, torch.stack(from_clients)):
        summed = drawn.double().numpy().ravel() * clients
        wanted = CLIENT.noise_multiplier * CLIENT.clip
        chi = (summed**2).sum() / wanted**2
        assert 1e-6 < stats.chi2.cdf(chi, len(summed)) < 1 - 1e-6


def test_every_key_is_its_own() -> None:
    """Of a round, a client, a window, the server and the sampling; and none of them is the secret."""
    shares = [
        client_privacy(CLIENT, SECRET, index, client, window, 5)
        for index in (0, 1)
        for client in ("phone-0", "phone-1")
        for window in (Window(1, 2), Window(2, 2))
    ]
    servers = [private_mean(SERVER, SECRET, index, START, 5).noise for index in (0, 1)]
    keys = [share.noise.key for share in shares if share.noise] + [noise.key for noise in servers] + [SECRET]
    assert len(set(keys)) == 8 + 2 + 1
    assert sampling_seed(SECRET) not in {int.from_bytes(key) for key in keys}
    assert client_privacy(CLIENT, SECRET, 0, "phone-0", WINDOW, 5) == shares[0], (
        "a round that is run again has the same noise"
    )


@pytest.mark.slow
@given(updates)
def test_a_client_clips_and_sends_noise_for_what_it_did_not_train(update: Tensors) -> None:
    share = client_privacy(CLIENT, SECRET, 0, "phone-0", WINDOW, 4)
    sent = share.applied(START, {"b": update["b"]})
    change = flat({"b": update["b"]}) - flat({"b": START["b"]})
    norm = np.linalg.norm(change)
    clipped = change * min(1.0, CLIENT.clip / norm) if norm else change
    expected = {name: START[name].double() + noise_of(share.noise, name, START[name].shape) for name in START}
    expected["b"] += torch.from_numpy(clipped)
    np.testing.assert_allclose(flat(sent), flat(expected), rtol=1e-6, atol=1e-6)
    assert {tensor.dtype for tensor in sent.values()} == {torch.float32}
    assert share.noise
    assert share.noise.deviation == pytest.approx(0.5 * 2.0 / math.sqrt(4))


def test_the_secret_is_drawn_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret = CommitLog(tmp_path).secret()
    finally:
        os.umask(before)
    path = tmp_path / "privacy.key"
    assert len(secret) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert CommitLog(tmp_path).secret() == secret
    assert CommitLog(tmp_path / "other").secret() != secret
    assert not list(tmp_path.glob("*.partial"))
    CommitLog(tmp_path).erase_secret()
    assert not path.exists()


def test_a_secret_that_is_lost_or_damaged_is_not_drawn_again(tmp_path: Path) -> None:
    log = CommitLog(tmp_path)
    log.secret()
    (tmp_path / "privacy.key").write_bytes(b"short")
    with pytest.raises(CorruptCommit, match="not what was written"):
        log.secret()
    log.commit_round(a_round(0, a_start()), {"x": torch.zeros(1)})
    (tmp_path / "privacy.key").unlink()
    with pytest.raises(CorruptCommit, match="missing, though rounds were committed"):
        log.secret()


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        (
            {"aggregation": {"rule": "median"}},
            "aggregation.rule",
            "'mean': the privacy accountant covers no other rule",
        ),
        ({"chain": {"start": "auto"}}, "chain.start", "the index of a layer: privacy does not cover what clients send"),
        ({"chain": {"head": "fitted"}}, "chain.head", "'zero': privacy does not cover the sums"),
        ({"privacy": {"delta": 0.25}}, "privacy.delta", "less than 1/"),
        ({"privacy": {"clip": 0}}, "privacy.clip", "greater than 0"),
        ({"privacy": {"noise_multiplier": 0}}, "privacy.noise_multiplier", "greater than or equal to 0.01"),
        ({"privacy": {"epsilon": math.inf}}, "privacy.epsilon", "a finite number"),
        ({"privacy": {"where": "nowhere"}}, "privacy.where", "'server' or 'client'"),
        ({"privacy": {"sigma": 1.0}}, "privacy.sigma", "one of the keys clip, noise_multiplier"),
    ],
    ids=str,
)
def test_what_has_no_price_is_refused(changes: dict[str, Any], field: str, words: str) -> None:
    document = SPEC.document()
    document["chain"] |= {"start": 1, "head": "zero"}
    document["privacy"] = {"clip": 1.0, "noise_multiplier": 1.0}
    parse_job(document)
    for section, keys in changes.items():
        document[section] = {**document[section], **keys}
    with pytest.raises(InvalidJob) as caught:
        parse_job(document)
    (problem,) = caught.value.problems
    assert problem.field == field
    assert words in problem.expected


def test_what_it_costs_is_told_in_every_line_and_at_the_end() -> None:
    document = SPEC.document()
    document["chain"] |= {"start": 1, "head": "zero"}
    spec = parse_job({**document, "privacy": {"clip": 1.0, "noise_multiplier": 1.0}})
    job_started, console = a_start(), a_console()
    rounds = [a_round(index, job_started, epsilon=1.2 + index / 100) for index in range(3)]
    stopped = "privacy limit: one more round could take ε to 1.23, beyond 1.22"
    job_finished = FINISHED.model_copy(update={"epsilon": 1.22, "stopped": stopped})
    with ProgressDisplay(console, "tiny", spec) as progress:
        told(progress, job_started, rounds)
        progress.job_finished(job_finished)
    console.print(progress.panel())
    console.print(results(spec, job_started, rounds, job_finished))
    text = " ".join(console.export_text().split())
    assert "50.0% right ε 1.20 at δ 1e-5 peak" in text
    assert f"No more rounds ({stopped})." in text
    assert "Its client-level privacy: ε 1.22 at δ 1e-5." in text
    assert text.count("ε 1.22 at δ 1e-5") == 4, "line, panel, end and result"


def test_without_the_section_there_is_none() -> None:
    assert SPEC.privacy is None
    assert SPEC.document()["privacy"] is None
    assert parse_job(SPEC.document()) == SPEC
