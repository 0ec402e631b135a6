"""The service as a Python object that also takes files, and gives them."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import quote

import httpx

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.api.client.service_client import JsonObject, ServiceClient
from chainfed_ray.errors import InvalidJob, ServiceFailed, ServiceUnavailable, UploadConflict

_PIECE_BYTES = 32 * 2**20  # of a request
_BLOCK_BYTES = 2**20  # that are in memory at once
_GIVE_UP_SECONDS = 120.0  # without a byte that arrives
_PAUSE_SECONDS = 0.5
_LOG_WAIT_SECONDS = 20  # for the next line of a log


class FileClient(ServiceClient):
    """See ``ServiceClient``."""

    def add_upload(self, file: Path, name: str | None = None, listen: Listener = no_listener) -> JsonObject:
        """Send a file of rows. Returns the upload, which a job reads as ``upload:<id>``.

        One that was sent before is found, and one of which a part was sent is gone on with; so is one whose connection breaks.

        Raises:
            InvalidJob: the service does not take a file of this name, or the file changed while it was sent.
            OSError: the file cannot be read.
        """
        report, size = Reporter(f"reading {file.name}", listen), file.stat().st_size
        report.begin()
        body = {"name": name or file.name, "bytes": size, "sha256": _digest(file)}
        upload = self._ask("POST", "/v1/uploads", json=body)
        heard = monotonic()
        while not upload["complete"]:
            Reporter(f"sending {file.name}: {upload['received'] * 100 // size} %", listen).begin()
            before = upload["received"]
            if file.stat().st_size < before:
                raise _changed(file, size)
            try:
                upload = self._put_piece(upload["id"], file, before)
                if upload["received"] <= before and not upload["complete"]:
                    raise _changed(file, size)
            except (ServiceUnavailable, ServiceFailed, UploadConflict) as error:
                if monotonic() - heard > _GIVE_UP_SECONDS:
                    raise error
                sleep(_PAUSE_SECONDS)
                upload = self._found(upload)
            if upload["received"] != before:
                heard = monotonic()
        return upload

    def uploads(self, limit: int = 50) -> list[JsonObject]:
        """At most ``limit`` uploads, the newest first."""
        uploads: list[JsonObject] = self._ask("GET", "/v1/uploads", params={"limit": limit})["uploads"]
        return uploads

    def upload(self, upload: str) -> JsonObject:
        """An upload, with how many of its bytes have arrived.

        Raises:
            UploadNotFound: there is no such upload.
        """
        return self._ask("GET", f"/v1/uploads/{upload}", about=upload)

    def delete_upload(self, upload: str) -> None:
        """Delete an upload.

        Raises:
            UploadNotFound: there is no such upload.
            UploadConflict: a job that is not over reads it.
        """
        self._answer("DELETE", f"/v1/uploads/{upload}", about=upload)

    def artifacts(self, job: str) -> list[JsonObject]:
        """What a job has left: each file with its name, size and SHA-256.

        Raises:
            JobNotFound: there is no such job.
        """
        artifacts: list[JsonObject] = self._ask("GET", f"/v1/jobs/{job}/artifacts", about=job)["artifacts"]
        return artifacts

    def download(self, job: str, artifact: JsonObject, out: Path) -> None:
        """Write an artifact, as ``artifacts`` lists it, to ``out``. It is there as a whole, with the SHA-256 of the list.

        What was received before a connection broke, or by a call that was killed, is not asked for again.

        Raises:
            JobNotFound: there is no such job.
            ArtifactNotFound: the job has no such artifact any more.
            ServiceFailed: it is another one by now.
            OSError: the file cannot be written.
        """
        name, digest = artifact["name"], artifact["sha256"]
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f"{out.name}.{digest[:16]}.partial")
        heard, most = monotonic(), _size(partial)
        while True:
            try:
                self._fetch(f"/v1/jobs/{job}/artifacts/{quote(name)}", f"{job}/{name}", digest, partial)
                break
            except ServiceUnavailable:
                if (received := _size(partial)) > most:
                    heard, most = monotonic(), received
                elif monotonic() - heard > _GIVE_UP_SECONDS:
                    raise
                sleep(_PAUSE_SECONDS)
        if _digest(partial) != digest:
            partial.unlink()
            raise ServiceFailed(self._address, f"{name} is not the file that the list names; list it again", "")
        partial.replace(out)

    def logs(self, job: str, follow: bool = False) -> Iterator[JsonObject]:
        """Yield the lines of a job's log; with ``follow`` until the job is over, as they come.

        Raises:
            JobNotFound: there is no such job.
        """
        after, heard = 0, monotonic()
        while True:
            where = {"after": after, "wait": _LOG_WAIT_SECONDS if follow else 0}
            try:
                page = self._ask("GET", f"/v1/jobs/{job}/logs", about=job, params=where)
            except (ServiceUnavailable, ServiceFailed):
                if not follow or monotonic() - heard > _GIVE_UP_SECONDS:
                    raise
                sleep(_PAUSE_SECONDS)
                continue
            after, heard = page["next"], monotonic()
            yield from page["lines"]
            if page["finished"] or not (follow or page["lines"]):
                return

    def _fetch(self, path: str, about: str, digest: str, partial: Path) -> None:
        """Receive what ``partial`` lacks of a file."""
        with partial.open("ab") as file:
            headers = {"If-Range": f'"{digest}"', "Range": f"bytes={file.tell()}-"} if file.tell() else {}
            try:
                with self._http.stream("GET", path, headers=headers) as response:
                    if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                        return  # all of it is here
                    if response.is_error:
                        response.read()
                        self._fail(response, about)
                    if response.status_code != httpx.codes.PARTIAL_CONTENT:
                        file.truncate(0)
                    for block in response.iter_bytes():
                        file.write(block)
            except httpx.TransportError as error:
                raise ServiceUnavailable(self._address, str(error) or type(error).__name__) from None

    def _put_piece(self, upload: str, file: Path, offset: int) -> JsonObject:
        path, where = f"/v1/uploads/{upload}/content", {"offset": offset}
        return self._ask("PUT", path, about=upload, params=where, content=_blocks(file, offset))

    def _found(self, upload: JsonObject) -> JsonObject:
        """The upload as the service has it; as it was, if no service answers now."""
        try:
            return self.upload(upload["id"])
        except (ServiceUnavailable, ServiceFailed):
            return upload


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
