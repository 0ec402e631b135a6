"""What a site tells of its rows before a job begins: what plans and weights need, and nothing else.

A site is a machine of the rows' owner. Its rows stay there: the server knows how many there are and how long they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from chainfed_ray.data.tokens import ExampleCounts


@dataclass(frozen=True)
class SiteRows:
    """Where a client's rows are: part ``part`` of ``parts`` of the file ``data`` at ``site``.

    ``classes`` are those of the job, in the order of the head's outputs; empty for a language model.
    """

    site: str
    data: str
    part: int
    parts: int
    counts: ExampleCounts
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ClientSurvey:
    """The rows of one client at a site: their ``counts``, and how many there are of each class (none for a language model)."""

    counts: ExampleCounts
    classes: Mapping[str, int]


@dataclass(frozen=True)
class Survey:
    """The clients that a site makes of its file, one or more."""

    clients: tuple[ClientSurvey, ...]


@dataclass(frozen=True)
class Absence:
    """Why a site does not take part: it refuses the job, or did not come. If it ``may_come``, it takes part once it answers."""

    reason: str
    may_come: bool = False


class SurveyStopped(Exception):
    """Nobody waits for the sites any more: the job is to pause or to end, or the service drains."""
