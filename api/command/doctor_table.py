"""Shows the findings of ``chainfed doctor``: a table, and the steps to take."""

from collections.abc import Sequence

from rich.table import Table

from chainfed_ray.cluster.offload.doctor import Finding, is_possible


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
