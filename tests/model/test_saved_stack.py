"""Promise: whoever saves a stack may be killed at any moment, and a whole stack can be loaded."""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from chainfed_ray.model.saved_stack import SavedStack, load_stack, save_stack
from tests.models import a_saved_stack, tiny


class Killed(BaseException):
    """No ``except`` and no ``ignore_errors`` catches it."""


class Killer:
    """Ends what is done at the n-th thing that it asks of the operating system's files."""

    def __init__(self) -> None:
        self._left = 0
        sys.addaudithook(self._on_event)  # for ever, but it does nothing unless ``_left`` is set

    def is_killed(self, act: Callable[[], None], at: int) -> bool:
        """Do ``act``, and end it at its ``at``-th event. False if it had fewer."""
        self._left = at
        try:
            act()
        except Killed:
            return True
        finally:
            self._left = 0
        return False

    def _on_event(self, event: str, _: tuple[Any, ...]) -> None:
        if self._left and event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            self._left -= 1
            if not self._left:
                raise Killed


def test_a_save_that_is_killed_leaves_the_old_stack_or_the_new_one(tmp_path: Path) -> None:
    base, killer = tiny("bert", tmp_path / "base"), Killer()
    old, new = (a_saved_stack(base, layers=layers) for layers in ((2, 3), (1, 2, 3)))
    for point in count(1):
        folder = tmp_path / str(point) / "model"
        save_stack(old, folder)
        if not killer.is_killed(lambda folder=folder: save_stack(new, folder), point):
            break
        assert any(is_same(load_stack(folder), whole) for whole in (old, new)), f"killed at {point}"
        save_stack(new, folder)
        assert is_same(load_stack(folder), new), f"killed at {point}, and saved again"
        assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert point > 8, "it was killed at each point"


def test_what_others_find_the_base_by_is_its_name_on_the_hub_or_its_folder(tmp_path: Path) -> None:
    saved = a_saved_stack(tiny("bert", tmp_path / "base"))
    named = {
        "hf:org/llama@v2": "org/llama",
        "hf:org/llama@v2#nf4": "org/llama",
        "path:/models/llama@v2/final": "/models/llama@v2/final",
        "builtin:minilm": None,
    }
    for base, expected in named.items():
        assert replace(saved, base=base).config()["base_model_name_or_path"] == expected


def is_same(found: SavedStack, expected: SavedStack) -> bool:
    ours, theirs = found.tensors(), expected.tensors()
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
