"""What a site has sent, written down for people: one line of JSON for each request."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import safe_open


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


class Transcript:
    """Appends to ``file`` what is sent; without a file it keeps nothing."""

    def __init__(self, file: Path | None) -> None:
        self._file = open(file, "a", encoding="utf-8", buffering=1, opener=_for_its_owner) if file else None  # noqa: SIM115
        self._lock = Lock()

    def sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> None:
        """Write down a request and its ``body``."""
        self._write({"method": method, "path": path, "body": body})

    def sent_tensors(self, path: str, tensors: Path) -> None:
        """Write down that a file of tensors is sent: the names and shapes in it."""
        if self._file is None:
            return
        with safe_open(tensors, "numpy") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118  no mapping
        size = tensors.stat().st_size
        self._write({"method": "PUT", "path": path, "tensors": shapes, "bytes": size})

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        with self._lock:
            self._file.write(json.dumps({"at": datetime.now(UTC).isoformat(timespec="milliseconds"), **line}) + "\n")
