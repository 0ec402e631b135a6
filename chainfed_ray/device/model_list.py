"""Keeps transformers' list of its models between processes, because each would otherwise read the code of all of them.

``import transformers`` reads some 1,600 files to find which class is in which, and its package of models reads them once more:
two seconds of CPU time. What it finds is kept in a file that is named for the places, lengths and times of all of them.
"""

import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import ModuleType
from typing import Any

from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import InvalidSetting

_READER = "transformers.utils.import_utils"  # the module that reads the models' files
_MOST = 4  # lists, of 300 KiB each: of that many installations


def keep_model_list() -> None:
    """Have transformers look for its list of models in a file first. Once transformers is imported, this changes nothing."""
    if _READER not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds the module that reads the models' files, once. ``sys.meta_path`` has this class."""

    @staticmethod
    def find_spec(name: str, path: Any = None, _target: object = None) -> ModuleSpec | None:
        if name != _READER:
            return None
        sys.meta_path.remove(_Finder)
        found = PathFinder.find_spec(name, path)
        if found is None or found.origin is None or type(found.loader) is not SourceFileLoader:
            return found
        return spec_from_file_location(name, found.origin, loader=_Loader(name, found.origin))


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        read = getattr(module, "create_import_structure_from_path", None)
        if read is not None:  # it is no promise of transformers
            module.create_import_structure_from_path = _kept(read)  # type: ignore[attr-defined]


def _kept(read: Callable[[str], Any]) -> Callable[[Any], Any]:
    """As ``read``, which calls itself for the folders in a folder: only of all models is the answer kept."""

    @cache
    def of_all(folder: Path) -> Any:
        with suppress(OSError, ValueError, TypeError, LookupError, InvalidSetting):
            return _decoded(json.loads((_folder() / f"{_digest(folder)}.json").read_bytes()))
        found = read(str(folder))
        with suppress(OSError, InvalidSetting):
            _keep(_folder() / f"{_digest(folder)}.json", json.dumps(_encoded(found)).encode())
        return found

    def answer(place: Any) -> Any:
        path = Path(place)
        folder = path.parent if path.name == "__init__.py" else path
        return of_all(folder) if (folder.name, folder.parent.name) == ("models", "transformers") else read(place)

    return answer


def _folder() -> Path:
    return cache_folder("CHAINFED_MODELS", "models") / "lists"


def _digest(folder: Path) -> str:
    """What the list follows from: the files in ``folder``, and that which reads them."""
    digest = sha256(str(folder).encode())
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        for name in sorted(files):
            found = os.stat(os.path.join(place, name))
            digest.update(f"{place}/{name} {found.st_size} {found.st_mtime_ns}\n".encode())
    reader = os.stat(sys.modules[_READER].__file__ or "")
    digest.update(f"{reader.st_size} {reader.st_mtime_ns}".encode())
    return digest.hexdigest()


def _encoded(found: Any) -> Any:
    """A list for JSON: a dictionary is a list of pairs, a set of names a list in another, and a set as a key is a list."""
    if isinstance(found, dict):
        return [[sorted(key) if isinstance(key, frozenset) else key, _encoded(value)] for key, value in found.items()]
    return {"names": sorted(found)}


def _decoded(kept: Any) -> Any:
    if isinstance(kept, dict):
        return set(kept["names"])
    return {frozenset(key) if isinstance(key, list) else key: _decoded(value) for key, value in kept}


def _keep(file: Path, content: bytes) -> None:
    """Write a file that is whole or not there, and delete the oldest if there are too many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as unfinished:
        try:
            unfinished.write(content)
            unfinished.flush()
            os.replace(unfinished.name, file)
        except OSError:
            os.unlink(unfinished.name)
            raise
    for old in sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-_MOST]:
        old.unlink(missing_ok=True)
