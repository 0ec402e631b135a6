"""What a site tells of its rows before a job begins: what plans and weights need, and nothing else.

A site is a machine of the rows' owner. Its rows stay there: the server knows how many there are and how long they are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from chainfed_ray.activity import Listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.spec.job import JobSpec


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


class Sites(Protocol):
    """The sites that a service knows."""

    def survey(self, spec: JobSpec, base: Path, listen: Listener) -> Mapping[str, Survey | Absence]:
        """Ask each site of the job for a survey, and wait for the answers. ``base`` is the folder of the base model.

        Gives the answers by the names of the classes of clients.

        Raises:
            SurveyStopped: the job is to pause or to end.
        """
        ...

    def late(self, besides: Collection[str]) -> Mapping[str, Survey | Absence]:
        """The answers of sites that did not come in time and have answered since, by the names of the classes of clients.

        Those of the classes ``besides`` are known already. It does not wait.
        """
        ...

    def planned(self, memory: MemoryProfile) -> None:
        """Keep the ``memory`` of the base model's parts, once the job is planned: sites plan their turns with it as well."""
        ...
