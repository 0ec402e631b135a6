"""The manifest of a job's partition, as it is planned."""

from collections.abc import Mapping, Sequence

import numpy as np

from chainfed_ray.client.survey import Absence, Survey
from chainfed_ray.data.examples import JobExamples
from chainfed_ray.planning.candidates import Candidate
from chainfed_ray.records.manifest import ClientPartition, Manifest
from chainfed_ray.spec.job import JobSpec


def manifest_of(
    spec: JobSpec,
    examples: JobExamples,
    everybody: Sequence[Candidate],
    shares: Sequence[np.ndarray],
    surveys: Mapping[str, Survey | Absence],
    rule: str | None,
) -> Manifest:
    """The manifest of the partition. ``shares`` are the row indices of simulated clients, in the order of the fleet."""
    rows, labels = iter(shares), examples.corpus.train.labels
    clients = list[ClientPartition]()
    for candidate in everybody:
        name, group = candidate.name, candidate.client_class
        survey = surveys.get(group)
        if candidate.remote and isinstance(survey, Survey):
            classes = survey.clients[candidate.remote.part].classes
            clients.append(ClientPartition.at_site(name, group, candidate.counts, classes))
        else:
            clients.append(ClientPartition.simulated(name, group, next(rows), labels))
    return Manifest.of(spec, examples.corpus, clients, rule)
