"""Promise: whatever part of a file a request asks for, the answer is that part, the file, or problem details."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.rest.sites import get_order_document
from chainfed_ray.cluster.jobs.store import JobStore
from tests.apps import an_app


class Desk:
    """A mailbox that has one document."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def document_of(self, site: str, order: str) -> Path:
        return self._file


@pytest.mark.parametrize(
    ("asked", "status"),
    [
        ("bytes=1-2", 206),
        ("bytes=-3", 206),
        ("bytes=9-3", 200),
        ("bytes=x", 200),
        ("lines=1-2", 200),
        ("bytes=1-2,4-5", 200),
        ("bytes", 200),
        ("bytes=10-", 416),
        ("bytes=-0", 416),
    ],
)
def test_a_part_of_what_a_site_fetches(store: JobStore, tmp_path: Path, asked: str, status: int) -> None:
    file = tmp_path / "document.json"
    file.write_bytes(b"0123456789")
    app = an_app(store)
    service: Service = app.state.service
    object.__setattr__(service, "sites", Desk(file))
    app.add_api_route("/file", lambda: get_order_document("0", "a", service))
    with TestClient(app, "http://localhost") as client:
        answer = client.get("/file", headers={"Range": asked})
        assert answer.status_code == status
        kind = "application/problem+json" if status == 416 else "application/json"
        assert answer.headers["content-type"] == kind
        if status == 416:
            assert answer.headers["content-range"] == "bytes */10"
        file.unlink()
        gone = client.get("/file", headers={"Range": asked})
        assert (gone.status_code, gone.headers["content-type"]) == (410, "application/problem+json")
