"""Reads lists from the cells of a table: Python lists, arrays from parquet, or JSON in files such as CSV."""

import json
from typing import Any


def as_list(cell: Any) -> list[Any] | None:
    """The list in a cell, or None if the cell holds no list."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell)
        except ValueError:
            return None
    if hasattr(cell, "tolist"):
        cell = cell.tolist()
    return cell if isinstance(cell, list) else None
