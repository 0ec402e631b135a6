"""Promises between tenants at the routes of sites and at the audit log: a site reaches its own orders, and admins alone read.

Each request is sent in two worlds that differ in what the other tenant has, and has to be answered alike.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.scopes import NEEDS
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.sites.mailbox import Mailbox, site_address
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.wire.codec import survey_order
from chainfed_ray.wire.envelope import PROTOCOL, HashedFile, JobDocument
from tests.apps import an_app
from tests.builders import SPEC

ALICES, BOBS = 32 * "a", 32 * "b"  # processes
SECRET = b"secret tensors"
TENSORS = HashedFile(sha256=sha256(SECRET).hexdigest(), size=len(SECRET))
ANSWER = {"outcome": "done", "content": {"loss": 0.5}}
OTHERS = ("bob", "default", "elsewhere", "submitter", "admin")


@dataclass
class World:
    """A service with its mailbox and its audit log, and the key of each who asks."""

    client: TestClient
    mailbox: Mailbox
    log: AuditLog
    keys: dict[str, str]

    def ask(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}", **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[tuple[World, World]]:
    """Two tenants and the default one have each a site of the same name. Alice's has an order in the first world alone."""
    made, opened = list[World](), list[Any]()
    for name in ("with", "without"):
        storage = Storage.at(tmp_path / name)
        store, keys, log = JobStore(storage.database), KeyStore(storage.database), AuditLog(storage.database)
        mailbox = Mailbox(storage)
        tokens = {owner: keys.make_site_key("hospital", owner).token for owner in ("alice", "bob", "default")}
        tokens |= {"elsewhere": keys.make_site_key("clinic", "bob").token}
        tokens |= {"submitter": keys.make_key("bob", ["submit", "read", "infer"]).token}
        tokens |= {"admin": keys.make_key("ops", ["admin"]).token}
        app = an_app(store, AccessRules(KeyRing(keys), "nobody", audit=log))
        app.state.service = replace(app.state.service, sites=mailbox)
        made.append(World(TestClient(app, "http://localhost", raise_server_exceptions=False), mailbox, log, tokens))
        opened += [store, keys, log, mailbox]
    yield made[0], made[1]
    for one in opened:
        one.close()


@pytest.fixture
def order(worlds: tuple[World, World], tmp_path: Path) -> str:
    """The order that a process of Alice's site has taken, and answered in part."""
    mailbox, document = worlds[0].mailbox, JobDocument(spec=SPEC.document())
    mailbox.files.keep_document("secret-job", document)
    (tmp_path / "tensors").write_bytes(SECRET)
    mailbox.files.keep_tensors("secret-job", tmp_path / "tensors", TENSORS.sha256)
    given = survey_order("secret-job", "secret", document.described(), 64 * "0", "silo", "site:secret.jsonl")
    mailbox.give(site_address("alice", "hospital"), given.model_copy(update={"tensors": TENSORS, "most_bytes": 100}))
    assert join(worlds[0], "alice", ALICES).status_code == 200
    asked = {"protocol": PROTOCOL, "session": ALICES, "running": [], "wait": 0}
    assert worlds[0].ask("alice", "POST", "/v1/site/orders/next", json=asked).json()["order"]["id"] == given.id
    content = {"session": ALICES, "offset": 0}
    kept = worlds[0].ask("alice", "PUT", f"/v1/site/orders/{given.id}/tensors", params=content, content=b"half")
    assert kept.json() == {"received": 4}
    return given.id


def join(world: World, who: str, session: str, **more: Any) -> httpx.Response:
    body = {"protocol": PROTOCOL, "session": session, "version": "1", **more}
    return world.ask(who, "POST", "/v1/site/session", json=body)


def requests(order: str, session: str) -> list[tuple[str, str, dict[str, Any]]]:
    """Requests of the process ``session`` to each route of sites, with the order of another's."""
    asked = {"protocol": PROTOCOL, "session": session, "running": [order], "jobs": ["secret-job"], "wait": 0}
    beat = {"session": session, "doing": "training", "worked": 1}
    piece = {"session": session, "offset": 4}
    return [
        ("POST", "/v1/site/session", {"json": {"protocol": PROTOCOL, "session": session, "version": "1"}}),
        ("POST", "/v1/site/orders/next", {"json": asked}),
        ("POST", "/v1/site/orders/next", {"json": {**asked, "running": []}}),
        ("POST", f"/v1/site/orders/{order}/heartbeat", {"json": beat}),
        ("GET", f"/v1/site/orders/{order}/document", {}),
        ("GET", f"/v1/site/orders/{order}/tensors", {}),
        ("GET", f"/v1/site/orders/{order}/tensors", {"headers": {"Range": "bytes=0-3"}}),
        ("GET", f"/v1/site/orders/{order}/tensors/received", {}),
        ("PUT", f"/v1/site/orders/{order}/tensors", {"params": piece, "content": b"false"}),
        ("PUT", f"/v1/site/orders/{order}/tensors", {"params": piece, "content": bytes(1000)}),
        ("POST", f"/v1/site/orders/{order}/answer", {"json": {"session": session, "answer": ANSWER}}),
        ("POST", "/v1/site/leave", {"json": {"session": session}}),
    ]


