"""Promise: a turn that would take more than its cap ends with an error that says so, and the process goes on living.

Each in a process of its own: what is capped is the process.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chainfed_ray.device.peak import ENVIRONMENT
from chainfed_ray.errors import BudgetExceeded, ChainFedError

MIB = 2**20
PLANNED, CAP = 48 * MIB, 64 * MIB

# Every way to ask for 256 MiB; some have them one by one.
GREED = {
    "at once": "bytearray(256 * MIB)",
    "little by little": "[bytearray(MIB) for _ in range(256)]",
    "numpy": "np.ones(256 * MIB, dtype=np.uint8)",
    "a private map": "mmap.mmap(-1, 256 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)",
    "the stacks of threads": "[pool.submit(gate.wait) for _ in range(32)]",
    "a file that is read": "np.fromfile('/dev/zero', dtype=np.uint8, count=256 * MIB)",
}
WITH_TORCH = {
    "torch": "torch.ones(256 * MIB, dtype=torch.uint8)",
    "torch in another thread": "pool.submit(torch.ones, 64 * MIB).result()",
    "a product of matrices": "torch.ones(8 * MIB, 1) @ torch.ones(1, 8)",
}
PRELUDE = """
import json, mmap, os, resource, threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
from chainfed_ray.device.cap import MemoryCap, enter_phase
from chainfed_ray.errors import BudgetExceeded
from chainfed_ray.device.peak import status

MIB = 2**20
gate = threading.Event()
pool = ThreadPoolExecutor(32)
pool.submit(int).result()
told = {}


def block(work):
    with MemoryCap(48 * MIB, 64 * MIB) as peak:
        work()
    return peak.bytes


def caught(work):
    try:
        return block(work)
    except BudgetExceeded as error:
        return {**vars(error), "text": str(error), "cause": type(error.__cause__).__name__}
    finally:
        gate.set()


def limit():
    return resource.getrlimit(resource.RLIMIT_DATA)
"""


def process(code: str) -> Any:
    """What ``code`` has ``told`` when it has run."""
    done = subprocess.run(
        [sys.executable, "-c", f"{PRELUDE}\n{code}\nprint(json.dumps(told))"],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def told_of(greed: str, imports: str = "") -> Any:
    return process(f"""
{imports}
def greedy():
    enter_phase("training")
    return {greed}

block(lambda: None)  # what the first block loads
before = limit(), status("VmRSS")
told["error"] = caught(greedy)
told["limits"] = [before[0], limit()]
told["kept"] = status("VmRSS") - before[1]
told["next"] = block(lambda: bytearray(32 * MIB))
""")


def assert_refused(told: Any) -> None:
    error = told["error"]
    assert (error["planned"], error["cap"], error["peak"], error["phase"]) == (PLANNED, CAP, None, "training")
    assert error["text"] == (
        "the turn was planned to take 48MiB, was allowed 64MiB, and would have taken more while training"
    )
    assert told["limits"][0] == told["limits"][1]
    assert told["kept"] < 8 * MIB  # what libraries load on the way
    assert 31 * MIB < told["next"] < 34 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("way", GREED)
def test_an_allocation_above_the_cap_is_refused(way: str) -> None:
    """The limit is as before, the memory is back, and the next block works."""
    assert_refused(told_of(GREED[way]))


@pytest.mark.slow
@pytest.mark.parametrize("way", WITH_TORCH)
def test_torch_is_refused_as_well(way: str) -> None:
    assert_refused(told_of(WITH_TORCH[way], "import torch; torch.set_num_threads(1)"))


@pytest.mark.slow
def test_pages_of_a_file_that_no_allocation_shows_are_refused_at_the_end(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(100 * MIB)
    told = process(f"""
def read():
    enter_phase("reading")
    with open({str(tmp_path / "file")!r}) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return sum(mapped[place] for place in range(0, len(mapped), 4096))

told["error"] = caught(read)
told["next"] = caught(lambda: bytearray(100 * MIB))
""")
    assert (told["error"]["cap"], told["error"]["phase"]) == (CAP, "reading")
    assert 99 * MIB < told["error"]["peak"] < 104 * MIB
    assert told["next"]["phase"] == "getting ready", "not what another turn was at"


@pytest.mark.slow
def test_within_the_cap_nothing_happens() -> None:
    told = process("""
before = limit()
told["peak"] = caught(lambda: (np.ones(60 * MIB, dtype=np.uint8), [pool.submit(int).result() for _ in range(4)]))
told["limits"] = [before, limit()]
""")
    assert 59 * MIB < told["peak"] <= CAP
    assert told["limits"][0] == told["limits"][1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        ("ValueError('a typo')", "ValueError"),
        ("OSError(28, 'No space left on device')", "OSError"),
        ("RuntimeError('shapes do not match')", "RuntimeError"),
        ("RuntimeError('could not create a primitive descriptor')", "RuntimeError"),
        ('RuntimeError("can\'t start new thread")', "RuntimeError"),
        ("KeyboardInterrupt()", "KeyboardInterrupt"),
    ],
)
def test_other_errors_are_themselves(raised: str, kind: str) -> None:
    told = process(f"""
before = limit()
def fail():
    raise {raised}
try:
    block(fail)
except BaseException as error:
    told["kind"] = type(error).__name__
told["limits"] = [before, limit()]
""")
    assert told["kind"] == kind
    assert told["limits"][0] == told["limits"][1]


@pytest.mark.parametrize(("held", "exceeded"), [(60, True), (8, False)])
def test_words_without_a_cause_are_a_lack_of_memory_if_the_block_held_much_of_its_cap(
    held: int, exceeded: bool
) -> None:
    told = process(f"""
def fail():
    held = bytearray({held} * MIB)
    raise RuntimeError("could not create a primitive")

try:
    told["error"] = caught(fail)
except RuntimeError as error:
    told["other"] = str(error)
""")
    assert ("error" in told) == exceeded
    assert told.get("other") == (None if exceeded else "could not create a primitive")


@pytest.mark.parametrize("peak", [None, 5 * MIB])
def test_the_error_survives_a_journey_between_processes(peak: int | None) -> None:
    error = BudgetExceeded(MIB, 2 * MIB, peak, "training")
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is BudgetExceeded
    assert isinstance(there, ChainFedError)
    assert isinstance(there, MemoryError)
    assert (vars(there), str(there)) == (vars(error), str(error))
