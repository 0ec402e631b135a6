"""A site's connection to the service: requests that it makes itself, over HTTPS. Nothing listens at the site.

A service that does not answer is waited for: it may be starting again. So is one that was upgraded to another version of the
protocol than this site's: it may be brought back. A transfer of tensors goes on where it stopped.
"""

import ssl
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from threading import Event
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from chainfed_ray.errors import InvalidSetting, ServiceFailed, SiteRefused
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.wire.envelope import (
    PROTOCOL,
    Answer,
    AnswerMessage,
    Asking,
    HashedFile,
    Heartbeat,
    Joining,
    Leaving,
    NextOrder,
    Order,
    Received,
    Welcome,
)

Message = TypeVar("Message", bound=BaseModel)
_JOIN = "/v1/site/session"
_PIECE_BYTES = 2**20
_MOST_BYTES = 2**34  # of an order's tensors
_MOST_DOCUMENT_BYTES = 2**26
_TRIES = 5  # of a piece that does not come any further
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_COMES_BACK = (408, 421, 429, 500, 502, 503, 504)  # a service that starts again gives them for a while
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_TRUSTED = "a file with the certificate of the authority that vouches for the service, and its name in the address"
_LOCAL = ("127.0.0.1", "::1", "localhost")


class Withdrawn(Exception):
    """The order is not wanted any more: its job ended, or another process has it."""


