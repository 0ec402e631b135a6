"""Promises about requests that nobody thought of: no answer is a mistake of ours, and each is what the document says.

A few examples here; ``make fuzz`` tries many, and with ``CHAINFED_FUZZ_ADDRESS`` it asks a running service.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import schemathesis
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.openapi import from_asgi, from_url
from schemathesis.specs.openapi.checks import ignored_auth, negative_data_rejection, positive_data_acceptance

from chainfed_ray.api.rest.job_file import EXAMPLE
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job, parse_yaml
from tests.apps import an_app

ADDRESS = os.environ.get("CHAINFED_FUZZ_ADDRESS")
EXAMPLES = int(os.environ.get("CHAINFED_FUZZ_EXAMPLES", "5"))
many = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES == 5)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The real application over a real database, in which keys were made."""
    storage = Storage.at(tmp_path_factory.mktemp("store"))
    store, keys = JobStore(storage.database), KeyStore(storage.database)
    uploads, answers = UploadStore(storage), FirstAnswers(storage.database)
    uploads.seen_by("b", everything=False).begin("unseen-rows.csv", 1000, 64 * "0")
    # The host is the name that schemathesis gives it.
    made = an_app(
        store,
        AccessRules(KeyRing(keys), "nobody"),
        ["testserver"],
        uploads=uploads,
        folder_of=storage.job,
        answers=answers,
    )
    made.state.tokens = [keys.make_key(owner, ["submit", "read", "infer"]).token for owner in ("a", "b")]
    for name in ("unseen-queued", "unseen-served"):
        job = store.seen_by("b", everything=False).submit(parse_job({**EXAMPLE, "name": name})).id
    store.move(job, "running")
    store.move(job, "succeeded", result={"classes": ["yes", "no"], "accuracy": 0.5})
    yield made
    for one in (store, keys, uploads, answers):
        one.close()


@pytest.fixture(scope="module")
def headers(app: Any) -> dict[str, str]:
    """The key of whoever asks; of a running service, the one in ``CHAINFED_API_KEY``."""
    token = os.environ.get("CHAINFED_API_KEY") if ADDRESS else app.state.tokens[0]
    return {"Authorization": f"Bearer {token}"} if token else {}


@pytest.fixture(scope="module")
def document(app: Any) -> Any:
    """The OpenAPI document of the application, or of the running service."""
    found = from_url(f"{ADDRESS}/openapi.json") if ADDRESS else from_asgi("/openapi.json", app)
    found.config.generation.update(with_security_parameters=False)  # each request has the key of ``headers``
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_every_answer_is_what_the_document_says(document: Any, headers: dict[str, str], mode: GenerationMode) -> None:
    """Of each operation: requests that its description allows, and such that it does not."""
    for found in document.get_all_operations():
        requests = found.ok().as_strategy(generation_mode=mode)
        with suppress(Unsatisfiable):  # nothing can be wrong with a request that has neither parameters nor a body
            many(given(requests)(checked_with(headers)))()


def checked_with(headers: dict[str, str]) -> Callable[[schemathesis.Case], None]:
    """The test of one request, sent with these headers."""

    def check_answer(case: schemathesis.Case) -> None:
        check(case, case.call(headers=headers), bool(headers))

    return check_answer


def check(case: schemathesis.Case, answer: Any, with_key: bool) -> None:
    assert "unseen-" not in answer.text, "it is another tenant's"
    # A job may be refused although its schema allows it, for a rule between keys or a file that is not there. Schemathesis
    # does not know 413 as a refusal.
    others: list[Any] = [negative_data_rejection] if answer.status_code == 413 else []
    if not with_key:  # a service in which no key was made lets everybody in
        others.append(ignored_auth)
    case.validate_response(answer, excluded_checks=[positive_data_acceptance, *others])


# --- job files -----------------------------------------------------------------------------------------------------------

keys = st.sampled_from(sorted({*JobSpec.model_fields, "base", "train", "count", "memory", "total", "<<"})) | st.text()
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["96MiB", "5m", "path:/none", "builtin:minilm", "1e999", "0x" + "f" * 5000, "2001-99-99"]),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=20,
)


@st.composite
def job_files(draw: st.DrawFn) -> Any:
    """A job that is accepted, with anything at some of its keys; or anything at all."""
    if draw(st.booleans()):
        return draw(values)
    job = json.loads(json.dumps(EXAMPLE))
    for _ in range(draw(st.integers(1, 3))):
        place = job
        while isinstance(place, dict) and place and draw(st.booleans()):
            inner = place.get(draw(st.sampled_from(sorted(place))))
            place = inner if isinstance(inner, dict) else place
        place[draw(keys)] = draw(values)
    return job


@pytest.fixture(scope="module")
def http(app: Any, headers: dict[str, str]) -> Iterator[httpx.Client | TestClient]:
    if ADDRESS:
        with httpx.Client(base_url=ADDRESS, headers=headers, timeout=200) as made:
            yield made
    else:
        with TestClient(app, "http://localhost", raise_server_exceptions=False, headers=headers) as made:
            yield made


@pytest.mark.slow
@many
@given(job_files())
def test_a_job_file_is_a_job_or_is_refused_in_words(http: Any, job: Any) -> None:
    as_json = json.dumps(job).encode()
    as_yaml = yaml.safe_dump(job, allow_unicode=True).encode("utf-8", "surrogatepass")
    for media_type, body in (("application/json", as_json), ("application/yaml", as_yaml)):
        answer = http.post("/v1/plan", content=body, headers={"Content-Type": media_type})
        assert answer.status_code in (200, 400, 422), answer.text
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json"


@many
@given(st.text(st.characters(exclude_categories=["Cs"])) | st.text("-?:,[]{}#&*!|>'\"%@` \n\t0x1eabc"))
def test_any_text_is_yaml_of_a_job_or_is_refused_in_words(text: str) -> None:
    with pytest.raises(InvalidJob) as refused:
        parse_yaml(text)
    assert len(str(refused.value)) < 5000


def test_the_documents_examples_are_jobs() -> None:
    assert parse_job(EXAMPLE) == parse_yaml(yaml.safe_dump(EXAMPLE))
