"""``python -m benchmarks quantized``: the bytes read from disk in a turn, and its time, with quantized weights and without.

The layers have LLaMA2-7B's shape and random weights; a few of them, with its whole head. SmolLM2 has its own weights, as its
GGUF file has them, and dequantized. Each row is measured in its own process.
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from benchmarks.cell_process import Row, in_a_process
from benchmarks.shapes import SHAPES, Shape, written
from chainfed_ray.block_forms import FORMS, to_metadata
from chainfed_ray.hub import resolve
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.nf4_folder import in_nf4
from chainfed_ray.units import format_bytes

_SMOLLM2 = "builtin:smollm2"
_REPEATED = 2**22  # random numbers that all matrices repeat
_progress = Console(stderr=True, highlight=False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument(
        "--forms", nargs="+", default=["Q4_0", "NF4", "Q8_0"], help="of LLaMA2-7B's layers, beside bfloat16"
    )
    parser.add_argument("--layers", type=int, default=4, help="of LLaMA2-7B's 32; three or more, or 0 for none")
    parser.add_argument("--tokens", type=int, default=16, help="of a text of LLaMA2-7B; nor on this")
    parser.add_argument(
        "--dtype", default="float32", help="in which LLaMA2-7B is computed; the bytes do not depend on it"
    )
    parser.add_argument("--smollm2", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--scratch", type=Path, default=Path(tempfile.gettempdir()), help="the folder for the temporary weights"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows into this file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure the rows, write each as soon as it is measured, and print the table."""
    rows: list[Row] = []
    for row in _rows(options):
        rows.append(row)
        _progress.print(f"{row['model']}  {row['stored']}  {row.get('failed') or format_bytes(row['turn_bytes'])}")
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
    Console(highlight=False, width=120).print(_table(rows))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {date.today()}")


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    """The rows of each model: the first is stored without quantization, and the others' ratios are of its bytes."""
    if options.layers:
        name = f"LLaMA2-7B, {options.layers} of 32 layers"
        whole = SHAPES["llama2-7b-1x128"]
        shape = replace(whole, sizes=whole.sizes | {"num_hidden_layers": options.layers})
        with written(shape, options.scratch) as folder:
            if isinstance(folder, str):
                raise SystemExit(folder)
            plain = _measure(folder, options.dtype, 1, options.tokens, options.scratch)
            yield {"model": name, "stored": "bfloat16", "dtype": options.dtype} | plain
            if "NF4" in options.forms:
                with tempfile.TemporaryDirectory(prefix="chainfed-benchmark-", dir=options.scratch) as made:
                    with patch.dict(os.environ, CHAINFED_MODELS=made):  # where the product keeps what it has quantized
                        quantized = in_nf4(folder)
                    assert quantized
                    found = _measure(quantized, options.dtype, 1, options.tokens, options.scratch)
                yield {"model": name, "stored": "NF4, but its head", "dtype": options.dtype} | _compared(found, plain)
        for form in (form for form in options.forms if form != "NF4"):
            with tempfile.TemporaryDirectory(prefix="chainfed-benchmark-", dir=options.scratch) as made:
                _write_quantized(shape, form, Path(made))
                found = _measure(Path(made), options.dtype, 1, options.tokens, options.scratch)
            yield {"model": name, "stored": form, "dtype": options.dtype} | _compared(found, plain)
    if options.smollm2:
        yield from _smollm2(options.scratch)


def _smollm2(scratch: Path) -> Iterator[Row]:
    quantized, plain = resolve(_SMOLLM2), Row()
    for stored in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory(prefix="chainfed-benchmark-", dir=scratch) as made:
            _write_dequantized(quantized, getattr(torch, stored), Path(made))
            found = _measure(Path(made), "float32", 4, 128, scratch)
        plain = plain or found
        yield {"model": "SmolLM2-135M", "stored": stored, "dtype": "float32"} | _compared(found, plain)
    found = _measure(quantized, "float32", 4, 128, scratch)
    yield {"model": "SmolLM2-135M", "stored": "Q4_1", "dtype": "float32"} | _compared(found, plain)


def _measure(folder: Path, dtype: str, batch: int, tokens: int, scratch: Path) -> Row:
    cell = {"folder": str(folder), "dtype": dtype, "batch": batch, "tokens": tokens, "scratch": str(scratch)}
    return in_a_process("benchmarks.quantized_cell", cell)


def _compared(found: Row, plain: Row) -> Row:
    if "failed" in found or "failed" in plain:
        return found
    return found | {"ratio": found["turn_bytes"] / plain["turn_bytes"]}


def _write_quantized(shape: Shape, form: str, folder: Path) -> None:
    """A model of ``shape`` whose matrices are random blocks of ``form``, and whose norms are ones."""
    from gguf import GGMLQuantizationType  # of the extra `smollm2`
    from gguf.quants import quantize

    model = shape.build()
    model.config.save_pretrained(folder)
    values = torch.randn(_REPEATED // 256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks = torch.from_numpy(quantize(values.numpy(), GGMLQuantizationType[form])).view(-1)
    each, tensors, forms = FORMS[form], {}, {}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            tensors[name] = torch.ones(parameter.shape)
            continue
        size = parameter.numel() // each.values * each.bytes
        tensors[name] = blocks.repeat(-(-size // len(blocks)))[:size].view(len(parameter), -1)
        forms[name] = form
    save_file(tensors, folder / "model.safetensors", to_metadata(forms))


def _write_dequantized(source: Path, dtype: torch.dtype, folder: Path) -> None:
    """The model in ``source`` with its values in ``dtype``."""
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    checkpoint = Checkpoint(source)
    save_file({name: checkpoint.read(name, dtype) for name in checkpoint.names}, folder / "model.safetensors")
    checkpoint.close()


def _table(rows: list[Row]) -> Table:
    table = Table("model", "stored", "computed", box=None, header_style="bold", pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    for name in ("a turn reads", "ratio", "a step", "CPU s", "planned", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], row["stored"], row["dtype"], row["failed"])
            continue
        table.add_row(
            row["model"],
            row["stored"],
            row["dtype"],
            format_bytes(row["turn_bytes"]),
            f"{row['ratio']:.3f}×" if "ratio" in row else "",
            format_bytes(row["step_bytes"]),
            f"{row['step_cpu_seconds']:.2f}",
            format_bytes(row["planned_bytes"]),
            format_bytes(row["peak_bytes"]),
        )
    return table
