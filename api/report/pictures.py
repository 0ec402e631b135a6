"""Draws a job's plots if matplotlib is installed. It is an optional extra, and a job never fails without it."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from chainfed_ray.errors import PackageMissing
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round

_NEEDED = PackageMissing("a picture", "matplotlib", "plots")


def draw_if_possible(
    folder: Path, job_started: JobStarted, rounds: Sequence[Round], job_finished: JobFinished | None, threshold: float
) -> tuple[list[Path], str]:
    """Write a job's plots into ``folder``; return their paths, and a sentence about them.

    A plot that cannot be drawn costs itself alone: the job is done, and its result is still to be told.
    """
    if find_spec("matplotlib") is None:
        return [], f"No plots were drawn: {_NEEDED}"

    from chainfed_ray.api.report.plots import draw

    try:
        plots = draw(folder, job_started, rounds, job_finished, threshold)
    except Exception as error:  # the disk may be full, and matplotlib has errors of its own
        return [], f"No plots were drawn in {folder}: {error}"
    return plots, f"{len(plots)} plots are in {folder}."


def write_if_possible(file: Path, draw: Callable[[], bytes]) -> str:
    """Write what ``draw`` gives into ``file``; return a sentence about it. The answer that it is of is told without it."""
    try:
        file.write_bytes(draw())
    except Exception as error:  # as above
        return f"No picture was written to {file}: {error}"
    return f"The picture is in {file}."


def check_drawing() -> None:
    """Call this before work whose result the user wants as a picture.

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise _NEEDED
