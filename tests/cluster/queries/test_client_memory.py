"""Promises of the limit of clients' memory: what counts is what may train at once, and what never fits is refused."""

from typing import Any

import pytest

from chainfed_ray.cluster.queries.client_memory import check_fits, memory_at_once
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.parse import parse_job
from tests.builders import MIB, SPEC


def of(*clients: dict[str, Any]) -> dict[str, Any]:
    return parse_job(SPEC.document() | {"fleet": {"clients": list(clients)}}).document()


@pytest.mark.parametrize(("slots", "expected"), [(1, 300), (2, 400), (3, 500), (4, 510), (99, 530)])
def test_the_largest_clients_count_of_those_that_train_at_once(slots: int, expected: int) -> None:
    document = of(
        {"name": "small", "memory": "10MiB", "count": 3},
        {"name": "large", "memory": "300MiB"},
        {"name": "middle", "memory": "100MiB", "count": 2},
        {"name": "far", "memory": "9GiB", "site": "hospital", "data": "site:rows.csv"},
    )
    assert memory_at_once(document, slots) == expected * MIB


def test_a_job_that_never_fits_is_refused_with_the_limit() -> None:
    document = of({"name": "a", "memory": "100MiB", "count": 9})
    check_fits(document, 2, 200 * MIB)
    check_fits(document, 9, None)
    with pytest.raises(InvalidJob, match=r"fleet\.clients is '200MiB'.*at most 199MiB.*CHAINFED_CLIENT_MEMORY"):
        check_fits(document, 2, 199 * MIB)


@pytest.mark.parametrize("document", [{}, {"fleet": {"clients": [{"memory": "much"}]}}, {"fleet": None}])
def test_a_document_that_cannot_be_read_needs_nothing(document: dict[str, Any]) -> None:
    assert memory_at_once(document, 2) == 0
