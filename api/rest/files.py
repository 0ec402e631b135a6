"""Files as answers: whole, or the part that ``Range`` asks for, so that a download goes on where it was cut (RFC 9110, 14)."""

import re
from pathlib import Path
from typing import Annotated

from fastapi import Header, HTTPException
from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

_RANGE = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))", re.IGNORECASE)
_ASKED = (b"range", b"if-range")

Range = Annotated[
    str | None,
    Header(
        alias="Range",
        description="the part to send, such as `bytes=1000-` or `bytes=-500`; several parts, or other units, are ignored",
    ),
]
IfRange = Annotated[
    str | None,
    Header(alias="If-Range", description="the `ETag` that the file must still have, or it is sent as a whole"),
]


class SentFile(FileResponse):
    """Sends a file with an ``ETag``. Raises ``gone`` if it is deleted before its first byte is read: nothing is sent by then.

    Raises:
        FileNotFoundError: it is not there.
    """

    def __init__(self, path: Path, media_type: str, gone: Exception, tag: str | None = None) -> None:
        headers = {"Cache-Control": "private, no-cache"} | ({"ETag": tag} if tag else {})
        super().__init__(path, media_type=media_type, headers=headers, stat_result=path.stat())
        self._gone = gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (the ASGI protocol)."""
        waiting: list[Message] = []

        async def send_with_bytes(message: Message) -> None:
            if message["type"] == "http.response.start":
                waiting.append(message)
                return
            while waiting:
                await send(waiting.pop())
            await send(message)

        part = self._part(scope)
        others = [pair for pair in scope["headers"] if pair[0] not in _ASKED]
        asked = [] if part is None else [(b"range", b"bytes=%d-%d" % part)]
        try:
            await super().__call__({**scope, "headers": [*others, *asked]}, receive, send_with_bytes)
        except FileNotFoundError:
            raise self._gone from None

    def _part(self, scope: Scope) -> tuple[int, int] | None:
        """The first and the last byte that are asked for; None for the whole file, also if what is asked is not understood.

        Raises:
            HTTPException: 416, if the file has no such part.
        """
        headers, size = Headers(scope=scope), int(self.headers["content-length"])
        given = headers.getlist("range")
        match = _RANGE.fullmatch(given[0].strip()) if len(given) == 1 and scope["method"] == "GET" else None
        # A date says too little: it is that of a copy on this machine. Nor does a weak tag.
        if match is None or headers.get("if-range", self.headers["etag"]) != self.headers["etag"]:
            return None
        first, last, count = (int(number) if number else None for number in match.groups())
        if first is None:
            first, last = max(size - (count or 0), 0), size - 1
        elif last is not None and last < first:
            return None
        if first >= size:
            detail = f"the file has {size} bytes; the range {match[0]} is none of them"
            raise HTTPException(416, detail, {"Content-Range": f"bytes */{size}"})
        return first, size - 1 if last is None else min(last, size - 1)
