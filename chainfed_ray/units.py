"""Units: bytes, seconds and numbers as people write them (``96MiB``, ``2GB``, ``120s``, ``5m``), and a loss as perplexity."""

import math
import re
import sys

_BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_MOST = 10**18  # a larger integer may have no float
_LARGEST = math.log(sys.float_info.max)
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
# The texts that ``parse_bytes`` and ``parse_seconds`` take, as JSON Schema says it.
BYTES_PATTERN = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(_BYTES)})\s*$"
SECONDS_PATTERN = rf"^\s*[0-9]+(\.[0-9]+)?\s*({'|'.join(_SECONDS)})\s*$"
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(value: object) -> int:
    """``"96MiB"`` → 100663296. A whole number is taken as bytes.

    Raises:
        ValueError: ``value`` is neither a whole number nor a number with a unit of bytes. The message names what is expected.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number, unit = _split(value)
    if unit not in _BYTES:
        raise ValueError("a size such as 96MiB or 2GiB")
    return round(number * _BYTES[unit])


def parse_seconds(value: object) -> float:
    """``"2m"`` → 120.0. A number is taken as seconds.

    Raises:
        ValueError: ``value`` is neither a number nor a number with a unit of time. The message names what is expected.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < _MOST else math.inf
    number, unit = _split(value)
    if unit not in _SECONDS:
        raise ValueError("a duration such as 120s, 5m or 1h")
    return number * _SECONDS[unit]


def _split(value: object) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    return (float(match[1]), match[2]) if match else (0.0, "")


def format_bytes(count: int) -> str:
    """1536 → ``"1.5KiB"``: the largest binary unit in which the number is at least 1, with at most one decimal."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if abs(count) >= _BYTES[unit]:
            return f"{count / _BYTES[unit]:.1f}".removesuffix(".0") + unit
    return f"{count}B"


def format_seconds(seconds: float) -> str:
    """95 → ``"1m 35s"``."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"


def counted(count: int, one: str, many: str) -> str:
    """1 → ``"1 alias"``, 2 → ``"2 aliases"``."""
    return f"{count} {one if count == 1 else many}"


def perplexity(loss: float) -> float:
    """exp(``loss``) of a mean cross-entropy in nats; infinity if that is larger than a float can hold."""
    return math.exp(loss) if loss < _LARGEST else math.inf
