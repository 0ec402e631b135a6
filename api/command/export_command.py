"""``chainfed export``: its arguments, and what it says when it is done."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

StackFolder = Annotated[
    Path, typer.Argument(help="the folder of a finished model, such as chainfed-data/jobs/<job>/model")
]
NewFolder = Annotated[Path, typer.Argument(help="the folder to write; it must not exist, or be empty")]
Format = Annotated[str, typer.Option("--format", help="peft, transformers or onnx")]


def export_model(folder: Path, out: Path, form: str) -> tuple[dict[str, Any], str]:
    """Write the model in ``folder`` to ``out``. Returns the answer for programs, and for people.

    Raises:
        ChainFedError: as ``hand_over`` does.
    """
    from chainfed_ray.export.handover import hand_over

    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # to save a model loads DeepSpeed, which would look for a GPU, and say so
    with redirect_stdout(sys.stderr):  # whatever libraries print, standard output has the answer and nothing else
        files = hand_over(folder, out, form)
    return (
        {"status": "exported", "format": form, "folder": str(out), "files": files},
        f"The model is in {out}; its README.md says how to load it.",
    )
