"""Promises between tenants: no answer to one tells that another one, or anything of its, is there.

Each request is sent in two worlds that differ in what the other tenant has, and has to be answered alike.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.queries.pages import Place
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.serving.messages import ModelKey
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.wire.envelope import PROTOCOL
from tests.apps import an_app
from tests.builders import SPEC

DOCUMENT = SPEC.document()
TRAINED = {"classes": ["sea", "sky"], "accuracy": 0.5}
ALL = ("submit", "read", "infer")


@dataclass
class World:
    """A service with its database, the key of each who asks, and the jobs that were made in it."""

    client: TestClient
    store: JobStore
    keys: dict[str, str]
    folder_of: Callable[[str], Path]

    def ask(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}", **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def make(self, tenant: str, name: str, ends: str = "succeeded", key: str | None = None) -> str:
        """A job of a tenant, and what the service does with it."""
        job = (
            self.store.seen_by(tenant, everything=False)
            .submit(parse_job({**DOCUMENT, "name": name, "labels": {"of": tenant}}), key)
            .id
        )
        if ends != "queued":
            self.store.move(job, "running")
        if ends == "succeeded":
            self.store.move(job, "succeeded", result=TRAINED)
        return job


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[tuple[World, World]]:
    """Bob has the same in both. Alice has jobs, a model and an alias in the first one, and nothing in the second."""
    made, opened = [], []
    for name in ("with", "without"):
        storage = Storage.at(tmp_path / name)
        store, keys = JobStore(storage.database), KeyStore(storage.database)
        uploads, answers = UploadStore(storage), FirstAnswers(storage.database)
        tokens = {who: keys.make_key(who, ALL).token for who in ("alice", "bob")}
        tokens["admin"] = keys.make_key("ops", ["admin"]).token
        client = TestClient(
            an_app(
                store, AccessRules(KeyRing(keys), "nobody"), uploads=uploads, folder_of=storage.job, answers=answers
            ),
            "http://localhost",
            raise_server_exceptions=False,
        )
        world = World(client, store, tokens, storage.job)
        world.make("bob", "own")
        made.append(world)
        opened += [store, keys, uploads, answers]
    yield made[0], made[1]
    for one in opened:
        one.close()


ROWS = b"text,label\nsecret,sea\n"
FILE = {"name": "secret.csv", "bytes": len(ROWS), "sha256": sha256(ROWS).hexdigest()}


@pytest.fixture
def secrets(worlds: tuple[World, World]) -> list[str]:
    """The ids of Alice's jobs and uploads."""
    world = worlds[0]
    uploads = [world.ask("alice", "POST", "/v1/uploads", json={**FILE, "name": name}).json()["id"] for name in NAMES]
    assert world.ask("alice", "PUT", f"/v1/uploads/{uploads[0]}/content", content=ROWS).json()["complete"]
    again = {"json": FILE, "headers": {"Idempotency-Key": "file"}}
    assert world.ask("alice", "POST", "/v1/uploads", **again).json()["id"] == uploads[0]
    jobs = [world.make("alice", "secret", ends, ends) for ends in ("queued", "running", "succeeded")]
    for job in jobs:
        world.folder_of(job).mkdir(parents=True)
        (world.folder_of(job) / "partition.json").write_text("secret")
        (world.folder_of(job) / "log.jsonl").write_text('{"at": "", "level": "", "source": "", "message": "secret"}\n')
    world.ask("alice", "PUT", "/v1/aliases/hidden", json={"targets": {"minilm:secret": 1}})
    world.ask("alice", "PUT", "/v1/aliases/hidden", json={"targets": {"minilm:secret": 0.5, "minilm": 0.5}})
    return [*jobs, *uploads]


NAMES = ("secret.csv", "other.csv")
ARTIFACTS = ("partition.json", "model/adapter_config.json", "none")
PLACES = ("job", "name", "alias", "upload")
MODELS = (
    "minilm", "minilm:own", "minilm:secret", "alice/minilm", "alice/minilm:secret", "alice/minilm:none",
    "minilm:secret@latest", "alice/minilm:secret@0", "hidden", "alice/hidden", "bob/minilm:own", "nobody/minilm:secret",
)  # fmt: skip


