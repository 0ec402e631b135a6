"""Keeps what is found out about models on disk: each process that plans a job would otherwise trace them for seconds.

A memory profile, or that a check was passed, follows from the model's settings, the forms of its tensors, the question that
was asked, the versions of the libraries and the code of this project. Its file is named for all of them, so what is found is
never out of date.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from tempfile import NamedTemporaryFile

from pydantic import TypeAdapter, ValidationError

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.cache_folder import cache_folder
from chainfed_ray.errors import InvalidSetting

_MOST = 256  # files of some ten KiB; a job that asks for yet another bottleneck must not fill the disk
_PROFILE = TypeAdapter(MemoryProfile)
_PASSED = b'"passed"\n'
_CODE = ("*.py", "budget/*.py", "model/*.py", "streaming/*.py")  # what a profile follows from


def kept_profile(model: Path, question: str, trace: Callable[[], MemoryProfile]) -> MemoryProfile:
    """The profile of the base model in the folder ``model``: the one that is kept, or what ``trace`` gives.

    ``question`` is all else that ``trace`` depends on. No folder, one that cannot be written, or a damaged file costs the time
    to trace again, and nothing else.
    """
    name = sha256(_model(model) + question.encode() + _libraries()).hexdigest()
    with suppress(OSError, ValidationError, InvalidSetting):
        return _PROFILE.validate_json(_file(name).read_bytes())
    found = trace()
    with suppress(OSError, InvalidSetting):
        _keep(_file(name), _PROFILE.dump_json(found))
    return found


def pass_once(model: Path, question: str, check: Callable[[], None]) -> None:
    """Run ``check``, unless the base model in the folder ``model`` has passed it before: that is kept as a profile is.

    ``question`` is all else that ``check`` depends on. What it raises is not kept.
    """
    name = sha256(_model(model) + question.encode() + _libraries()).hexdigest()
    with suppress(OSError, InvalidSetting):
        if _file(name).read_bytes() == _PASSED:
            return
    check()
    with suppress(OSError, InvalidSetting):
        _keep(_file(name), _PASSED)


def _file(name: str) -> Path:
    return cache_folder("CHAINFED_MODELS", "models") / "profiles" / f"{name}.json"


def _model(folder: Path) -> bytes:
    """The model's settings, and the header of each of its safetensors files: the names, dtypes and shapes of its tensors."""
    parts = [(folder / "config.json").read_bytes()]
    for weights in sorted(folder.glob("*.safetensors")):
        with weights.open("rb") as file:
            parts.append(file.read(int.from_bytes(file.read(8), "little")))
    return b"\0".join(parts)


@cache
def _libraries() -> bytes:
    """The versions of the libraries that run a layer, and the code of this project that counts its bytes."""
    root = Path(__file__).parents[1]
    code = sha256()
    for path in sorted(path for pattern in _CODE for path in root.glob(pattern)):
        code.update(path.read_bytes())
    return json.dumps([version("torch"), version("transformers"), os.uname().machine, code.hexdigest()]).encode()


def _keep(file: Path, content: bytes) -> None:
    """Write a file that is whole or not there, and delete the oldest if there are too many."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=file.parent, prefix=".", delete=False) as unfinished:
        unfinished.write(content)
    os.replace(unfinished.name, file)
    by_age = sorted(file.parent.iterdir(), key=lambda path: path.stat().st_mtime)
    for old in by_age[:-_MOST]:
        old.unlink(missing_ok=True)
