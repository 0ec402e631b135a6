"""Promises of checks and dry runs in processes of Ray's: they tell what they tell here, and have their limits."""

import asyncio
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chainfed_ray.cluster.jobs.preflight import Limits, Preflight
from chainfed_ray.errors import InvalidJob, PartUnavailable
from chainfed_ray.planning.dry_run import dry_run
from chainfed_ray.reading import ReadingRules, UploadedFile
from chainfed_ray.records.forecast import Forecast
from chainfed_ray.spec.parse import parse_job
from tests.watching import processes_below, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster")]


@pytest.fixture(scope="module")
def preflight(cluster: None, tiny_data: Path) -> Preflight:
    """One for several tests, since its process takes seconds to start."""
    own = {"mine": UploadedFile("rows.jsonl", tiny_data)}
    limits = Limits(at_once=1, waiting=1, wait_seconds=0.001, most_bytes=256 * 2**20)
    return Preflight(4, limits, uploads=lambda tenant, document: own if tenant == "alice" else {})


def test_a_process_of_its_own_tells_the_same(preflight: Preflight, document: dict[str, Any]) -> None:
    here = dry_run(parse_job(document), at_once=1)

    async def story() -> Forecast:
        await preflight.check(parse_job(document))
        there = await preflight.plan(parse_job(document))
        with pytest.raises(InvalidJob, match="CHAINFED_MODEL_ROOTS"):
            await preflight.check(parse_job(document), reads_anything=False)
        document["data"]["label"] = "class"
        for refuses in (preflight.check, preflight.plan):
            with pytest.raises(InvalidJob, match="a column"):
                await refuses(parse_job(document))
        return there

    assert without_times(asyncio.run(story())) == without_times(here)


def without_times(told: Forecast) -> Forecast:
    rows = tuple(row.model_copy(update={"micro_step_seconds": None}) for row in told.classes)
    look_aheads = tuple(row.model_copy(update={"estimated_seconds": None}) for row in told.look_aheads)
    return told.model_copy(update={"estimated_seconds": None, "classes": rows, "look_aheads": look_aheads})


def test_a_check_reads_the_uploads_of_the_jobs_tenant(preflight: Preflight, document: dict[str, Any]) -> None:
    document["data"]["train"] = "upload:mine"

    async def story() -> None:
        await preflight.check(parse_job(document), tenant="alice")
        with pytest.raises(InvalidJob, match=r"data\.train is 'upload:mine'; expected the id of an upload of yours"):
            await preflight.check(parse_job(document), tenant="bob")

    asyncio.run(story())


def test_a_disk_that_is_away_is_no_fault_of_the_job(
    preflight: Preflight, document: dict[str, Any], tmp_path: Path
) -> None:
    """Its root is an empty folder, as where a disk is not mounted."""
    rules = ReadingRules((tmp_path,))
    document["data"]["train"] = f"path:{tmp_path}/rows.jsonl"

    async def story() -> None:
        away = Preflight(4, Limits(), rules)
        for refuses in (away.check, away.plan):
            with pytest.raises(
                PartUnavailable, match=f"the disk with path:{tmp_path}.* does not answer .nothing is there"
            ):
                await refuses(parse_job(document))

    asyncio.run(story())


def test_a_few_at_a_time(preflight: Preflight, document: dict[str, Any]) -> None:
    spec = parse_job(document)

    async def story() -> None:
        # One waits for its place, for less time than a check takes, and one would have to wait behind it.
        found = await asyncio.gather(*(preflight.check(spec) for _ in range(3)), return_exceptions=True)
        assert sorted(type(one).__name__ for one in found) == ["NoneType", "ServiceBusy", "ServiceBusy"]
        await preflight.check(spec)

    asyncio.run(story())


def test_a_small_file_does_not_take_the_memory_of_the_machine(
    preflight: Preflight, document: dict[str, Any], tmp_path: Path
) -> None:
    """The same long text many times is a small file of Parquet's, and hundreds of MiB as Python's strings."""
    rows, path = 800_000, tmp_path / "rows.parquet"
    text = pa.array(["x" * 500]).dictionary_encode().take(pa.array([0] * rows))
    label = pa.array(["a", "b"]).dictionary_encode().take(pa.array([0, 1] * (rows // 2)))
    pq.write_table(pa.table({"text": text, "label": label}), path)
    assert path.stat().st_size < 2**20
    fits, document["data"]["train"] = parse_job(document), f"path:{path}"

    async def story() -> None:
        with pytest.raises(InvalidJob, match=r"can be checked with 256MiB|fit into the memory"):
            await preflight.check(parse_job(document))
        await preflight.check(fits)

    asyncio.run(story())


def test_a_check_ends_in_time_and_with_its_caller(document: dict[str, Any]) -> None:
    spec = parse_job(document)

    async def story() -> None:
        with pytest.raises(PartUnavailable, match=r"the check of the job took longer than 0\.01 s"):
            await Preflight(4, Limits(check_seconds=0.01)).check(spec)
        left = asyncio.create_task(Preflight(4).plan(spec))
        await asyncio.to_thread(wait_for, lambda: processes_below("ray::_forecast"), "the process of the dry run")
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        await asyncio.to_thread(wait_for, lambda: not processes_below("ray::_forecast"), "its end")

    asyncio.run(story())