def requests(jobs: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Requests to each operation that name what is Alice's, or what is nobody's."""
    submitted = [
        {"json": {**DOCUMENT, "name": name}, "headers": {"Idempotency-Key": key}}
        for name in ("secret", "own")
        for key in ("queued", "running", "mine", "alice\\nqueued")
    ]
    jobs, uploads = jobs[:3], jobs[3:]
    named = [{"job": job} for job in (*jobs, "none-00000000")]
    stored = [{"upload": upload} for upload in (*uploads, 16 * "0")]
    keyed = [{"json": FILE, "headers": {"Idempotency-Key": key}} for key in ("file", "nobody's")]
    others = {**FILE, "sha256": sha256(b"x" * len(ROWS)).hexdigest()}
    aliases = [{"alias": alias} for alias in ("hidden", "none", "alice/hidden", "alice/none")]
    targets: list[dict[str, float]] = [{name: 1} for name in MODELS]
    return {
        "GET /healthz": [{}],
        "GET /readyz": [{}],
        "GET /metrics": [{}],
        "GET /v1/audit": [{}],
        "POST /v1/plan": [{"json": DOCUMENT}],
        "POST /v1/jobs": submitted,
        "GET /v1/jobs": [
            {},
            *({"params": {"cursor": Place("2100-01-01T00:00:00.000Z", job).cursor()}} for job in jobs),
            {"params": {"status": "queued"}},
            {"params": {"state": ["queued", "succeeded"], "label": "of=alice"}},
        ],
        "GET /v1/jobs/{job}": named,
        "GET /v1/jobs/{job}/clients": named,
        "GET /v1/jobs/{job}/events": [*named, *({**one, "headers": {"Accept": "text/event-stream"}} for one in named)],
        "GET /v1/jobs/{job}/logs": named,
        "GET /v1/jobs/{job}/artifacts": named,
        "GET /v1/jobs/{job}/artifacts/{name}": [{**one, "name": name} for one in named for name in ARTIFACTS],
        "POST /v1/jobs/{job}/pause": named,
        "POST /v1/jobs/{job}/resume": named,
        "POST /v1/jobs/{job}/cancel": named,
        "POST /v1/jobs/{job}/retry": named,
        "POST /v1/jobs/{job}/clone": [*named, *({**one, "json": {"name": "own"}} for one in named)],
        "DELETE /v1/jobs/{job}": named,
        "POST /v1/uploads": [{"json": {**FILE, "name": "mine.csv"}}, {"json": FILE}, {"json": others}, *keyed],
        "GET /v1/uploads": [
            {},
            *({"params": {"cursor": Place("2100-01-01T00:00:00.000Z", upload).cursor()}} for upload in uploads),
        ],
        "GET /v1/uploads/{upload}": stored,
        "PUT /v1/uploads/{upload}/content": [{**one, "content": ROWS} for one in stored],
        "DELETE /v1/uploads/{upload}": stored,
        "GET /v1/models": [{}],
        "GET /v1/models/{name}": [{"name": name} for name in MODELS],
        "GET /v1/aliases": [{}],
        "PUT /v1/aliases/{alias}": [{**one, "json": {"targets": target}} for one in aliases for target in targets],
        "POST /v1/aliases/{alias}/rollback": aliases * 2,
        "DELETE /v1/aliases/{alias}": aliases * 2,
        "POST /v1/classify": [{"json": {"model": name, "texts": ["x"]}} for name in MODELS],
        "POST /v1/embeddings": [{"json": {"model": name, "input": ["x"]}} for name in MODELS],
        "POST /v1/completions": [{"json": {"model": name, "prompt": "x"}} for name in MODELS],
        "POST /v1/chat/completions": [
            {"json": {"model": name, "messages": [{"role": "user", "content": "x"}]}} for name in MODELS
        ],
        "POST /v1/site/session": [{"json": {"protocol": PROTOCOL, "session": 32 * "1", "version": "1"}}],
        "POST /v1/site/leave": [{"json": {"session": 32 * "1"}}],
        "POST /v1/site/orders/next": [{"json": {"protocol": PROTOCOL, "session": 32 * "1"}}],
        "POST /v1/site/orders/{order}/heartbeat": [{"json": {"session": 32 * "1", "doing": "training", "worked": 1}}],
        "GET /v1/site/orders/{order}/document": [{}],
        "GET /v1/site/orders/{order}/tensors": [{}],
        "GET /v1/site/orders/{order}/tensors/received": [{}],
        "PUT /v1/site/orders/{order}/tensors": [{"params": {"session": 32 * "1", "offset": 0}}],
        "POST /v1/site/orders/{order}/answer": [{"json": {"session": 32 * "1", "answer": {"outcome": "done"}}}],
    }


def plain(answer: httpx.Response, jobs: list[str]) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from one moment to the next: times, ids of requests, and ids of new jobs."""
    headers = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
    if "location" in headers:
        headers["location"] = re.sub(r"-[0-9a-f]{8}$|/[0-9a-f]{16}$", "-new", headers["location"])
    text = re.sub(r'"request_id":"[0-9a-f]+"|the key [0-9a-f]{16}', "", answer.text)
    text = re.sub(r'"(id|next)":"[0-9a-f]{16}"', "", text)
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z|\"created\":\d+", "then", text)
    for number, job in enumerate(jobs):
        text = text.replace(job, f"<{number}>")
    return answer.status_code, headers, re.sub(r"(own|secret)-[0-9a-f]{8}", r"\1-new", text)