class Connection:
    """Requests to the service at ``address`` with the site's ``key``, in the name of this process, ``session``.

    ``authority`` is a file with the certificate of an authority of one's own. ``told`` hears in words when the service does not
    answer, and when it does again. Waiting ends when ``stop`` is set.

    Raises:
        InvalidSetting: the address is no URL, or it sends the key over a network unencrypted; or the certificate is none.
    """

    def __init__(
        self,
        address: str,
        key: str,
        session: str,
        transcript: Transcript,
        stop: Event,
        told: Callable[[str], None],
        authority: Path | None = None,
        insecure: bool = False,
    ) -> None:
        self._session, self._transcript, self._stop, self._told = session, transcript, stop, told
        self._address = _checked(address, insecure)
        self._authority = str(authority or "")
        self._http = httpx.Client(
            base_url=self._address,
            headers={"Authorization": f"Bearer {key}", "User-Agent": "chainfed-ray"},
            timeout=_TIMEOUT,
            verify=_verified_by(authority),
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def join(self, version: str, site: str) -> None:
        """Begin to take the orders of ``site``.

        Raises:
            InvalidSetting: the service's certificate is not trusted. A site that has joined waits for a better one.
            SiteRefused: the service does not know the key, knows it as that of another site, or speaks another version.
        """
        try:
            joining = Joining(protocol=PROTOCOL, session=self._session, version=version, site=site)
        except ValidationError:
            raise InvalidSetting("--site", site, "the name that `chainfed sites add` was given") from None
        if (known := self._read(Welcome, self._post(_JOIN, joining)).site) != site:
            raise SiteRefused(f"{self._address} refuses this site: the key is that of {known}, and not of {site}")

    def leave(self) -> None:
        """Give back every order that this process has taken. The service is not waited for."""
        leaving = Leaving(session=self._session)
        self._transcript.sent("POST", "/v1/site/leave", leaving.model_dump(mode="json"))
        try:
            self._http.post("/v1/site/leave", json=leaving.model_dump(mode="json"), timeout=5.0)
        except httpx.HTTPError:
            self._told("The service did not hear that this site leaves; it notices when the site comes back.")

    def next(self, wait: float, running: Collection[str], jobs: Collection[str]) -> NextOrder:
        """The next order, if one comes within ``wait`` seconds; and which of ``jobs`` are over.

        ``running`` are the orders that this process has.
        """
        asking = Asking(
            session=self._session,
            protocol=PROTOCOL,
            wait=wait,
            running=tuple(sorted(running)),
            jobs=tuple(sorted(jobs)),
        )
        return self._read(NextOrder, self._post("/v1/site/orders/next", asking))

    def heartbeat(self, order: str, doing: Mapping[str, Any]) -> None:
        """Say how far the turn of ``order`` is.

        Raises:
            Withdrawn: the order is not wanted any more.
        """
        self._post(f"/v1/site/orders/{order}/heartbeat", Heartbeat(session=self._session, **doing))

    def fetch(self, order: Order, folder: Path) -> Path | None:
        """The file of the order's tensors, in ``folder``. A file that is there already is not fetched again.

        Raises:
            Withdrawn: the order is not wanted any more.
        """
        if order.tensors is None:
            return None
        file = folder / f"{order.tensors.sha256}.safetensors"
        return self._fetched(order, "tensors", order.tensors, file, _MOST_BYTES)

    def fetch_document(self, order: Order, folder: Path) -> Path:
        """The file of the document of the order's job, in ``folder``. See ``fetch``."""
        file = folder / f"{order.document.sha256}.json"
        return self._fetched(order, "document", order.document, file, _MOST_DOCUMENT_BYTES)

    def _fetched(self, order: Order, what: str, described: HashedFile, file: Path, most: int) -> Path:
        """``file``, fetched unless it is there: what an order has. It may have ``most`` bytes."""
        partial = file.with_suffix(".partial")
        if file.exists():
            if HashedFile.of(file) == described:
                file.touch()  # it is of use
                return file
            file.unlink()  # the site's disk has damaged it
        file.parent.mkdir(parents=True, exist_ok=True)
        if described.size > most:
            raise ServiceFailed(self._address, f"the {what} of an order are {described.size} bytes", "-")
        tries = 0
        while tries < _TRIES:
            have = partial.stat().st_size if partial.exists() else 0
            if have < described.size:
                tries += not self._fetch_rest(f"/v1/site/orders/{order.id}/{what}", partial, have)
            elif HashedFile.of(partial) == described:
                return partial.replace(file)
            else:  # a piece of another file
                partial.unlink()
                tries += 1
        raise ServiceFailed(self._address, f"the {what} of order {order.id} do not arrive", "-")

    def send(self, order: str, tensors: Path) -> None:
        """Send the file ``tensors`` of an answer in pieces.

        Each answer says how much has arrived, so a transfer that was cut off goes on from there after one piece.

        Raises:
            Withdrawn: the order is not wanted any more.
        """
        path, size = f"/v1/site/orders/{order}/tensors", tensors.stat().st_size
        self._transcript.sent_tensors(path, tensors)
        with tensors.open("rb") as opened:
            sent = tries = 0
            while sent < size and tries < _TRIES:
                opened.seek(sent)
                piece = opened.read(_PIECE_BYTES)
                answer = self._request("PUT", path, content=piece, params={"offset": sent, "session": self._session})
                received = self._read(Received, answer).received
                tries += received <= sent
                sent = received
        if sent < size:
            raise ServiceFailed(self._address, f"the tensors of order {order} are not kept", "-")

    def answer(self, order: str, answer: Answer) -> None:
        """Give the answer of ``order``. It counts once, however often it is given.

        Raises:
            Withdrawn: the order is not wanted any more.
        """
        self._post(f"/v1/site/orders/{order}/answer", AnswerMessage(session=self._session, answer=answer))

    def _read(self, kind: type[Message], answer: httpx.Response) -> Message:
        """What an answer says; it may be of a proxy, which answers as if it were the service."""
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            raise ServiceFailed(
                self._address, f"its answer cannot be read: {error.error_count()} errors", "-"
            ) from None

    def _post(self, path: str, body: BaseModel) -> httpx.Response:
        document = body.model_dump(mode="json")
        self._transcript.sent("POST", path, document)
        return self._request("POST", path, json=document)

    def _fetch_rest(self, path: str, partial: Path, have: int) -> bool:
        """Fetch the next piece. False if nothing came."""
        end = have + _PIECE_BYTES - 1
        answer = self._request("GET", path, headers={"Range": f"bytes={have}-{end}"})
        with partial.open("ab") as opened:
            opened.write(answer.content)
        return bool(answer.content)

    def _request(self, method: str, path: str, **given: Any) -> httpx.Response:
        """Make a request, again and again until the service answers it, or the site leaves."""
        pause, said = _FIRST_PAUSE, set[bool]()
        while True:
            if self._stop.is_set():
                raise Withdrawn("the site leaves")
            other = False
            try:
                answer = self._http.request(method, path, **given)
                other = answer.status_code == httpx.codes.UPGRADE_REQUIRED and path != _JOIN
                reason = _detail(answer) if other else f"it answered {answer.status_code}"
                if not other and not _comes_back(answer):
                    if said:
                        self._told("The service answers again.")
                    return _understood(answer, self._address)
            except httpx.RequestError as error:
                if path == _JOIN and (distrust := _distrust(error)):
                    raise InvalidSetting("--ca", self._authority, f"{_TRUSTED} ({distrust})") from None
                reason = str(error) or type(error).__name__
            if other not in said:  # a service that is upgraded is silent first, and then of another version
                what = "waits for sites of another version" if other else "does not answer"
                self._told(f"{self._address} {what} ({reason}); waiting for it.")
                said.add(other)
            if self._stop.wait(pause):
                raise Withdrawn("the site leaves")
            pause = min(2 * pause, _LONGEST_PAUSE)


def _distrust(error: BaseException | None) -> str | None:
    """Why the service's certificate is not trusted; None if a request failed for another reason."""
    while error:
        if isinstance(error, ssl.SSLCertVerificationError):
            return error.verify_message
        error = error.__cause__ or error.__context__
    return None


def _comes_back(answer: httpx.Response) -> bool:
    """True if the answer is that of a service which starts again, or of a proxy before it."""
    ours = answer.headers.get("content-type", "").startswith("application/problem+json")
    return answer.status_code in _COMES_BACK or (answer.status_code in (403, 404) and not ours)


def _detail(answer: httpx.Response) -> str:
    """What the service says of an error, in words."""
    try:
        return str(answer.json().get("detail", answer.text))[:500]
    except (ValueError, AttributeError):
        return answer.text[:500]


def _understood(answer: httpx.Response, address: str) -> httpx.Response:
    if answer.is_success:
        return answer
    detail = _detail(answer)
    if answer.status_code == httpx.codes.GONE:
        raise Withdrawn(detail)
    if answer.status_code in (401, 403, 404, 409, 426):
        raise SiteRefused(f"{address} refuses this site: {detail}")
    raise ServiceFailed(address, f"{answer.status_code}: {detail}", answer.headers.get("x-request-id", "-"))


def _checked(address: str, insecure: bool) -> str:
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise InvalidSetting("address", address, "a URL such as https://chainfed.example.org")
    if parts.scheme == "http" and host not in _LOCAL and not insecure:
        expected = "https://…, since the key and all updates would cross the network unencrypted; or --insecure"
        raise InvalidSetting("address", address, expected)
    return address.rstrip("/")


def _verified_by(authority: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(authority) if authority else None)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSetting("--ca", str(authority), f"a file with certificates in PEM's form ({error})") from None
