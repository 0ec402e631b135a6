"""What the doctor found, as a table and a list of what to do."""

from collections.abc import Sequence

from rich.table import Table

from chainfed_ray.cluster.offload.doctor import Finding, is_possible


def doctor_table(found: Sequence[Finding]) -> Table:
    """What is there and what is missing; what is not needed here is marked so."""
    table = Table("", "what", "found", box=None, header_style="bold", pad_edge=False)
    table.columns[2].overflow = "fold"
    for finding in found:
        mark = "ok" if finding.ok else "missing" if finding.needed else "no need"
        table.add_row(mark, finding.name, finding.found)
    return table


def verdict(found: Sequence[Finding]) -> list[str]:
    """What this machine can do, and in their order the steps to more."""
    lines = ["", "engine torch: possible, here as everywhere."]
    if is_possible(found):
        return [*lines, "engine deepspeed: possible."]
    lines.append("engine deepspeed: not possible as things are. What is missing:")
    # The last step of all, since it needs what comes before.
    steps = sorted(
        (item for item in found if item.needed and not item.ok), key=lambda item: "--build" in str(item.remedy)
    )
    return [*lines, *dict.fromkeys(f"  {step.name}: {step.remedy}" for step in steps)]
