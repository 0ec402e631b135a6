"""The API key that a client sends: from a file, or from ``CHAINFED_API_KEY``."""

import os
import re
from pathlib import Path

from chainfed_ray.errors import InvalidSetting

KEY_VARIABLE = "CHAINFED_API_KEY"
_KEY = re.compile(r"[!-~]+")


def read_key(file: Path | None) -> str | None:
    """The API key in a file; None without a file.

    Raises:
        InvalidSetting: the file cannot be read, or has no key.
    """
    if file is None:
        return None
    try:
        return _checked(file.read_text(encoding="utf-8").strip(), "--key-file")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting("--key-file", str(file), f"a file that can be read ({error})") from None


def key_header(key: str | None) -> dict[str, str]:
    """The header with ``key``; without one, with that in ``CHAINFED_API_KEY``; none if there is none.

    Raises:
        InvalidSetting: it is no key.
    """
    key = key or os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {_checked(key, KEY_VARIABLE)}"} if key else {}


def _checked(key: str, where: str) -> str:
    if not _KEY.fullmatch(key):  # the error does not show what may be most of a key
        raise InvalidSetting(where, "…", "a key such as cfr_5d1c…_9f80…, in one line")
    return key
