"""Tells rows of results, each a sentence of what was measured and one of the result: as a table, and as a file of JSON."""

import json
import os
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cell_process import Row


def tell(rows: Sequence[Row], file: Path | None, width: int) -> None:
    """Print the rows on lines of ``width`` characters, the machine and the date; and write the rows into ``file``, if any."""
    if file:
        file.write_text(json.dumps(rows, indent=1))
    table = Table("what", "result", box=None, header_style="bold")
    for row in rows:
        table.add_row(row["what"], row["said"])
    Console(highlight=False, width=width).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores; {date.today()}")