@pytest.mark.slow
def test_a_stranger_is_answered_as_if_nothing_were_there(worlds: tuple[World, World], secrets: list[str]) -> None:
    asked = requests(secrets)
    documented = worlds[0].client.get("/openapi.json").json()["paths"]
    assert {f"{method.upper()} {path}" for path, methods in documented.items() for method in methods} == asked.keys()
    before = [world_of_alice(worlds[0], secrets), str(worlds[0].store.aliases.all())]
    for operation, options in asked.items():
        method, _, path = operation.partition(" ")
        for given in options:
            place = path.format(order=32 * "0", **{key: given.get(key) for key in PLACES})
            sent = {key: value for key, value in given.items() if key not in PLACES}
            answers = [plain(world.ask("bob", method, place, **sent), secrets) for world in worlds]
            assert answers[0] == answers[1], (operation, given)
            assert answers[0][0] < 500 or (answers[0][0] == 500 and "NotImplementedError" in answers[0][2]), answers[0]
    assert world_of_alice(worlds[0], secrets) == before[0], "and nothing has happened to it"


def world_of_alice(world: World, jobs: list[str]) -> list[Any]:
    paths = [f"/v1/jobs/{job}" for job in jobs[:3]] + [f"/v1/uploads/{upload}" for upload in jobs[3:]]
    paths += ["/v1/jobs", "/v1/models", "/v1/aliases", "/v1/uploads"]
    return [world.ask("alice", "GET", path).json() for path in paths]


@pytest.mark.slow
def test_what_a_stranger_asks_for_is_not_found(worlds: tuple[World, World], secrets: list[str]) -> None:
    """The test above would pass if nobody found anything: so here is who does."""
    world = worlds[0]
    of_jobs = [
        [f"/v1/jobs/{job}{part}" for part in ("", "/events", "/logs", "/artifacts/partition.json")]
        for job in secrets[:3]
    ]
    for paths in [*of_jobs, [f"/v1/uploads/{upload}" for upload in secrets[3:]]]:
        for path in paths:
            statuses = [world.ask(who, "GET", path).status_code for who in ("alice", "admin", "bob")]
            assert statuses == [200, 200, 404], path
    for name in ("minilm:secret", "hidden"):
        statuses = [world.ask(who, "GET", f"/v1/models/{name}").status_code for who in ("alice", "admin", "bob")]
        assert statuses == [200, 404, 404], "short names are of one's own tenant"
        statuses = [world.ask(who, "GET", f"/v1/models/alice/{name}").status_code for who in ("alice", "admin", "bob")]
        assert statuses == [200, 200, 404]
    assert world.ask("bob", "POST", f"/v1/jobs/{secrets[1]}/cancel").status_code == 404
    assert world.store.get(secrets[1]).status == "running"


@pytest.mark.slow
def test_one_key_of_two_tenants_makes_two_jobs(worlds: tuple[World, World]) -> None:
    headers = {"Idempotency-Key": "monday"}
    jobs = [
        worlds[0].ask(who, "POST", "/v1/jobs", json=DOCUMENT, headers=headers).json()["id"]
        for who in ("alice", "bob", "admin", "alice", "bob", "admin")
    ]
    assert jobs[:3] == jobs[3:]
    assert len(set(jobs)) == 3
    tenants = [worlds[0].ask("admin", "GET", f"/v1/jobs/{job}").json()["tenant"] for job in jobs[:3]]
    assert tenants == ["alice", "bob", "ops"]


