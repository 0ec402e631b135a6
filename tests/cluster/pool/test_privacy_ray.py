"""Noise that clients add is the same wherever they run, and fits into the budgets of their processes."""

from pathlib import Path

import pytest

from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.planning.prepare import PlannedJob
from chainfed_ray.records.commit_log import CommitLog
from tests.builders import PRIVACY, a_job, assert_same, run, with_secret

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.mark.parametrize("where", ["server", "client"])
def test_the_ray_pool_is_the_local_pool(mixed: PlannedJob, tmp_path: Path, ray_pool: RayPool, where: str) -> None:
    """Clients with little memory train one adapter of three, and add noise to all of them."""
    job = a_job(mixed.spec.document() | {"privacy": {**PRIVACY, "where": where}}, tmp_path / "scratch")
    same = with_secret(CommitLog(tmp_path / "local").secret(), tmp_path / "ray")
    _, expected = run(job, tmp_path / "local")
    _, tensors = run(job, same, ray_pool)
    (record,) = CommitLog(same).rounds()
    assert [turn.exceeded for turn in record.turns] == [None] * 4, "noise is within the plan"
    assert_same(tensors, expected)
