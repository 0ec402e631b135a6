"""The data set ``builtin:docstrings``: sentences from the docstrings of installed libraries, classified by library.

The text is the first sentence of a docstring, the class is its library. Source files are parsed, never imported, and names that
would give the answer away are masked. The same versions of the libraries give the same rows in the same order.
"""

import ast
import re
import warnings
from collections import deque
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from chainfed_ray.errors import InvalidJob, how_to_get

ROWS_PER_CLASS = 400
# More than ROWS_PER_CLASS, because sentences that occur in two libraries are dropped later.
_GATHERED = 520
_WORDS = range(5, 31)

# Each library, with the names in a sentence that would give it away.
_LIBRARIES = {
    "networkx": ("networkx", "nx"),
    "numpy": ("numpy", "np", "ndarray"),
    "pandas": ("pandas", "pd", "dataframe"),
    "ray": ("ray",),
    "sqlalchemy": ("sqlalchemy", "sql"),
    "sympy": ("sympy",),
    "torch": ("torch", "pytorch", "aten"),
    "transformers": ("transformers", "huggingface", "hugging face"),
}
_MASK = "library"
_BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")  # of a statement: all that may have statements in them


@cache
def rows() -> tuple[tuple[str, str], ...]:
    """(sentence, library) pairs: 400 for each of eight libraries, in the order of a hash.

    Raises:
        InvalidJob: a library is not installed, or has too few docstrings.
    """
    gathered = {library: _gather(library, names) for library, names in _LIBRARIES.items()}
    owners: dict[str, set[str]] = {}
    for library, sentences in gathered.items():
        for key in sentences:
            owners.setdefault(key, set()).add(library)
    chosen = []
    for library, sentences in gathered.items():
        own = [sentence for key, sentence in sentences.items() if len(owners[key]) == 1][:ROWS_PER_CLASS]
        if len(own) < ROWS_PER_CLASS:
            raise InvalidJob.at("data.train", "builtin:docstrings", f"{ROWS_PER_CLASS} docstrings in {library}")
        chosen += [(sentence, library) for sentence in own]
    return tuple(sorted(chosen, key=lambda row: _order(row[0])))


def _gather(library: str, names: tuple[str, ...]) -> dict[str, str]:
    """The library's distinct sentences, by their case-folded form."""
    given_away = re.compile(r"\b(?:" + "|".join(map(re.escape, names)) + r")\w*\b", re.IGNORECASE)
    found: dict[str, str] = {}
    for path in sources(library):
        for docstring in docstrings(path):
            sentence = given_away.sub(_MASK, _first_sentence(docstring))
            if len(sentence.split()) in _WORDS:
                found.setdefault(sentence.casefold(), sentence)
        if len(found) >= _GATHERED:
            break
    return found


def sources(library: str) -> list[Path]:
    """The library's Python files in the order of a hash, so that the first few are a fair sample.

    Raises:
        InvalidJob: the library is not installed.
    """
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise InvalidJob.at(
            "data.train", "builtin:docstrings", f"{library} to be installed: {how_to_get('demo,plots')}"
        )
    root = Path(spec.submodule_search_locations[0])
    names = (path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return [root / name for name in sorted((name for name in names if "test" not in name), key=_order)]


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of the functions and classes in a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # odd escapes in other people's strings
        tree = ast.parse(path.read_bytes())
    # As ast.walk goes, but not into expressions, which are most of a file and have no function in them.
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield text
        for block in _BLOCKS:
            waiting.extend(getattr(node, block, ()))


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?])\s", paragraph, maxsplit=1)[0]


def _order(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=16).digest()
