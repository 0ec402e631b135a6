"""Promises of the deal: whatever the scheme and its parameters, it ends, and every row goes to exactly one client."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainfed_ray.data import docstrings
from chainfed_ray.data.partition import by_column, dirichlet, partition_examples, quantity
from chainfed_ray.data.sources import load
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.fleet import PartitionSpec
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.spec.sections import DataSpec
from tests.builders import ROWS, a_job, rows_in

SPECS = st.one_of(
    st.just(PartitionSpec(scheme="iid")),
    st.just(PartitionSpec(scheme="column", column="site")),
    st.builds(
        PartitionSpec,
        scheme=st.sampled_from(["dirichlet", "quantity"]),
        alpha=st.one_of(st.floats(1e-6, 1e6), st.sampled_from([1e-320, 1e-300, 1e300, 1.7e308])),
    ),
)


@given(SPECS, st.integers(1, 12), st.integers(0, 60), st.integers(1, 5), st.integers(0, 99))
def test_every_row_goes_to_one_client_and_nobody_is_empty(
    spec: PartitionSpec, clients: int, extra: int, classes: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, clients + extra)
    values = [str(value) for value in generator.permutation(clients + extra) % (clients + extra // 3)]
    shares, again = (partition_examples(spec, labels, values, clients, seed) for _ in range(2))
    assert len(shares) == clients
    assert min(map(len, shares)) >= 1
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(labels)))
    for share, same in zip(shares, again, strict=True):
        assert np.array_equal(share, same), "the same seed is the same deal"
        assert np.array_equal(share, np.sort(share))


@pytest.mark.parametrize("scheme", ["dirichlet", "quantity"])
def test_tens_of_thousands_of_clients_of_whom_one_would_get_all(scheme: Any) -> None:
    shares = partition_examples(PartitionSpec(scheme=scheme, alpha=1e-6), np.zeros(60_000), (), 30_000, 0)
    assert min(map(len, shares)) == 1
    assert max(map(len, shares)) > 29_900


@given(st.integers(1, 9), st.integers(0, 40), st.floats(0.05, 10), st.integers(0, 99))
def test_an_empty_share_is_given_a_row_of_the_largest(clients: int, extra: int, alpha: float, seed: int) -> None:
    """Label skew of one class against a plain computation."""
    rows, generator = clients + extra, np.random.default_rng(seed)
    order = generator.permutation(np.arange(rows))
    cuts = (np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * rows).round().astype(int)
    expected = [part.tolist() for part in np.split(order, cuts)]
    for share in expected:
        if not share:
            share.append(max(expected, key=len).pop())
    found = dirichlet(np.zeros(rows), clients, alpha, seed)
    assert [share.tolist() for share in found] == [sorted(share) for share in expected]


def test_quantity_skew_is_that_of_alpha_and_leaves_classes_to_chance() -> None:
    labels = np.arange(3000) % 3
    even, uneven = (quantity(labels, 10, alpha, seed=1) for alpha in (1e6, 0.1))
    assert {len(share) for share in even} <= set(range(298, 303))
    sizes = sorted(map(len, uneven))
    assert sizes[-1] > 1000
    assert sizes[0] < 30
    for share in (*even, uneven[int(np.argmax([len(share) for share in uneven]))]):
        counts = np.bincount(labels[share], minlength=3) / len(share)
        assert np.abs(counts - 1 / 3).max() < 0.1


@given(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=80), st.data())
def test_values_are_dealt_whole_the_largest_first(values: list[str], data: st.DataObject) -> None:
    counts = Counter(values)
    clients = data.draw(st.integers(1, len(counts)))
    shares = by_column(values, clients, "site")
    owners = [{values[row] for row in share} for share in shares]
    assert sum(map(len, owners)) == len(counts), "no value is split"

    expected: list[set[str]] = [set() for _ in range(clients)]
    for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        min(expected, key=lambda owned: sum(counts[one] for one in owned)).add(value)
    assert owners == expected
    assert max(map(len, shares)) - min(map(len, shares)) <= max(counts.values())


def test_fewer_values_than_clients_is_refused() -> None:
    expected = (
        r"fleet\.partition\.column is 'site'; expected a column with 3 values or more, one for each client; "
        r"its training rows have 2"
    )
    with pytest.raises(InvalidJob, match=expected):
        by_column(["a", "b", "a"], 3, "site")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "hub"])
def test_a_column_comes_with_its_rows(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is a column as any other: its values stay beside their rows when the splits are drawn."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    train = load(DataSpec(train=rows_in(tmp_path, form)), seed=5, column="text").train
    assert len(train) == 32
    assert train.groups == train.texts


@pytest.mark.parametrize(
    ("partition", "complaint"),
    [
        ({"scheme": "column"}, r"fleet\.partition\.column is missing; expected the column whose values"),
        ({"column": "site"}, r"fleet\.partition\.scheme is 'iid'; expected column, since fleet\.partition\.column is"),
        ({"scheme": "shards"}, r"fleet\.partition\.scheme is 'shards'; expected 'iid', 'dirichlet', 'quantity' or"),
        ({"scheme": "quantity", "alpha": 0}, r"fleet\.partition\.alpha is 0; expected greater than 0"),
    ],
)
def test_contradictions(document: dict[str, Any], partition: dict[str, Any], complaint: str) -> None:
    document["fleet"]["partition"] = partition
    with pytest.raises(InvalidJob, match=complaint):
        parse_job(document)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"column": "ward"}, r"fleet\.partition\.column is 'ward'; expected a column of path:\S+: text, label, site"),
        (
            {"column": "site"},
            r"fleet\.partition\.column is 'site'; expected a value in every row of .*; row 7 has none",
        ),
        ({"train": "builtin:docstrings"}, r"fleet\.partition\.column is 'site'; .* of builtin:docstrings: text, label"),
    ],
)
def test_columns_that_cannot_be_used(
    change: dict[str, str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(docstrings, "rows", lambda: (("A sentence.", "numpy"),))
    rows = [row | {"site": f"hospital-{index % 3}"} for index, row in enumerate(ROWS)]
    rows[6] |= {"site": " "}
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InvalidJob, match=complaint):
        load(DataSpec(train=change.get("train", f"path:{path}")), 0, change.get("column", "site"))


@pytest.mark.slow
def test_a_job_by_column(document: dict[str, Any], tmp_path: Path) -> None:
    """Each client of the job holds whole classes, since it is by them that this job deals."""
    document["fleet"] = {
        "partition": {"scheme": "column", "column": "label"},
        "clients": [{"name": "silo", "count": 3, "memory": "64MiB"}],
    }
    job = a_job(document, tmp_path)
    held = [set(client.examples.labels.tolist()) for client in job.clients]
    assert sorted(held, key=min) == [{0}, {1}, {2}]
    document["fleet"]["clients"][0]["count"] = 4
    with pytest.raises(InvalidJob, match=r"fleet\.partition\.column is 'label'; .* 4 values or more, .* rows have 3"):
        a_job(document, tmp_path)
