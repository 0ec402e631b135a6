"""Promise: a clock that jumps, ahead or back, changes nothing of a job, and nobody has to help.

The processes of a service have a clock of the day of their own (``clock.c``), which is set while they run.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.api.sdk import calls, exchanges
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from tests.builders import a_job, assert_same, run
from tests.services import Running

HOUR, DAY = 3600, 86400
JUMPS = (2 * HOUR, -3 * HOUR, 400 * DAY, -HOUR)  # seconds ahead of the machine, one after every second round
pytestmark = [
    pytest.mark.slow,
    pytest.mark.faults,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler for the clock"),
]


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """The file that says how many seconds the service's clock is ahead."""
    file = tmp_path / "clock"
    file.write_text("0")
    return file


@pytest.fixture
def service(clock: Path, tmp_path: Path) -> Iterator[Running]:
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    settings = {"LD_PRELOAD": str(library), "CLOCK_AHEAD": str(clock)}
    with Running(tmp_path / "storage", settings=settings) as running:
        yield running


def test_jobs_end_as_if_no_clock_had_jumped(
    service: Running, clock: Path, document: dict[str, Any], tmp_path: Path
) -> None:
    document["rounds"] |= {"total": 2 * len(JUMPS) + 2}
    _, expected = run(a_job(document, tmp_path), tmp_path / "log")
    job, jumps = service.client.json(calls.submit_job(document))["id"], iter(JUMPS)
    kinds, times = list[str](), set[str]()
    for event in service.client.stream_json(exchanges.events(job)):
        kinds.append(event["kind"])
        times.add(event["at"][:10])
        if kinds[-1] == "round" and kinds.count("round") % 2 == 0:
            clock.write_text(str(next(jumps, 0)))
    assert kinds[-1] == "succeeded", event["data"]
    assert len(times) > 1, "the service's clock did jump"
    assert_same(load_stack(Storage.at(tmp_path / "storage").model(job)).stack.tensors(), expected)

    another = service.client.json(calls.submit_job({**document, "name": "another"}))["id"]
    assert list(service.client.stream_json(exchanges.events(another)))[-1]["kind"] == "succeeded"
