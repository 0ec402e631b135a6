"""Promise: planned bytes are enough, and not above the measured peak by more than a third; for families of all kinds.

In bfloat16 by no more than a half: processors differ in how they compute with it. Each turn is taken under a cap of what
was planned: one that was planned too tight is an error. Each family has a process of its own.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from chainfed_ray.device.peak import ENVIRONMENT
from tests.measured import NO_BFLOAT16, exact_grid, grid, mixed_grid
from tests.project import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the first test waits for what all of them need

_FAMILIES = ("bert", "gpt2", "llama-bf16", "phi-lm", "llama-lm-lora", "gemma2-lm-bf16", "mixtral")
_TOO_SLOW = ("gemma2-lm-bf16",)  # a head in bfloat16 takes minutes where the processor does not compute in it
_A_THIRD, _A_HALF = 1.35, 1.5


@pytest.fixture(scope="module")
def turns(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What was planned and measured for all families."""
    families = [family for family in _FAMILIES if not (NO_BFLOAT16 and family in _TOO_SLOW)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.measured", str(tmp_path_factory.mktemp("measured")), *families],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("family", _FAMILIES)
def test_planned_is_enough_and_not_much_more(family: str, turns: list[dict[str, Any]]) -> None:
    if NO_BFLOAT16 and family in _TOO_SLOW:
        pytest.skip("a head in bfloat16 takes minutes on this processor")
    rows = [row for row in turns if row["family"] == family]
    assert len(rows) == len(grid(family)) + len(exact_grid(family)) + len(mixed_grid(family))
    # Some processors pack the factors of a product in bfloat16 first, and the plan counts that; others pack less, or nothing.
    at_most = _A_HALF if family.endswith("bf16") else _A_THIRD
    for row in rows:
        assert row["measured"] <= row["planned"], row
        # A plan is for a batch of the longest examples: with shorter ones among them it may be far above what they need.
        assert row["mixed"] or row["planned"] <= at_most * row["measured"], row
