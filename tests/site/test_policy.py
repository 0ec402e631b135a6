"""A site refuses what its owner does not want, with the key that it is about and the numbers."""

from typing import Any

import pytest

from chainfed_ray.site.policy import Policy
from chainfed_ray.wire.codec import job_document, survey_order
from chainfed_ray.wire.envelope import NotDone
from tests.builders import PRIVACY


@pytest.fixture
def at_site(document: dict[str, Any]) -> dict[str, Any]:
    document["fleet"]["clients"] = [{"name": "silo", "memory": "64MiB", "site": "a", "data": "site:rows.jsonl"}]
    del document["data"]["train"]
    document["data"] |= {"validation": "path:v.csv", "test": "path:t.csv"}
    return document


def refusal(policy: Policy, document: dict[str, Any], worked: float = 0) -> NotDone | None:
    known = job_document(document).described()
    order = survey_order("job-1", "tiny", known, 64 * "0", "silo", "site:rows.jsonl")
    return policy.refusal(order, document, worked)


def test_what_is_allowed_is_not_refused(at_site: dict[str, Any]) -> None:
    assert refusal(Policy(("*",)), at_site, 1e9) is None


@pytest.mark.parametrize(
    ("policy", "worked", "key", "numbers"),
    [
        (Policy(models=("hf:mine/*",)), 0, "model.base", ()),
        (Policy(), 0, "model.base", ()),
        (Policy(("*",), memory=2**25), 0, "fleet.clients.memory", (2**26, 2**25)),
        (Policy(("*",), hours=1), 3700, "hours", (3700, 1)),
        (Policy(("*",), epsilon=3), 0, "privacy.epsilon", (3,)),
    ],
)
def test_a_refusal_names_the_key_and_the_numbers(
    at_site: dict[str, Any], policy: Policy, worked: float, key: str, numbers: tuple[float, ...]
) -> None:
    assert refusal(policy, at_site, worked) == NotDone(reason="refused", key=key, numbers=numbers)


def test_a_job_with_too_large_an_epsilon_is_refused(at_site: dict[str, Any]) -> None:
    at_site["privacy"] = {**PRIVACY, "epsilon": 9.0}
    assert refusal(Policy(("*",), epsilon=10), at_site) is None
    found = refusal(Policy(("*",), epsilon=3), at_site)
    assert found == NotDone(reason="refused", key="privacy.epsilon", numbers=(3, 9))


def test_a_model_of_the_hub_needs_no_permission(at_site: dict[str, Any]) -> None:
    at_site["model"]["base"] = "hf:org/name"
    assert refusal(Policy(), at_site) is None


def test_a_document_that_is_no_job_is_refused() -> None:
    refused = refusal(Policy(), {"name": "x"})
    assert isinstance(refused, NotDone)
    assert refused.reason == "job"
