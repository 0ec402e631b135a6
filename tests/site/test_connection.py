"""A site waits for its service, and transfers go on where they stopped."""

import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import httpx
import pytest

from chainfed_ray.errors import InvalidSetting, ServiceFailed, SiteRefused
from chainfed_ray.site import connection
from chainfed_ray.site.connection import Connection, Withdrawn
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.wire.envelope import HashedFile, Order

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

    connect(answering).join("1.0", "a")
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


@pytest.mark.parametrize("arrived", [0, 300])
def test_tensors_are_sent_from_where_a_transfer_stopped(
    connect: Callable[[Answering], Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrived: int
) -> None:
    """Nothing is asked beforehand: the first answer says what has arrived."""
    whole, there = bytes(range(250)) * 10, bytearray((bytes(range(250)) * 10)[:arrived])
    (tmp_path / "sent").write_bytes(whole)
    monkeypatch.setattr(connection, "_PIECE_BYTES", 1000)
    lost, requests = iter([True]), list[str]()

    def answering(request: httpx.Request) -> httpx.Response:
        requests.append(request.method)
        if int(request.url.params["offset"]) == len(there):
            there.extend(request.content)
        if next(lost, False):  # what arrived is kept, and the answer is lost
            raise httpx.ReadError("cut off")
        return httpx.Response(200, json={"received": len(there)})

    connect(answering).send(32 * "2", tmp_path / "sent")
    assert bytes(there) == whole
    assert requests == ["PUT"] * (4 if arrived == 0 else 5)


@pytest.mark.parametrize(("status", "raised"), [(410, Withdrawn), (401, SiteRefused), (409, SiteRefused)])
def test_a_refusal_is_not_tried_again(
    connect: Callable[[Answering], Connection], status: int, raised: type[Exception]
) -> None:
    with pytest.raises(raised, match="why"):
        connect(lambda request: httpx.Response(status, json={"detail": "why"})).next(0, [], [])


def test_a_service_that_is_upgraded_to_another_version_is_waited_for_and_a_new_process_is_told(
    connect: Callable[[Answering], Connection], told: list[str]
) -> None:
    answers = [httpx.ConnectError("refused"), 426, 426]

    def answering(request: httpx.Request) -> httpx.Response:
        answer = answers.pop(0) if answers else 200
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer, json={"detail": "version 2, and this service 3"} if answer == 426 else {})

    connect(answering).next(0, [], [])
    assert told == [
        "http://localhost does not answer (refused); waiting for it.",
        "http://localhost waits for sites of another version (version 2, and this service 3); waiting for it.",
        "The service answers again.",
    ]
    answers.append(426)
    with pytest.raises(SiteRefused, match="version 2"):
        connect(answering).join("1.0", "a")


def test_a_page_of_a_proxy_ends_no_site(connect: Callable[[Answering], Connection], tmp_path: Path) -> None:
    (tmp_path / "sent").write_bytes(b"tensors")
    made = connect(lambda request: httpx.Response(200, text="<html>please log in</html>"))
    with pytest.raises(ServiceFailed):
        made.next(0, [], [])
    with pytest.raises(ServiceFailed):
        made.send(32 * "2", tmp_path / "sent")


@pytest.mark.parametrize("address", ["http://example.org", "ftp://example.org", "example.org", "http://[", ""])
def test_an_address_that_would_send_the_key_unencrypted_is_refused(address: str, told: list[str]) -> None:
    with pytest.raises(InvalidSetting):
        Connection(address, "key", 32 * "1", Transcript(None), Event(), told.append)


def test_a_service_whose_certificate_nobody_vouches_for_is_not_waited_for(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = ["-newkey", "rsa:2048", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "own", "-subj", "/CN=site"]
    subprocess.run(["openssl", "req", "-x509", *made], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own", tmp_path / "key")

    def greet(listener: socket.socket) -> None:
        with listener.accept()[0] as accepted, suppress(OSError):
            context.wrap_socket(accepted, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as service:
        service.submit(greet, listener)
        address = f"https://127.0.0.1:{listener.getsockname()[1]}"
        connected = Connection(address, "key", 32 * "1", Transcript(None), Event(), told.append)
        with pytest.raises(InvalidSetting, match=r"--ca is ''; expected .* \(self-signed certificate\)"):
            connected.join("1.0", "a")
        connected.close()
    assert told == []


def test_a_file_that_has_no_certificate_is_refused(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "ca.pem").write_text("none")
    with pytest.raises(InvalidSetting, match="--ca"):
        Connection("https://localhost", "key", 32 * "1", Transcript(None), Event(), told.append, tmp_path / "ca.pem")