def plain(answer: httpx.Response) -> tuple[int, dict[str, str], str]:
    """An answer without what differs from one request, and from one world, to the next."""
    kept = {name: value for name, value in answer.headers.items() if name not in ("x-request-id", "content-length")}
    return answer.status_code, kept, re.sub(r'"request_id":"[0-9a-f]+"|the key [0-9a-f]{16}', "", answer.text)


@pytest.mark.slow
@pytest.mark.parametrize("who", OTHERS)
def test_the_site_of_another_tenant_is_answered_as_if_there_were_no_order(
    worlds: tuple[World, World], order: str, who: str
) -> None:
    routes = set[str]()
    for session in (BOBS, ALICES):
        for method, path, given in requests(order, session):
            answers = [world.ask(who, method, path, **given) for world in worlds]
            assert plain(answers[0]) == plain(answers[1]), (method, path, given)
            assert SECRET not in answers[0].content
            if who in ("submitter", "admin"):
                assert answers[0].status_code == 403, "a site alone has orders"
            elif order in path:
                assert answers[0].status_code == 410, (method, path, given)
            else:
                assert answers[0].json().get("order") is None
            routes.add(f"{method} {path.replace(order, '{order}')}")
    assert routes == {route for route, needs in NEEDS.items() if needs == ("site",)}
    # And nothing has happened to it: the process that has it goes on.
    received = worlds[0].ask("alice", "GET", f"/v1/site/orders/{order}/tensors/received")
    assert received.json() == {"received": 4}
    assert worlds[0].ask("alice", "GET", f"/v1/site/orders/{order}/tensors").content == SECRET
    asked = {"protocol": PROTOCOL, "session": ALICES, "running": [order], "wait": 0, "jobs": ["secret-job"]}
    assert worlds[0].ask("alice", "POST", "/v1/site/orders/next", json=asked).json() == {"order": None, "over": []}
    done = {"session": ALICES, "answer": ANSWER}
    assert worlds[0].ask("alice", "POST", f"/v1/site/orders/{order}/answer", json=done).status_code == 200


def test_a_site_joins_under_its_own_name_and_tenant_alone(worlds: tuple[World, World], order: str) -> None:
    world = worlds[0]
    for site in ("clinic", "alice/hospital", "../alice/hospital", "alice%2Fhospital"):
        assert join(world, "bob", BOBS, site=site).status_code in (403, 422), site
    assert join(world, "bob", ALICES, site="hospital").json() == {"site": "hospital"}
    joined = {site.name: site.joined for site in world.mailbox.sites()}
    assert joined == {"alice/hospital": True, "bob/hospital": True}
    assert world.mailbox.next("alice/hospital", ALICES, [order]) is None, "Alice's process is still that of her site"


@pytest.mark.slow
def test_the_audit_log_is_read_by_admins_alone_and_whole(worlds: tuple[World, World], order: str) -> None:
    world = worlds[0]
    hidden = "/v1/jobs/alice-" + 3000 * "x" + "/cancel"
    world.ask("submitter", "POST", hidden)
    world.ask("submitter", "POST", "/v1/jobs/a%00%0ab%1b[31m/cancel")
    world.ask("bob", "POST", "/v1/jobs/none/cancel")
    for who in ("alice", "bob", "default", "elsewhere", "submitter"):
        for page in ("", "?limit=1", "?before=9223372036854775807", "?tenant=alice"):
            refused = world.ask(who, "GET", f"/v1/audit{page}")
            assert (refused.status_code, "entries" in refused.json()) == (403, False)
    for page in ("?before=0", "?before=9223372036854775808", "?limit=0", "?limit=1001", "?before=x"):
        assert world.ask("admin", "GET", f"/v1/audit{page}").status_code == 422
    entries, after = list[dict[str, Any]](), dict[str, int]()
    while True:
        found = world.ask("admin", "GET", "/v1/audit", params={"limit": 3, **after}).json()
        entries += found["entries"]
        if found["next"] is None:
            break
        after = {"before": found["next"]}
    numbers = [entry["number"] for entry in entries]
    assert numbers == sorted(set(numbers), reverse=True)
    assert len(entries) == 23, "each of the requests, once"
    assert {entry["tenant"] for entry in entries} == {"alice", "bob", "default"}, "who has asked, whatever they ask for"
    assert max(len(entry["target"]) for entry in entries) < 1100
    assert not [entry for entry in entries if "\0" in entry["target"]]
    secrets = [token.rpartition("_")[2] for token in world.keys.values()]
    assert not [secret for secret in secrets if secret in str(entries)]
