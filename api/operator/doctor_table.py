"""What ``chainfed doctor`` finds: tables, and the steps to take."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from chainfed_ray.api.operator.open_ports import open_ports, warning
from chainfed_ray.cluster.offload.doctor import Finding, findings, is_possible, look


def diagnosis() -> tuple[dict[str, Any], list[RenderableType]]:
    """What this machine can do, what it lacks, and which ports are open: as JSON, and part by part for people."""
    storage = os.environ.get("CHAINFED_STORAGE") or "chainfed-data"
    scratch = Path(os.environ.get("CHAINFED_SCRATCH") or f"{storage}/scratch").absolute()
    found, ports = findings(look(scratch)), open_ports()
    document = {
        "deepspeed": is_possible(found),
        "torch": True,
        "findings": [finding.document() for finding in found],
        "open_ports": [port.document() for port in ports],
    }
    return document, [doctor_table(found), *verdict(found), *warning(ports)]


def doctor_table(found: Sequence[Finding]) -> Table:
    """A table with a row for each finding: ``ok``, ``missing``, or ``no need`` if this machine can do without it."""
    table = Table("", "what", "found", box=None, header_style="bold", pad_edge=False)
    table.columns[2].overflow = "fold"
    for finding in found:
        mark = "ok" if finding.ok else "missing" if finding.needed else "no need"
        table.add_row(mark, finding.name, finding.found)
    return table


def verdict(found: Sequence[Finding]) -> list[str]:
    """Lines that say which engines work on this machine, then the steps to make DeepSpeed work, in order."""
    lines = ["", "engine torch: possible, as on every machine."]
    if is_possible(found):
        return [*lines, "engine deepspeed: possible."]
    lines.append("engine deepspeed: not possible yet. What is missing:")
    # Compiling comes last, because it needs what the other steps install.
    steps = sorted(
        (item for item in found if item.needed and not item.ok), key=lambda item: "--build" in str(item.remedy)
    )
    return [*lines, *dict.fromkeys(f"  {step.name}: {step.remedy}" for step in steps)]
