"""``python -m benchmarks zoo``: which model families run, and in which words the others are refused.

Each family that transformers' ``AutoModel`` knows is made small, with random weights. Its layers, one by one, must give what
Hugging Face's own model gives; its streamed layers must give the values and gradients of resident ones; and its memory must be
planned. Each family has a process of its own, with bounded time and memory.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.utils import logging

from benchmarks.zoo_models import saved_model
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.hub import first_line
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import Parts
from chainfed_ray.model.trace import trace_memory
from chainfed_ray.model.trunk import text_part

_SECONDS, _MEMORY = 60, 6 * 2**30  # of a family
_BEGIN, _END = "<!-- zoo: begin -->", "<!-- zoo: end -->"
EQUAL, REFUSED, NO_TEXTS, NOT_MADE, WRONG = "streamed, equal", "refused", "no texts", "not made", "WRONG"


class Verdict(NamedTuple):
    """What became of a family, and in which words."""

    family: str
    result: str
    words: str = ""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="a model_type; by default all")
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="put the table between the marks of this document"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Try each family, and print or write the table."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try_family("bert", Path(folder))  # what every family needs is imported once, before this process is copied
    verdicts = []
    for family in options.families or sorted(MODEL_MAPPING_NAMES):
        verdicts.append(_in_a_process(family))
        print(*verdicts[-1], sep=": ", file=sys.stderr, flush=True)
    table = "\n".join(rows(verdicts))
    if options.document:
        before, _, rest = options.document.read_text().partition(_BEGIN)
        options.document.write_text(f"{before}{_BEGIN}\n{table}\n{_END}{rest.partition(_END)[2]}")
    else:
        print(table)


def rows(verdicts: list[Verdict]) -> Iterator[str]:
    """The table in Markdown: every family that reads texts, and how many do not."""
    counts = Counter(verdict.result for verdict in verdicts)
    yield ", ".join(f"{count} {result}" for result, count in counts.most_common()) + "."
    yield ""
    yield "| family | result | in these words |"
    yield "|---|---|---|"
    for family, result, words in sorted(verdicts):
        if result in (EQUAL, REFUSED, WRONG):
            yield f"| `{family}` | {result} | {words} |"


def try_family(family: str, folder: Path) -> Verdict:
    """Make a model of ``family`` in ``folder``, and compare."""
    try:
        model: Any = saved_model(family, folder)
    except Exception as error:
        return Verdict(family, NOT_MADE, f"{type(error).__name__}: {first_line(error)}")
    ids, mask = _texts()
    try:
        with torch.no_grad():
            model.get_submodule(text_part(model))(input_ids=ids, attention_mask=mask, use_cache=False)
        reads_texts = True
    except Exception:
        reads_texts = False
    try:
        blocks = Blocks(folder, torch.float32)
        blocks.check()
        _compare(blocks, model, ids, mask)
        with blocks.named_errors("has layers whose memory cannot be planned"):
            for index in blocks.kinds:
                trace_memory(Parts(blocks, 3, 1).layer(False, index), blocks.hidden_size, torch.float32)
    except UnsupportedModel as error:
        return Verdict(family, REFUSED if reads_texts else NO_TEXTS, error.reason.replace("|", "/"))
    except Exception as error:
        return Verdict(family, WRONG, f"{type(error).__name__}: {first_line(error)}".replace("|", "/"))
    return Verdict(family, EQUAL)


def _compare(blocks: Blocks, model: Any, ids: Tensor, mask: Tensor) -> None:
    """Check that each layer's output is the whole model's, and that a streamed layer is the resident one."""
    outputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)

    for layer in model.get_submodule(blocks.layers_path):
        layer.register_forward_hook(keep)
    with torch.no_grad():
        model.get_submodule(text_part(model))(input_ids=ids, attention_mask=mask, use_cache=False)
    hidden, calls = blocks.embed(ids, mask)
    assert len(outputs) == blocks.num_layers == len(calls), "not all layers run"
    reader = blocks.reader()
    for index, (call, wanted) in enumerate(zip(calls, outputs, strict=True)):
        streamed = blocks.run(blocks.load_layer(index, reader), given := hidden.clone().requires_grad_(), call)
        whole = blocks.run(blocks.load_layer(index), again := hidden.clone().requires_grad_(), call)
        for output in (streamed, whole):
            (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
        expected = wanted if wanted.shape == whole.shape else wanted.transpose(0, 1)
        torch.testing.assert_close(whole.detach(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(streamed, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(given.grad, again.grad, rtol=1e-4, atol=1e-5)
        hidden = whole.detach()
    reader.close()


def _texts() -> tuple[Tensor, Tensor]:
    """Three texts of unequal length, padded on the right."""
    mask = (torch.arange(9)[None, :] < torch.tensor([9, 4, 7])[:, None]).long()
    return torch.randint(3, 100, mask.shape, generator=torch.Generator().manual_seed(1)) * mask, mask


def _in_a_process(family: str) -> Verdict:
    """Try a family in a copy of this process, which the kernel ends when it computes for too long."""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        with tempfile.TemporaryDirectory() as folder, os.fdopen(writing, "w") as file:
            file.write(json.dumps(try_family(family, Path(folder))))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    os.waitpid(child, 0)
    return (
        Verdict(*json.loads(told))
        if told
        else Verdict(family, WRONG, f"no answer within {_SECONDS} seconds of the processor")
    )
