"""``python -m benchmarks accuracy``: the accuracy that a fleet reaches by each method, at equal steps, compute or bytes."""

import argparse
import os
import platform
import signal
import sys
import tempfile
from contextlib import suppress
from datetime import date
from pathlib import Path
from threading import Event

import torch
from rich.console import Console

from benchmarks import corpora
from benchmarks.accuracy_cells import PHONE, SILO, Cell, Rates, Study
from benchmarks.accuracy_protocols import PROTOCOLS
from benchmarks.accuracy_rows import NotOurRows, Row, Rows
from benchmarks.accuracy_runs import Processes
from benchmarks.accuracy_schedule import complete
from benchmarks.accuracy_table import References, regrets, results, tuning
from benchmarks.methods import END_TO_END, methods
from chainfed_ray.errors import InvalidJob
from chainfed_ray.hub import resolve
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.units import format_bytes, parse_bytes

_WIDE = 160  # columns of the table where the output is no terminal
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--datasets", nargs="+", choices=corpora.NAMES, help="data sets; by default all, or none if --data is given"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="folders with your own data: train.jsonl and test.jsonl, with the columns text and label",
    )
    parser.add_argument(
        "--alphas",
        nargs="+",
        type=_alpha,
        default=[1.0, 0.1, None],
        metavar="A",
        help="α of the Dirichlet partition, or iid",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="methods, by their names or the beginning of names; by default all"
    )
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument(
        "--client-steps",
        type=int,
        metavar="N",
        help="optimizer steps of all clients in end-to-end training; by default the data set's number",
    )
    parser.add_argument(
        "--target",
        type=float,
        help="the validation accuracy of the protocol target, in [0, 1]; by default what end-to-end training reaches",
    )
    parser.add_argument(
        "--evaluate-every",
        type=_count,
        metavar="ROUNDS",
        help="evaluate a stage every ROUNDS rounds too, and end it with its best stack; by default at its start and end only",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=_rates,
        default=[],
        metavar="ADAPTERS:HEAD",
        help="tune: try these learning rates at equal steps, and evaluate on validation rows only",
    )
    parser.add_argument(
        "--recipe-rates",
        type=_rates,
        metavar="ADAPTERS:HEAD",
        help="learning rates of the recommended recipe, if --rates found better ones; by default those of JobSpec",
    )
    parser.add_argument("--base", default="builtin:minilm", help="the base model, as model.base of a job")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time, each with one thread")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="the folder for temporary prefix caches"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the rows in this file, and continue from the rows in it"
    )
    parser.set_defaults(run=run)


def _alpha(text: str) -> float | None:
    if text.lower() == "iid":
        return None
    alpha = float(text)
    if alpha <= 0:
        raise argparse.ArgumentTypeError(f"{text} is neither a number above 0 nor iid")
    return alpha


def _count(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return count


def _rates(text: str) -> Rates:
    adapters, _, head = text.partition(":")
    try:
        return float(adapters), float(head)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not two rates, such as 3e-3:0.1") from None


def run(options: argparse.Namespace) -> None:
    """Make the runs that were asked for and have no row yet, and print the table of all of them."""
    try:
        study, rows = _study(options), Rows(options.json)
    except (corpora.NoCorpus, InvalidJob, NotOurRows) as error:
        raise SystemExit(str(error)) from None
    interrupted = Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # both end the runs as well
        signal.signal(number, lambda *_: interrupted.set())
    with suppress(KeyboardInterrupt):
        complete(study, rows, Processes(options.scratch), options.jobs, _say, interrupted)
    _report(study, rows)
    if interrupted.is_set():
        raise SystemExit(
            "interrupted; run the command again with the same --json to continue" if options.json else "interrupted"
        )


def _say(sentence: str) -> None:
    _progress.print(sentence, soft_wrap=True)


def _study(options: argparse.Namespace) -> Study:
    names = options.datasets or ([] if options.data else corpora.NAMES)
    found = [corpora.named(name) for name in names] + [corpora.at(folder) for folder in options.data]
    blocks = Blocks(resolve(options.base), torch.float32)
    layers = blocks.num_layers
    blocks.close()
    every = methods(layers, options.recipe_rates)
    return Study(
        corpora={corpus.name: corpus for corpus in found},
        methods=every,
        base=options.base,
        alphas=tuple(options.alphas),
        chosen=_chosen(options.methods, tuple(every)),
        protocols=tuple(options.protocols),
        seeds=tuple(options.seeds),
        rates=tuple(options.rates),
        client_steps=options.client_steps,
        target=options.target,
        evaluate_every=options.evaluate_every,
    )


def _chosen(asked: list[str] | None, every: tuple[str, ...]) -> tuple[str, ...]:
    if asked is None:
        return every
    chosen: list[str] = []
    for start in asked:
        found = [start] if start in every else [name for name in every if name.startswith(start)]
        if not found:
            raise SystemExit(f"no method begins with {start!r}; there are {', '.join(every)}")
        chosen += found
    return tuple(dict.fromkeys(chosen))


def _report(study: Study, rows: Rows) -> None:
    found = [row for row in (rows.find(study.key(cell)) for cell in study.cells()) if row]
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE)
    if study.rates:
        console.print(tuning(found, study.chosen))
    else:
        console.print(results(found, study.chosen, _references(study, rows)))
        for sentence in regrets(found):
            print(sentence)
        _print_memory(found)
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {date.today()}")


def _references(study: Study, rows: Rows) -> References:
    cells = (
        Cell(name, alpha, END_TO_END, seed, "steps")
        for name in study.corpora
        for alpha in study.alphas
        for seed in study.seeds
    )
    found = (rows.find(study.key(cell)) for cell in cells)
    return {(row.dataset, row.alpha, row.seed): row for row in found if row}


def _print_memory(rows: list[Row]) -> None:
    """Print how much memory the whole model takes beside the clients' budgets, and which windows the clients trained."""
    weighed = [row.whole_model_bytes for row in rows if row.whole_model_bytes is not None]
    for group in (PHONE, SILO) if weighed else ():
        shortfall = max(weighed) - parse_bytes(str(group["memory"]))
        verdict = f"are {format_bytes(shortfall)} too little" if shortfall > 0 else "are enough"
        print(
            f"training the whole model in plain PyTorch takes {format_bytes(max(weighed))}; "
            f"the {group['memory']} of a {group['name']} {verdict}"
        )
    widths: dict[str, int] = {}
    for row in rows:
        if row.narrowest_window is not None:
            widths[row.method] = min(row.narrowest_window, widths.get(row.method, row.narrowest_window))
    if widths:
        print("narrowest window of a client:", ", ".join(f"{method} {width}" for method, width in widths.items()))
    if excluded := sorted({row.method for row in rows if row.excluded}):
        print("methods that exclude clients with too little memory:", ", ".join(excluded))
