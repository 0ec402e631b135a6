"""One thing that is wrong with an input, and values as errors show them."""

import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple
from unicodedata import category


class Problem(NamedTuple):
    """One thing that is wrong with an input: the field's path, its value, and the value that was expected."""

    field: str
    value: Any
    expected: str

    def __str__(self) -> str:
        found = "is missing" if self.value is MISSING else f"is {shown(self.value)}"
        return f"{_printable(self.field)} {found}; expected {_printable(self.expected)}"

    def document(self) -> dict[str, str | None]:
        """The problem as JSON. The value is written as Python's ``repr``; it is None if the field is missing."""
        value = None if self.value is MISSING else shown(self.value)
        return {"field": _printable(self.field), "value": value, "expected": _printable(self.expected)}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "Problem":
        """The problem that ``document()`` was called on, in another process. Of the value, only its ``repr`` is known."""
        value = document["value"]
        return cls(str(document["field"]), MISSING if value is None else _Shown(value), str(document["expected"]))


def _printable(text: str) -> str:
    """A text that can be sent and printed, cut: it may quote a user's files, or the keys of a document.

    Names of files may have bytes that are no text, which Python has as surrogates, and characters that a terminal obeys.
    """
    text = "".join(map(_shown_character, text[:_MOST_EXPECTED]))
    return text if len(text) < _MOST_EXPECTED else f"{text[: _MOST_EXPECTED - 1]}…"


def _shown_character(each: str) -> str:
    """A character as it is; or escaped, if a terminal obeys it or nobody sees it. Joiners are part of words and of emojis."""
    kind = category(each)
    hidden = kind in ("Zl", "Zp") or (kind.startswith("C") and each not in _JOINERS)
    return each.encode("unicode_escape").decode() if hidden else each


def some_of(names: Iterable[str], separator: str = ", ") -> str:
    """Names as an error lists them: of many the first few, and how many more there are; or "none". A long one is cut."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    brief = (name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names[:_NAMED])
    return _printable(separator.join(brief) or "none") + more


class _Shown(str):
    """A value that is known by its ``repr`` alone."""

    def __repr__(self) -> str:
        return str(self)


class _Missing:
    """The value of a field that was not given. It has a class of its own because ``None`` is a valid value."""

    def __repr__(self) -> str:
        return "(missing)"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


_BRIEF = reprlib.Repr()  # of lists and mappings: a few entries, a few levels, however large they are
_BRIEF.maxlevel, _BRIEF.maxlist, _BRIEF.maxtuple, _BRIEF.maxset, _BRIEF.maxdict = 3, 10, 10, 10, 10
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 100
_SHOWN = 120  # characters
_JOINERS = "\u200c\u200d"
_MOST_EXPECTED = 5000  # characters of what was expected: more than a list of ten long names has
_NAMED, _LONGEST = 10, 400  # of a list of names, and characters of each: there are reasons among them


def shown(value: Any) -> str:
    """The ``repr`` of a value, cut: what it costs does not depend on the value's size."""
    try:
        text = (
            repr(value[:_SHOWN])
            if type(value) is str
            else _BRIEF.repr(value)
            if isinstance(value, _NESTED)
            else repr(value)
        )
    except ValueError:  # Python writes no integers of more than 4,300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


_NESTED = (list, tuple, dict, set)
