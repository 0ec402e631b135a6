"""What commands print for people."""

import pytest
from rich.table import Table

from chainfed_ray.api.operator.answers import answer


def test_a_narrow_terminal_loses_no_figure(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    figures = [f"{figure}.25MiB" for figure in range(1000, 1006)]
    table = Table(*(f"column {place}" for place in range(6)), box=None)
    table.add_row(*figures)
    answer(False, {}, table)
    assert capfd.readouterr().out.splitlines()[-1].split() == figures
