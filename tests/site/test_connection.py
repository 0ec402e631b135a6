"""A site waits for its service, and transfers go on where they stopped."""

from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import httpx
import pytest

from chainfed_ray.errors import InvalidSetting, SiteRefused
from chainfed_ray.site import connection
from chainfed_ray.site.connection import Connection, Withdrawn
from chainfed_ray.site.envelope import HashedFile, Order
from chainfed_ray.site.transcript import Transcript

Answering = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> Iterator[Callable[[Answering], Connection]]:
    """Makes a connection to a service that answers with a function."""
    made: list[Connection] = []
    client = httpx.Client
    monkeypatch.setattr(connection, "_FIRST_PAUSE", 0.001)

    def make(answering: Answering) -> Connection:
        def over(**given: object) -> httpx.Client:
            return client(transport=httpx.MockTransport(answering), base_url="http://localhost")

        monkeypatch.setattr(httpx, "Client", over)
        made.append(Connection("http://localhost", "key", 32 * "1", Transcript(None), Event(), told.append))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_service_that_does_not_answer_is_waited_for(
    connect: Callable[[Answering], Connection], told: list[str]
) -> None:
    troubles = iter([httpx.ConnectError("refused"), 503, 502, httpx.ReadTimeout("slow")])

    def answering(request: httpx.Request) -> httpx.Response:
        trouble = next(troubles, None)
        if isinstance(trouble, Exception):
            raise trouble
        return httpx.Response(trouble) if trouble else httpx.Response(200, json={"site": "a"})

    assert connect(answering).join("1.0") == "a"
    assert told == ["http://localhost does not answer (refused); waiting for it.", "The service answers again."]


def test_tensors_are_fetched_in_pieces_from_where_a_transfer_stopped(
    connect: Callable[[Answering], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bytes(range(256)) * 10
    (tmp_path / "whole").write_bytes(whole)
    described = HashedFile.of(tmp_path / "whole")
    monkeypatch.setattr(connection, "_PIECE_BYTES", 1000)
    asked = []

    def answering(request: httpx.Request) -> httpx.Response:
        first, last = map(int, request.headers["range"].removeprefix("bytes=").split("-"))
        asked.append(first)
        return httpx.Response(206, content=whole[first : last + 1])

    order = Order(
        id=32 * "2", job="j", name="n", kind="training", document=described, base_digest=64 * "0", content={},
        tensors=described, most_bytes=0,
    )  # fmt: skip
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / f"{described.sha256}.partial").write_bytes(whole[:700])
    made = connect(answering)
    fetched = made.fetch(order, folder)
    assert fetched is not None
    assert fetched.read_bytes() == whole
    assert asked == [700, 1700]
    assert made.fetch(order, folder) == fetched
    assert len(asked) == 2, "what is there is not fetched again"
    document = made.fetch_document(order, tmp_path / "documents")
    assert document.read_bytes() == whole
    assert made.fetch_document(order, tmp_path / "documents") == document
    assert asked[2:] == [0, 1000, 2000]
    document.write_bytes(b"")  # by a disk that failed
    assert made.fetch_document(order, tmp_path / "documents").read_bytes() == whole


def test_tensors_are_sent_from_where_a_transfer_stopped(
    connect: Callable[[Answering], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, arrived = bytes(2500), bytearray(bytes(300))
    (tmp_path / "sent").write_bytes(whole)
    monkeypatch.setattr(connection, "_PIECE_BYTES", 1000)
    lost = iter([True])

    def answering(request: httpx.Request) -> httpx.Response:
        if request.method == "PUT":
            assert int(request.url.params["offset"]) in (len(arrived), len(arrived) - 1000)
            if int(request.url.params["offset"]) == len(arrived):
                arrived.extend(request.content)
            if next(lost, False):  # the piece arrived, and the answer did not
                raise httpx.ReadError("cut off")
        return httpx.Response(200, json={"received": len(arrived)})

    connect(answering).send(32 * "2", tmp_path / "sent")
    assert bytes(arrived) == whole


@pytest.mark.parametrize(
    ("status", "raised"), [(410, Withdrawn), (401, SiteRefused), (409, SiteRefused), (426, SiteRefused)]
)
def test_a_refusal_is_not_tried_again(
    connect: Callable[[Answering], Connection], status: int, raised: type[Exception]
) -> None:
    with pytest.raises(raised, match="why"):
        connect(lambda request: httpx.Response(status, json={"detail": "why"})).next(0, [], [])


@pytest.mark.parametrize("address", ["http://example.org", "ftp://example.org", "example.org", "http://[", ""])
def test_an_address_that_would_send_the_key_unencrypted_is_refused(address: str, told: list[str]) -> None:
    with pytest.raises(InvalidSetting):
        Connection(address, "key", 32 * "1", Transcript(None), Event(), told.append)


def test_a_file_that_has_no_certificate_is_refused(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(InvalidSetting, match="--ca"):
        Connection("https://localhost", "key", 32 * "1", Transcript(None), Event(), told.append, tmp_path / "ca.pem")
