"""What a person sees while a job runs and when it is over."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from api.fleet import by_class
from api.plots import draw
from api.progress import Progress, time_left
from api.results import results
from chainfed_ray.records import Admitted, Ending, LeftOut, Lost, Opening, Round, Turn
from tests.test_job_store import SPEC

MIB = 2**20
FLEET = (("watch", 24, 2), ("phone", 64, 8), ("laptop", 256, 3), ("silo", 1024, 1))


def an_opening(layers: int = 6, start: int = 2, fleet: tuple[tuple[str, int, int], ...] = FLEET) -> Opening:
    """Everybody with 32 MiB or more takes part."""
    clients = [(f"{name}-{index}", name, memory * MIB) for name, memory, count in fleet for index in range(count)]
    return Opening(
        admitted=tuple(
            Admitted(
                client=client, client_class=name, examples=100, budget_bytes=budget,
                planned_bytes=30 * MIB, micro_batch=16,
            )
            for client, name, budget in clients if budget >= 32 * MIB
        ),
        left_out=tuple(
            LeftOut(client=client, client_class=name, budget_bytes=budget, lacking_bytes=8 * MIB, reason="too small")
            for client, name, budget in clients if budget < 32 * MIB
        ),
        layers=layers, start_layer=start, similarities=tuple(1 - 0.12 * layer for layer in range(layers)), lost=(),
        stages=layers - start - 1, total_rounds=20,
    )  # fmt: skip


def a_round(index: int, opening: Opening, **changes: Any) -> Round:
    """A round of the first stage in which the first three clients took part."""
    turns = tuple(
        Turn(
            client=client.client, client_class=client.client_class, examples=100, loss=1.0, seconds=2.0,
            planned_bytes=client.planned_bytes, peak_bytes=25 * MIB, sent_bytes=1000,
        )
        for client in opening.admitted[:3]
    )  # fmt: skip
    fields: dict[str, Any] = {
        "index": index, "stage": 0, "bottom": 2, "top": 3, "turns": turns, "lost": (), "counted": True,
        "train_loss": 1.0, "held_out_loss": 1.0, "accuracy": 0.5 + index / 100, "movement": None, "ended": None,
        "seconds": 4.0,
    }  # fmt: skip
    return Round(**fields | changes)


ENDING = Ending(accuracy=0.728, loss=0.8, rounds=3, peak_bytes={"phone": 25 * MIB})


def a_console(terminal: bool = False) -> Console:
    return Console(width=80, force_terminal=terminal, record=True, file=io.StringIO(), highlight=False)


def told(progress: Progress, opening: Opening, rounds: list[Round]) -> None:
    progress.opening(opening)
    for record in rounds:
        progress.round(record)


def test_a_line_for_each_round_where_there_is_no_terminal() -> None:
    opening = an_opening()
    lost = tuple(Lost(client=f"phone-{i}", client_class="phone", reason=f"phone-{i} died") for i in range(5))
    rounds = [a_round(0, opening), a_round(1, opening, lost=lost), a_round(2, opening, ended="round limit")]
    console = a_console()
    with Progress(console, "tiny", SPEC) as progress:
        told(progress, opening, rounds)
        progress.ending(ENDING)
    text = console.export_text()
    assert "watch (2): 24MiB a client, 8MiB too little for any window" in text
    assert "The chain starts at layer 2, the first below 0.8." in text
    assert "round 1/20    layers 2–3  3 clients  50.0% right  peak 25MiB  ≤ 1m 16s left" in text
    assert "phone-2 died" in text
    assert "phone-3 died" not in text
    assert "and 2 more turns were lost" in text
    assert "Stage 1 (layers 2–3) ends: round limit." in text
    assert "\x1b" not in text


def test_the_panel_of_a_terminal() -> None:
    opening = an_opening()
    progress = Progress(a_console(terminal=True), "tiny", SPEC)
    told(progress, opening, [a_round(index, opening) for index in range(3)])
    paper = a_console()
    paper.print(progress.panel())
    text = paper.export_text()
    for fact in ("1 of 3: layers 2–3 of 0–5", "3 of 20, at most 1m 08s left", "12 take part, 2 left out", "52.0%"):
        assert fact in text
    for cells in ("0 1 [2][3] 4  5", "phone"):
        assert cells in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_time_left_is_that_of_the_rounds_still_possible() -> None:
    opening = an_opening()
    assert time_left([], 20) is None
    rounds = [a_round(index, opening, seconds=100.0 if index == 0 else 2.0) for index in range(6)]
    assert time_left(rounds, 20) == pytest.approx(2.0 * 14)


def test_every_class_is_added_up() -> None:
    opening = an_opening()
    lost = (Lost(client="silo-0", client_class="silo", reason="died"),)
    classes = {fleet.name: fleet for fleet in by_class(opening, [a_round(0, opening, lost=lost)] * 2)}
    assert list(classes) == ["watch", "phone", "laptop", "silo"]
    assert (classes["watch"].clients, classes["watch"].left_out, classes["watch"].lacking) == (0, 2, 8 * MIB)
    assert (classes["phone"].turns, classes["phone"].peak, classes["phone"].sent) == (6, 25 * MIB, 6000)
    assert (classes["silo"].turns, classes["silo"].lost, classes["silo"].peak) == (0, 2, None)


def test_the_results_fit_a_terminal_whatever_is_not_known() -> None:
    opening = an_opening().model_copy(update={"similarities": ()})
    turn = a_round(0, opening).turns[0].model_copy(update={"peak_bytes": None})
    rounds = [a_round(0, opening, accuracy=None, turns=(turn,), ended="converged: " + "a long reason " * 8)]
    console = a_console()
    console.print(results(SPEC, opening, rounds, ENDING))
    text = console.export_text()
    assert "72.8% (loss 0.800)" in text
    assert "lacks 8MiB" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def many_rounds(opening: Opening) -> list[Round]:
    return [a_round(i, opening, stage=i // 7, bottom=2 + i // 7, top=3 + i // 7, accuracy=0.5) for i in range(200)]


@pytest.mark.parametrize("case", ["usual", "none", "one", "many", "cyclic", "crowded", "no profile"])
def test_plots_of_any_job(tmp_path: Path, case: str) -> None:
    opening = an_opening()
    rounds = [a_round(index, opening) for index in range(20)]
    if case == "none":
        rounds = []
    elif case == "one":
        rounds = rounds[:1]
    elif case == "many":
        opening = an_opening(layers=32)
        rounds = many_rounds(opening)
    elif case == "cyclic":
        rounds = [a_round(i, opening, bottom=2 + i % 3, top=3 + i % 3) for i in range(20)]
    elif case == "crowded":
        fleet = tuple((f"{'a-very-long-class-name-' * 3}{index}"[:63], 2**index, 2) for index in range(3, 15))
        opening = an_opening(fleet=fleet)
        rounds = [a_round(0, opening)]
    elif case == "no profile":
        opening = opening.model_copy(update={"similarities": ()})
    paths = draw(tmp_path, opening, rounds, ENDING if rounds else None, 0.8)
    assert len(paths) == (2 if case == "no profile" else 3)
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(data[16:20]), int.from_bytes(data[20:24])) == (1200, 750)


def test_a_plot_shows_its_data(tmp_path: Path) -> None:
    opening = an_opening()
    first = draw(tmp_path / "a", opening, [a_round(0, opening)], ENDING, 0.8)
    second = draw(tmp_path / "b", opening, [a_round(0, opening, accuracy=0.9)], ENDING, 0.7)
    changed = [a.read_bytes() != b.read_bytes() for a, b in zip(first, second, strict=True)]
    assert dict(zip([path.name for path in first], changed, strict=True)) == {
        "accuracy.png": True, "memory.png": False, "start-layer.png": True,
    }  # fmt: skip
