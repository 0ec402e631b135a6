"""Takes turns of many shapes, each under the cap of its plan: ``python -m tests.measured FOLDER FAMILY…``, a process for each.

A family with ``-lm`` is a language model with its own head, of 8,000 tokens: four slices. One with ``-bf16`` is in bfloat16.
It prints a JSON object for each turn: the family, the shape, the planned bytes and the measured bytes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.budget.footprint import TurnRequirements
from chainfed_ray.chain import Window
from chainfed_ray.client.messages import Fitting, Training, TurnOrder
from chainfed_ray.client.turn import take_turn, warm_up
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.adapters import AdapterStack, LoraShapes
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import known_profile_of
from chainfed_ray.model.source import ModelSource
from chainfed_ray.planning.admission import Planner
from chainfed_ray.planning.candidates import Candidate, as_client
from tests.forks import in_forks

MIB = 2**20
NO_BFLOAT16 = torch.backends.cpu.get_cpu_capability() != "AVX512"
_SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
}
_OTHERWISE = {
    "distilbert": {"dim": 512, "hidden_dim": 2048, "n_heads": 8, "n_layers": 4, "vocab_size": 1000},
    "mixtral": _SIZES | {"num_key_value_heads": 4, "intermediate_size": 384, "num_local_experts": 8},
    "t5": {"d_model": 512, "d_ff": 1536, "d_kv": 64, "num_heads": 8, "num_layers": 4, "vocab_size": 1000},
    "gpt2": {"n_embd": 512, "n_head": 8, "n_layer": 4, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2},
}
_GRID = (  # examples of a batch, tokens, Q, budget
    (12, 96, 2, 80 * MIB),
    (8, 96, 3, 48 * MIB),
    (4, 192, 1, 1024 * MIB),
    (3, 192, 3, 1024 * MIB),
    (2, 320, 2, 80 * MIB),
)
_EXACT = (
    (4, 96, 1, 1024 * MIB),
    (2, 320, 1, 32 * MIB),
)  # the same, with an exact look-ahead
_MIXED = ((12, 96, 2, 80 * MIB), (8, 96, 3, 48 * MIB), (4, 192, 2, 1024 * MIB))  # the same, with lengths that differ
_GRID_16 = (  # not all processors compute in bfloat16, and then each takes half a minute
    (1, 384, 1, 1024 * MIB),
    (2, 256, 2, 80 * MIB),
)


def grid(family: str) -> tuple[tuple[int, int, int, int], ...]:
    """What is measured: of an encoder all, of others two, which differ in all, of bfloat16 less at a time."""
    if family.endswith("-bf16"):
        return _GRID_16[:1] if NO_BFLOAT16 else _GRID_16
    if family.endswith("-lora"):
        return ()  # no stand-ins, so no global loss
    return _GRID if family == "bert" else _GRID[::3]


def exact_grid(family: str) -> tuple[tuple[int, int, int, int], ...]:
    """What is measured with an exact look-ahead: of an encoder, and of a language model with LoRAs; in float32."""
    return _EXACT if family in ("bert", "llama-lm-lora") else ()


def mixed_grid(family: str) -> tuple[tuple[int, int, int, int], ...]:
    """What is measured with examples of other lengths in each batch: of an encoder."""
    return _MIXED if family == "bert" else ()


def main(folder: Path, family: str) -> None:
    """Measure the ``grid`` of one family and dtype. ``folder`` is its own."""
    dtype = torch.bfloat16 if family.endswith("-bf16") else torch.float32
    name, is_lm = family.removesuffix("-bf16").removesuffix("-lora").removesuffix("-lm"), "-lm" in family
    sizes = _OTHERWISE.get(name, _SIZES | ({"num_key_value_heads": 4} if name not in ("bert", "roberta") else {}))
    if is_lm:
        sizes = sizes | {"vocab_size": 8_000}
    config = AutoConfig.for_model(name, pad_token_id=0, **sizes)
    kind = AutoModelForCausalLM if is_lm else AutoModel
    kind.from_config(config, dtype=dtype).save_pretrained(folder / "model")
    base = ModelSource(folder / "model", dtype, folder / "scratch")
    classes = None if is_lm else 8
    blocks = Blocks(base.folder, base.dtype)
    shapes = {index: blocks.linear_modules(index) for index in range(blocks.num_layers)}
    lora = shapes if family.endswith("-lora") else None
    memory = known_profile_of(blocks, 8 if lora else 64, classes, 1 if is_lm else 2, lora)
    blocks.close()
    warm_up(base)
    grids = ((False, False, grid(family)), (True, False, exact_grid(family)), (False, True, mixed_grid(family)))
    for exact, mixed, shapes in grids:
        for shape in shapes:
            row = measure(base, memory, *shape, classes, exact, mixed, lora)
            print(json.dumps({"family": family, "mixed": mixed, **row}), flush=True)


def measure(
    base: ModelSource,
    memory: MemoryProfile,
    batch: int,
    tokens: int,
    width: int,
    budget: int,
    classes: int | None,
    exact: bool,
    mixed: bool,
    lora: LoraShapes | None,
) -> dict[str, object]:
    """Take one turn of two steps in the second window, so that a prefix of two layers is run first.

    Every example has ``tokens`` tokens or, if they are ``mixed``, every second one a quarter of them.
    """
    generator = np.random.default_rng(0)
    lengths = np.where(mixed & (np.arange(2 * batch) % 2 == 1), tokens // 4, tokens)
    ids = generator.integers(3, 1000, lengths.sum()).astype(np.int32)
    examples = Examples(ids, np.concatenate([[0], np.cumsum(lengths)]), generator.integers(0, 8, 2 * batch))
    examples = replace(examples, targets=examples.every_token)
    fits = classes is not None
    requirements = TurnRequirements(
        start=0, batch_size=batch, epochs=1, global_branch=not exact, trains_above=False, profiles=0, fits_head=fits,
        exact=exact,
    )  # fmt: skip
    planner = Planner(memory, requirements)
    candidate = Candidate(f"{batch}-{tokens}-{width}-{budget}", "any", examples, budget, None)
    stage = Window(1, width)
    plan = planner.plan(candidate, stage)
    assert plan is not None
    exit_layer = memory.layers - 1 if exact else width
    stack = (
        AdapterStack.new_lora(lora, 8, seed=0)
        if lora
        else AdapterStack.new(range(memory.layers), memory.hidden, 64, classes, seed=0, head_layers=memory.head_layers)
    )
    order = Training(
        stack.tensors(),
        stage,
        exit_layer,
        epochs=1,
        batch_size=batch,
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        global_weight=0 if exact else 0.1,
        global_trains="head",
        seed=0,
    )
    del stack
    stored = {name: tensor.numpy() for name, tensor in order.tensors.items()}
    order.tensors.clear()

    def fetch() -> Training:
        order.tensors.update({name: torch.from_numpy(array.copy()) for name, array in stored.items()})
        return order

    client = as_client(candidate, plan, plan.planned_bytes)
    # With a fitted head the first turn makes the prefix. The plan must hold for the turn that needs more.
    orders: list[Callable[[], TurnOrder]] = (
        [lambda: Fitting(fetch().tensors, stage, exit_layer), fetch] if fits else [fetch]
    )
    peaks = [take_turn(client, base, order, capped=True).peak_bytes for order in orders]
    return {
        "shape": [batch, tokens, width, budget // MIB],
        "way": [
            len(plan.window),
            plan.micro_batch,
            plan.weights,
            plan.activations,
            plan.prefix.batch,
            plan.prefix.weights,
        ],
        "planned": plan.planned_bytes,
        "measured": max(peak for peak in peaks if peak is not None),
    }


if __name__ == "__main__":
    in_forks(sys.argv[2:], lambda family: main(Path(sys.argv[1]) / family, family))
