"""A dry run in a process of Ray's tells what it tells here, and refuses what is refused here."""

import asyncio
from typing import Any

import pytest

from chainfed_ray.cluster.jobs.preflight import plan
from chainfed_ray.errors import InvalidJob
from chainfed_ray.forecast.dry_run import dry_run
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.parse import parse_job


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_process_of_its_own_tells_the_same(document: dict[str, Any]) -> None:
    here = dry_run(parse_job(document), at_once=1)
    there = asyncio.run(plan(parse_job(document), client_slots=4))
    assert without_times(there) == without_times(here)
    document["data"]["label"] = "class"
    with pytest.raises(InvalidJob, match="a column"):
        asyncio.run(plan(parse_job(document), client_slots=4))


def without_times(told: Forecast) -> Forecast:
    rows = tuple(row.model_copy(update={"micro_step_seconds": None}) for row in told.classes)
    return told.model_copy(update={"estimated_seconds": None, "classes": rows})
