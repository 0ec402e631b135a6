"""Noise that clients add is the same wherever they run, and fits into the budgets of their processes."""

from pathlib import Path

import pytest

from chainfed_ray.cluster.ray_pool import RayPool
from chainfed_ray.commit_log import CommitLog
from chainfed_ray.job import Job
from tests.conftest import a_job
from tests.test_budgets import mixed as mixed
from tests.test_coordinator import assert_same, run
from tests.test_privacy_jobs import PRIVACY, with_secret_of
from tests.test_ray_pool import cluster as cluster

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("where", ["server", "client"])
def test_the_ray_pool_is_the_local_pool(mixed: Job, tmp_path: Path, where: str) -> None:
    """Clients with little memory train one adapter of three, and add noise to all of them."""
    job = a_job(mixed.spec.document() | {"privacy": {**PRIVACY, "where": where}}, tmp_path / "scratch")
    same = with_secret_of(tmp_path / "local", tmp_path / "ray")
    _, expected = run(job, tmp_path / "local")
    pool = RayPool(job.base, slots=2)
    try:
        _, tensors = run(job, same, pool)
    finally:
        pool.close()
    (record,) = CommitLog(same).rounds()
    assert [turn.exceeded for turn in record.turns] == [None] * 4, "noise is within the plan"
    assert_same(tensors, expected)
