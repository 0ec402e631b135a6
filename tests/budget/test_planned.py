"""Promise: planned bytes are enough, and not above the measured peak by more than a third; for families of all kinds.

In bfloat16, on a processor that has to do without, by no more than a half. Each turn is taken under a cap of what was
planned, in a process of its own: one that was planned too tight is an error.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from chainfed_ray.device.peak import ENVIRONMENT
from tests.measured import exact_grid, grid
from tests.project import ROOT

pytestmark = pytest.mark.slow

_A_THIRD, _A_HALF = 1.35, 1.5
_NO_BFLOAT16 = torch.backends.cpu.get_cpu_capability() != "AVX512"


@pytest.mark.parametrize(
    "family", ["bert", "gpt2", "llama-bf16", "phi-lm", "llama-lm-lora", "gemma2-lm-bf16", "mixtral"]
)
def test_planned_is_enough_and_not_much_more(family: str, tmp_path: Path) -> None:
    if family == "gemma2-lm-bf16" and _NO_BFLOAT16:
        pytest.skip("a head in bfloat16 takes minutes on this processor")
    done = subprocess.run(
        [sys.executable, "-m", "tests.measured", str(tmp_path), family],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(rows) == len(grid(family)) + len(exact_grid(family))
    # A processor that computes in bfloat16 packs the factors of a product first, and the plan counts that; others do not.
    at_most = _A_HALF if family.endswith("bf16") and _NO_BFLOAT16 else _A_THIRD
    for row in rows:
        assert row["measured"] <= row["planned"] <= at_most * row["measured"], row
