"""Hands a finished model over to other engines: a job's stack → a folder in the form that they load."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from chainfed_ray.cache_folder import writing
from chainfed_ray.errors import CorruptCommit, InvalidJob

if TYPE_CHECKING:
    from chainfed_ray.model.saved_stack import SavedStack


def hand_over(folder: Path, out: Path, form: str) -> list[str]:
    """Write the stack in ``folder`` to ``out`` in the format ``form``, with a model card. Returns the names of the files.

    ``out`` is there when it is whole: until then its files are in a folder beside it, whose name ends in ``.partial``. Into a
    folder that exists they are moved one by one, README.md at the end.

    Raises:
        InvalidJob: ``folder`` holds no stack, ``out`` exists, there is no such format, or it is not for this model.
        CorruptCommit: the record of the job beside ``folder`` cannot be read.
        PackageMissing: the format needs a package that is not installed.
        UnsupportedModel: the base model cannot be written in this format.
        OSError: the disk is full, or ``out`` cannot be made there. It names ``out``.
    """
    if form not in ("peft", "transformers", "onnx"):
        raise InvalidJob.at("format", form, "peft, transformers or onnx")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InvalidJob.at("out", str(out), "a folder that does not exist yet, or an empty one")
    # What can be refused without torch, which takes seconds to load, has been refused.
    from chainfed_ray.export.model_card import model_card

    write, saved = _writer(form), _stack(folder)
    whole = out.resolve()  # "." has no name of its own
    partial = whole.with_name(f"{whole.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with writing():
            write(saved, partial)
        (partial / "README.md").write_text(model_card(saved, form, folder), encoding="utf-8")
        if whole.exists():  # a folder that is somebody's current one, or a disk's, stays the one that it is
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "README.md"):
                path.rename(whole / path.name)
        else:
            partial.rename(whole)
    except OSError as error:
        error.filename = error.filename or str(out)  # that of a write to a full disk names none
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(path.name for path in whole.iterdir())


def _writer(form: str) -> "Callable[[SavedStack, Path], None]":
    """What writes a stack into a folder in the format ``form``."""
    from chainfed_ray.export.onnx_folder import write_onnx
    from chainfed_ray.export.transformers_folder import write_transformers
    from chainfed_ray.model.saved_stack import save_stack

    return {"peft": save_stack, "transformers": write_transformers, "onnx": write_onnx}[form]


def _stack(folder: Path) -> "SavedStack":
    from chainfed_ray.model.saved_stack import load_stack

    try:
        saved = load_stack(folder)
    except CorruptCommit as error:
        expected = f"the folder of a finished model, such as chainfed-data/jobs/<job>/model ({error.reason})"
        raise InvalidJob.at("folder", str(folder), expected) from None
    if saved.run_layers is not None:
        expected = (
            f"a stack of all layers; this one is an early exit after {saved.run_layers}, which the service answers with"
        )
        raise InvalidJob.at("folder", str(folder), expected)
    return saved