@pytest.mark.slow
def test_two_tenants_may_call_their_models_and_aliases_alike(
    worlds: tuple[World, World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, asked = worlds[0], list[str | None]()

    async def classify(model: ModelKey, texts: list[str]) -> list[list[float]]:
        asked.append(model.job)
        return [[0.7, 0.3]] * len(texts)

    object.__setattr__(world.client.app.state.service, "classify", classify)  # type: ignore[attr-defined]
    jobs = {who: world.make(who, "same") for who in ("alice", "bob")}
    for who in ("alice", "bob"):
        assert world.ask(who, "PUT", "/v1/aliases/mine", json={"targets": {f"{who}/minilm:same": 1}}).status_code == 200
    for who in ("alice", "bob"):
        for name in ("minilm:same", "mine", f"{who}/minilm:same", f"{who}/mine"):
            answer = world.ask(who, "POST", "/v1/classify", json={"model": name, "texts": ["x"]}).json()
            assert (answer["model"], answer["job"]) == ("minilm:same", jobs[who])
            named = name if "/" in name else f"{who}/{name}"
            answer = world.ask("admin", "POST", "/v1/classify", json={"model": named, "texts": ["x"]}).json()
            assert (answer["model"], answer["job"]) == (f"{who}/minilm:same", jobs[who])
    assert set(asked) == set(jobs.values())
    assert world.ask("alice", "GET", "/v1/aliases").json() == {
        "aliases": [{"name": "mine", "targets": {"minilm:same": 1.0}}]
    }
    assert [found["name"] for found in world.ask("admin", "GET", "/v1/aliases").json()["aliases"]] == [
        "alice/mine", "bob/mine",
    ]  # fmt: skip
    assert world.ask("alice", "DELETE", "/v1/aliases/mine").status_code == 204
    assert world.ask("bob", "GET", "/v1/models/mine").status_code == 200


@pytest.mark.slow
def test_an_admin_rolls_back_and_deletes_the_alias_of_a_tenant(worlds: tuple[World, World]) -> None:
    world = worlds[0]
    _, job = world.make("alice", "secret"), world.make("alice", "new")
    for name in ("minilm:secret", "minilm:new"):
        assert world.ask("alice", "PUT", "/v1/aliases/mine", json={"targets": {name: 1}}).status_code == 200
    refused = world.ask("admin", "DELETE", f"/v1/jobs/{job}")
    assert refused.status_code == 409
    assert "the alias alice/mine stands for its model" in refused.json()["detail"]
    for who in ("bob", "admin"):
        assert world.ask(who, "DELETE", "/v1/aliases/mine").status_code == 404, "it is not theirs"
    for method, path in (("DELETE", "alice/mine"), ("POST", "alice/mine/rollback"), ("DELETE", "alice%2Fmine")):
        assert world.ask("bob", method, f"/v1/aliases/{path}").status_code == 404
    back = world.ask("admin", "POST", "/v1/aliases/alice/mine/rollback")
    assert (back.status_code, back.json()) == (200, {"name": "alice/mine", "targets": {"minilm:secret": 1.0}})
    assert world.ask("admin", "DELETE", f"/v1/jobs/{job}").status_code == 204
    assert world.ask("admin", "DELETE", "/v1/aliases/alice%2Fmine").status_code == 204, "as the client sends it"
    assert world.ask("alice", "GET", "/v1/models/mine").status_code == 404
    assert world.ask("admin", "DELETE", "/v1/aliases/alice/b/mine").status_code == 422


@pytest.mark.slow
def test_metrics_name_tenants_to_an_admin_alone(worlds: tuple[World, World], secrets: list[str]) -> None:
    told = {who: worlds[0].ask(who, "GET", "/metrics").text for who in ("alice", "bob", "admin")}
    assert 'chainfed_jobs{status="succeeded",tenant="alice"} 1.0' in told["admin"]
    assert f'chainfed_rounds_total{{job="{secrets[1]}",tenant="alice"}} 0.0' in told["admin"]
    for who in ("alice", "bob"):
        assert "tenant" not in told[who]
        assert 'chainfed_jobs{status="succeeded"} 1.0' in told[who]
    assert secrets[1] in told["alice"]
    assert secrets[1] not in told["bob"]


def test_routes_ask_for_what_the_caller_sees() -> None:
    """They never reach for the jobs of all."""
    folder = Path(an_app.__code__.co_filename).parent.parent / "api"
    for file in (*folder.glob("rest/*.py"), *folder.glob("jobs/*.py")):
        assert file.name == "service.py" or not re.search(r"\.store\b(?! import)", file.read_text()), file.name
