"""Draws a job's plots if matplotlib is installed. It is an optional extra, and a job never fails without it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from chainfed_ray.errors import PackageMissing
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round

_NEEDED = PackageMissing("a picture", "matplotlib", "plots")
NOT_DRAWN = f"No plots were drawn: {_NEEDED}"


def draw_if_possible(
    folder: Path, job_started: JobStarted, rounds: Sequence[Round], job_finished: JobFinished | None, threshold: float
) -> list[Path]:
    """Write a job's plots into ``folder`` and return their paths. Without matplotlib, return an empty list."""
    if find_spec("matplotlib") is None:
        return []

    from chainfed_ray.api.report.plots import draw

    return draw(folder, job_started, rounds, job_finished, threshold)


def check_drawing() -> None:
    """Call this before work whose result the user wants as a picture.

    Raises:
        PackageMissing: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise _NEEDED
