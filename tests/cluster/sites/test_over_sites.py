"""Whole jobs over sites that keep their rows: real processes at the sites, on a real cluster."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.sites.desk import Desk
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.federation.run import run_job
from chainfed_ray.record import Record
from chainfed_ray.records.commit_log import CommitLog
from chainfed_ray.records.rounds import JobFinished, Round
from chainfed_ray.spec.parse import parse_job
from tests.sites import SitesService, a_service

pytestmark = pytest.mark.slow
SITES = ("north", "east", "south", "west")


@pytest.fixture
def service(storage: Storage, store: JobStore, tmp_path: Path) -> Iterator[SitesService]:
    with a_service(storage, store, tmp_path) as made:
        yield made


def rows_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.read_text().splitlines()]


@pytest.fixture
def dealt(document: dict[str, Any], tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """A job whose held-out rows are files of their own. It trains on the others, which the server deals."""
    rows = rows_of(tiny_data)
    for name, part in (("train", rows[:96]), ("validation", rows[96:108]), ("test", rows[108:])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, part)))
        document["data"][name] = f"path:{file}"
    document["chain"] |= {"head": "fitted"}
    document["rounds"] |= {"total": 2, "clients": 3}
    return document


def over_sites(dealt: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The same job over four sites, each with every fourth of its rows."""
    rows = rows_of(Path(dealt["data"]["train"].removeprefix("path:")))
    document = json.loads(json.dumps(dealt))
    del document["data"]["train"]
    document["fleet"]["clients"] = []
    for place, site in enumerate(SITES):
        folder = tmp_path / "rows" / site
        folder.mkdir(parents=True)
        (folder / "notes.jsonl").write_text("\n".join(map(json.dumps, rows[place::4])))
        group = {"name": f"at-{site}", "memory": "64MiB", "site": site, "data": "site:notes.jsonl"}
        document["fleet"]["clients"].append(group)
    return document


def every_fourth(labels: np.ndarray, groups: object, clients: int, seed: int) -> list[np.ndarray]:
    return [np.arange(place, len(labels), clients) for place in range(clients)]


def run(document: dict[str, Any], job: str, storage: Storage) -> list[Record]:
    """The records of a job whose clients run at sites."""
    desk = Desk(job, storage)
    return list(
        run_job(
            parse_job(document),
            storage.job(job),
            pool=lambda source, note: RayPool(source, 2, note, silence=60, at_site=desk.lease),
            sites=desk,
        )
    )


def test_a_job_over_sites_has_the_bits_of_one_whose_rows_the_server_deals(
    cluster: None, service: SitesService, dealt: dict[str, Any], storage: Storage, tmp_path: Path
) -> None:
    alone = list(run_job(parse_job(dealt), tmp_path / "alone", partition=every_fourth))
    document = over_sites(dealt, tmp_path)
    for site in SITES:
        service.join(site, tmp_path / "rows" / site)
    records = run(document, "job-1", storage)

    assert [turn.loss for one in rounds(records) for turn in one.turns] == [
        turn.loss for one in rounds(alone) for turn in one.turns
    ]
    ours, theirs = (CommitLog(folder).tensors(1) for folder in (storage.job("job-1"), tmp_path / "alone"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert isinstance(records[-1], JobFinished)


def rounds(records: list[Record]) -> list[Round]:
    return [record for record in records if isinstance(record, Round)]
