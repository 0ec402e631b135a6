"""What a job asks of the sites that have its rows: the protocol ``Sites``. ``cluster/sites/desk`` keeps it for a service."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from chainfed_ray.activity import Listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.client.survey import Absence, Survey
from chainfed_ray.spec.job import JobSpec


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
