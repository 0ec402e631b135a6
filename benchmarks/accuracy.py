"""``python -m benchmarks accuracy``: what a fleet learns by each method, at equal steps, compute or bytes."""

import argparse
import os
import platform
import signal
import sys
import tempfile
from datetime import date
from pathlib import Path

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

_WIDE = 160  # columns of a table that is not printed on a terminal
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command line takes."""
    parser.add_argument(
        "--datasets", nargs="+", choices=corpora.NAMES, help="all by default, or none if there are data of your own"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help="folders with train.jsonl and test.jsonl: text, label",
    )
    parser.add_argument(
        "--alphas", nargs="+", type=_alpha, default=[1.0, 0.1, None], metavar="A", help="of the Dirichlet, or iid"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="all by default; or how the names of some begin")
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument(
        "--client-steps", type=int, metavar="N", help="of end-to-end training; by default the data set's"
    )
    parser.add_argument(
        "--target", type=float, help="validation accuracy, in [0, 1]; by default what end-to-end reaches"
    )
    parser.add_argument(
        "--judge-every",
        type=_count,
        metavar="ROUNDS",
        help="judge a stage in between as well, for it to go back to its best; by default as it begins and ends",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=_rates,
        default=[],
        metavar="ADAPTERS:HEAD",
        help="tune: try these learning rates at equal steps, and judge on validation rows alone",
    )
    parser.add_argument(
        "--recipe-rates",
        type=_rates,
        metavar="ADAPTERS:HEAD",
        help="of the recommended recipe, if --rates found others for your base model; by default JobSpec's own",
    )
    parser.add_argument("--base", default="builtin:minilm", help="the base model, as in a job")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, one thread each")
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="for prefix caches, meanwhile"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the rows in this file, and go on from those there"
    )
    parser.set_defaults(run=run)


def _alpha(text: str) -> float | None:
    if text.lower() == "iid":
        return None
    alpha = float(text)
    if alpha <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or iid")
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
    """Run what was asked for and is not there yet, and print what all of it comes to."""
    try:
        study, rows = _study(options), Rows(options.json)
    except (corpora.NoCorpus, InvalidJob, NotOurRows) as error:
        raise SystemExit(str(error)) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the runs end too
    interrupted = False
    try:
        complete(study, rows, Processes(options.scratch), options.jobs, _say)
    except KeyboardInterrupt:
        interrupted = True
    _report(study, rows)
    if interrupted:
        raise SystemExit(
            "interrupted; run it again with the same --json, and it goes on" if options.json else "interrupted"
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
        judge_every=options.judge_every,
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
    """Whether the fleet is what it is said to be, and whether the chain fits it."""
    weighed = [row.whole_model_bytes for row in rows if row.whole_model_bytes is not None]
    for group in (PHONE, SILO) if weighed else ():
        shortfall = max(weighed) - parse_bytes(str(group["memory"]))
        verdict = f"lacks {format_bytes(shortfall)}" if shortfall > 0 else "is enough"
        print(
            f"the whole model, trained in plain PyTorch, takes {format_bytes(max(weighed))}; "
            f"the {group['memory']} of a {group['name']} {verdict}"
        )
    widths: dict[str, int] = {}
    for row in rows:
        if row.narrowest_window is not None:
            widths[row.method] = min(row.narrowest_window, widths.get(row.method, row.narrowest_window))
    if widths:
        print("narrowest window of a client:", ", ".join(f"{method} {width}" for method, width in widths.items()))
    if excluded := sorted({row.method for row in rows if row.excluded}):
        print("clients are left out for want of memory:", ", ".join(excluded))
