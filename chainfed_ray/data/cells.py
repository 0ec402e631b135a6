"""Lists in the cells of a table: as such, as parquet gives them, or as JSON, in a file that has none, such as CSV."""

import json
from typing import Any


def as_list(cell: Any) -> list[Any] | None:
    """The list in a cell; None if there is none."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    return cell if isinstance(cell, list) else None
