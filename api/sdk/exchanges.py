"""What takes several requests, or one whose answer comes bit by bit. Each is described once, as steps that either client takes.

An exchange yields a step, and is sent what came of it, or has the step's error raised where it yields. It goes on where a
connection broke, and it holds none itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Generic
from urllib.parse import quote

from chainfed_ray.activity import Activity, Listener, Reporter, no_listener
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.calls import UPLOAD, Answer, Call, Json, Model
from chainfed_ray.errors import (
    ChainFedError,
    InvalidJob,
    ModelNotFound,
    ServiceFailed,
    ServiceUnavailable,
    UploadConflict,
)

if TYPE_CHECKING:
    from chainfed_ray.api.schemas.completions import CompletionChoice
    from chainfed_ray.api.schemas.events import EventResource
    from chainfed_ray.api.schemas.models import ClassifyResponse
    from chainfed_ray.api.schemas.uploads import UploadResource
    from chainfed_ray.records.log_line import LogLine

_GIVE_UP_SECONDS = 120.0  # a service that fails starts again within a minute, on an idle machine
_PAUSE_SECONDS = 0.5
_COMES_BACK = (429, 502, 503, 504)
_NO_CONTENT, _PARTIAL, _NO_SUCH_RANGE = 204, 206, 416
_PIECE_BYTES = 32 * 2**20  # of a request
_BLOCK_BYTES = 2**20  # that are in memory at once
_LOG_WAIT_SECONDS = 20  # for the next line of a log
_TEXTS_PER_REQUEST = 128  # the service accepts up to 256 …
_CHARACTERS_PER_REQUEST = 400_000  # … of up to 500,000 characters in all
_STREAM = {"Accept": "text/event-stream"}


@dataclass(frozen=True)
class Pause:
    """A step: wait."""

    seconds: float = _PAUSE_SECONDS


@dataclass(frozen=True)
class Read:
    """A step: call what reads a whole file, beside an event loop. What comes of it is what that returns."""

    file: Callable[[], Any]


@dataclass(frozen=True)
class Open:
    """A step: ask for what comes bit by bit. What comes of it is ``Opened``."""

    path: str
    about: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Json | None = None  # with one it is a POST
    in_lines: bool = True
    seconds: float | None = 150.0  # that may pass without a byte


@dataclass(frozen=True)
class Opened:
    """The status of what was opened at the service at ``address``, with what it means if it is an error."""

    address: str
    status: int
    request: str
    error: ChainFedError | None


@dataclass(frozen=True)
class Next:
    """A step: the next line, or block of bytes, of what was opened last. None of it comes after the last."""


@dataclass(frozen=True)
class Give:
    """A step: hand ``item``, as JSON, to whoever asked for the exchange."""

    item: Any


class _Patience:
    """Ends when the service has failed for a while: not when it was silent, or its answers were read slowly."""

    def __init__(self) -> None:
        self._failing_since: float | None = None

    def renew(self) -> None:
        self._failing_since = None

    def ends(self) -> bool:
        """Whether it ends with the failure of this moment."""
        now = monotonic()
        if self._failing_since is None:
            self._failing_since = now
        return now - self._failing_since > _GIVE_UP_SECONDS


Steps = Generator[Call[Any] | Pause | Read | Open | Next | Give, Any, Any]


@dataclass(frozen=True)
class Exchange(Generic[Answer]):
    """Steps, and the model of what they give."""

    steps: Steps
    answer: Model[Answer]


_EVENT: Model[EventResource] = Model("api.schemas.events", "EventResource")
_LINE: Model[LogLine] = Model("records.log_line", "LogLine")
_CHOICE: Model[CompletionChoice] = Model("api.schemas.completions", "CompletionChoice")
_LABELS: Model[ClassifyResponse] = Model("api.schemas.models", "ClassifyResponse")
_NOTHING: Model[None] = Model("", "")


def events(job: str, after: int = 0, listen: Listener = no_listener) -> Exchange[EventResource]:
    """Every event of a job with a number above ``after``, as they happen, until the job is over.

    It reconnects when the connection breaks, or the service is busy or starts again. Between events, ``listen`` is told what
    the job is doing.

    Raises:
        JobNotFound: there is no such job.
    """
    return Exchange(_events(job, after, listen), _EVENT)


def logs(job: str, follow: bool = False) -> Exchange[LogLine]:
    """The lines of a job's log; with ``follow`` until the job is over, as they come.

    Raises:
        JobNotFound: there is no such job.
    """
    return Exchange(_logs(job, follow), _LINE)


def texts(model: str, prompts: Sequence[str], **options: Any) -> Exchange[CompletionChoice]:
    """What ``calls.completions`` asks for, each piece of text as it is generated. To close it stops the generation.

    Raises:
        ModelNotFound: no such model is served.
        InvalidJob: the model is not a language model, or an option or a prompt is invalid.
    """
    body = {"model": model, "prompt": list(prompts), "stream": True, **options}
    return Exchange(_naming_models(_texts(model, body)), _CHOICE)


def labels(model: str, asked: Sequence[str]) -> Exchange[ClassifyResponse]:
    """The one answer for any number of texts to classify. Many are split over several requests.

    Raises:
        ModelNotFound: no such model is served.
        InvalidJob: there are no texts, or one is too long.
    """
    return Exchange(_naming_models(_labels(model, asked)), _LABELS)


def upload(file: Path, name: str | None = None, listen: Listener = no_listener) -> Exchange[UploadResource]:
    """Send a file of rows. It gives the upload, which a job reads as ``upload:<id>``.

    One that was sent before is found, and one of which a part was sent is gone on with; so is one whose connection breaks.

    Raises:
        InvalidJob: the service does not take a file of this name, or the file changed while it was sent.
        OSError: the file cannot be read.
    """
    return Exchange(_upload(file, name or file.name, listen), UPLOAD)


def download(job: str, name: str, digest: str, out: Path) -> Exchange[None]:
    """Write an artifact to ``out``. It is there as a whole, with the SHA-256 ``digest``, which ``calls.list_artifacts`` has.

    What was received before a connection broke, or by a call that was killed, is not asked for again.

    Raises:
        JobNotFound: there is no such job.
        ArtifactNotFound: the job has no such artifact any more.
        ServiceFailed: it is another one by now, or the service fails, and does not work again within two minutes.
        OSError: the file cannot be written.
    """
    return Exchange(_download(job, name, digest, out), _NOTHING)


def answer(call: Call[Answer]) -> Exchange[Answer]:
    """The answer of one call. A model that is not there is refused with the names of those that are."""
    return Exchange(_naming_models(_answer(call)), call.answer)


def _answer(call: Call[Any]) -> Steps:
    yield Give((yield call))


def _naming_models(steps: Steps) -> Steps:
    try:
        yield from steps
    except ModelNotFound as error:
        served = yield calls.list_models()
        whole = (model["name"] for model in served["models"] if model.get("layers") is None)
        raise ModelNotFound(error.model, tuple(whole), error.alias) from None


def _events(job: str, last: int, listen: Listener) -> Steps:
    path, patience = f"/v1/jobs/{quote(job, safe='')}/events", _Patience()
    while True:
        try:
            opened: Opened = yield Open(path, job, {**_STREAM, "Last-Event-ID": str(last)})
            if opened.status == _NO_CONTENT:
                return
            if opened.error and (opened.status not in _COMES_BACK or patience.ends()):
                raise opened.error
            while not opened.error and (line := (yield Next())) is not None:
                patience.renew()
                if not line.startswith("data: "):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if event["kind"] == "activity":
                    listen(Activity.model_validate(event["data"]))
                else:
                    last = event["seq"]
                    yield Give(event)
        except ServiceUnavailable:
            if patience.ends():
                raise
        yield Pause()


def _logs(job: str, follow: bool) -> Steps:
    after, patience = 0, _Patience()
    while True:
        try:
            page: Json = yield calls.get_logs(job, after, wait=_LOG_WAIT_SECONDS if follow else 0)
        except (ServiceUnavailable, ServiceFailed):
            if not follow or patience.ends():
                raise
            yield Pause()
            continue
        patience.renew()
        after = page["next"]
        for line in page["lines"]:
            yield Give(line)
        if page["finished"] or not (follow or page["lines"]):
            return


def _texts(model: str, body: Json) -> Steps:
    opened: Opened = yield Open("/v1/completions", model, body=body, seconds=None)  # a long text may take any time
    if opened.error:
        raise opened.error
    while (line := (yield Next())) != "data: [DONE]":
        if line is None:
            raise ServiceUnavailable(opened.address, "its answer ended before it was whole")
        if not line.startswith("data: "):
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise ServiceFailed(opened.address, chunk["error"]["message"], opened.request)
        for choice in chunk["choices"]:
            yield Give(choice)


def _labels(model: str, asked: Sequence[str]) -> Steps:
    answers = []
    for part in _parts(asked):
        found: Json = yield calls.classify(model, part)
        answers.append(found)
    yield Give({**answers[0], "results": [label for found in answers for label in found["results"]]})


def _parts(asked: Collection[str]) -> Iterator[list[str]]:
    """The texts of each request; one request without texts, if there are none."""
    part: list[str] = []
    for text in asked:
        characters = sum(map(len, part)) + len(text)
        if part and (len(part) == _TEXTS_PER_REQUEST or characters > _CHARACTERS_PER_REQUEST):
            yield part
            part = []
        part.append(text)
    yield part


def _upload(file: Path, name: str, listen: Listener) -> Steps:
    report, size = Reporter(f"reading {file.name}", listen), file.stat().st_size
    report.begin()
    digest: str = yield Read(partial(_digest, file))
    upload: Json = yield calls.begin_upload(name, size, digest)
    heard = monotonic()
    while not upload["complete"]:
        before = upload["received"]
        Reporter(f"sending {file.name}: {before * 100 // size} %", listen).begin()
        if file.stat().st_size < before:
            raise _changed(file, size)
        try:
            upload = yield calls.put_content(upload["id"], before, _blocks(file, before))
            if upload["received"] <= before and not upload["complete"]:
                raise _changed(file, size)
        except (ServiceUnavailable, ServiceFailed, UploadConflict):
            if monotonic() - heard > _GIVE_UP_SECONDS:
                raise
            yield Pause()
            try:
                upload = yield calls.get_upload(upload["id"])
            except (ServiceUnavailable, ServiceFailed):
                continue
        if upload["received"] != before:
            heard = monotonic()
    yield Give(upload)


def _download(job: str, name: str, digest: str, out: Path) -> Steps:
    out.parent.mkdir(parents=True, exist_ok=True)
    arriving = out.with_name(f"{out.name}.{digest[:16]}.partial")
    heard, most = monotonic(), _size(arriving)
    while True:
        try:
            opened: Opened = yield from _receive(job, name, digest, arriving)
            break
        except (ServiceUnavailable, ServiceFailed):
            if (bytes_here := _size(arriving)) > most:
                heard, most = monotonic(), bytes_here
            elif monotonic() - heard > _GIVE_UP_SECONDS:
                raise
            yield Pause()
    found: str = yield Read(partial(_digest, arriving))
    if found != digest:
        arriving.unlink()
        why = f"{name} is not the file that the list names; list it again"
        raise ServiceFailed(opened.address, why, opened.request)
    arriving.replace(out)


def _receive(job: str, name: str, digest: str, arriving: Path) -> Steps:
    """Receive what ``arriving`` lacks of a file. Returns what was opened."""
    path = f"/v1/jobs/{quote(job, safe='')}/artifacts/{quote(name)}"
    with arriving.open("ab") as file:
        headers = {"If-Range": f'"{digest}"', "Range": f"bytes={file.tell()}-"} if file.tell() else {}
        opened: Opened = yield Open(path, f"{job}/{name}", headers, in_lines=False)
        if opened.status == _NO_SUCH_RANGE:
            return opened  # all of it is here
        if opened.error:
            raise opened.error
        if opened.status != _PARTIAL:
            file.truncate(0)
        while (block := (yield Next())) is not None:
            file.write(block)
    return opened


def _changed(file: Path, size: int) -> InvalidJob:
    return InvalidJob.at("file", str(file), f"a file that stays as it is while it is sent; it had {size} bytes")


def _size(file: Path) -> int:
    """The bytes of a file; 0 if it is not there."""
    return file.stat().st_size if file.exists() else 0


def _digest(file: Path) -> str:
    found = sha256()
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def _blocks(file: Path, offset: int) -> Iterator[bytes]:
    """The next piece of a file, in blocks."""
    with file.open("rb") as opened:
        opened.seek(offset)
        left = _PIECE_BYTES
        while left and (block := opened.read(min(_BLOCK_BYTES, left))):
            left -= len(block)
            yield block
