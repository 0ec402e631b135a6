"""Pictures of jobs, where they can be drawn: matplotlib is an extra, and nothing else of a job depends on it."""

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
    """Write a job's pictures into ``folder`` and give their paths; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []

    from chainfed_ray.api.report.plots import draw

    return draw(folder, job_started, rounds, job_finished, threshold)


def check_drawing() -> None:
    """For a picture that was asked for.

    Raises:
        PackageMissing: it cannot be drawn.
    """
    if find_spec("matplotlib") is None:
        raise _NEEDED
