"""Evaluates a chain with resident and with streamed weights: ``python -m tests.evaluated FOLDER FAMILY…``, a process for each.

It prints a JSON object for each: the family, the planned and the measured bytes of an early exit and of the whole model,
and both losses.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from chainfed_ray.budget import server
from chainfed_ray.chain import Window
from chainfed_ray.client.turn import warm_up
from chainfed_ray.data.tokens import Examples
from chainfed_ray.evaluation.streaming_evaluator import StreamingEvaluator
from chainfed_ray.federation.evaluation import ServerEvaluation
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import known_profile_of
from chainfed_ray.model.source import ModelSource
from tests.forks import in_forks

_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "vocab_size": 1000,
}


def main(folder: Path, family: str) -> None:
    """Evaluate the same chain twice: once with resident weights, and once with streamed ones. ``folder`` is its own."""
    causal = family == "llama"
    kind = AutoModelForCausalLM if causal else AutoModel
    kind.from_config(AutoConfig.for_model(family, pad_token_id=0, **_SIZES)).save_pretrained(folder / "model")
    blocks = Blocks(folder / "model", torch.float32)
    # The language model's adapters are LoRAs, which need the window's bottom layer as well.
    lora = {layer: blocks.linear_modules(layer) for layer in range(1, 4)} if causal else None
    memory = known_profile_of(blocks, bottleneck=64, classes=None if causal else 8, lora=lora)
    blocks.close()
    generator = np.random.default_rng(0)
    count, tokens = (12, 64) if causal else (8, 32)
    ids = generator.integers(3, 1000, count * tokens).astype(np.int32)
    examples = Examples(ids, np.arange(count + 1) * tokens, generator.integers(0, 8, count))
    examples = replace(examples, targets=examples.every_token)
    stack = AdapterStack.new_lora(lora, 64, seed=0) if lora else AdapterStack.new(range(1, 4), 1024, 64, 8, seed=0)
    with torch.no_grad():
        for parameter in stack.parameters():  # new adapters are the identity
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    warm_up(ModelSource(folder / "model", torch.float32, folder / "warm"))
    for weights, most in (("resident", server.SERVER_LAYERS), ("streamed", 0)):
        server.SERVER_LAYERS = most
        base = ModelSource(folder / "model", torch.float32, folder / weights)
        job = SimpleNamespace(base=base, validation=examples, planner=SimpleNamespace(costs=memory))
        evaluator = StreamingEvaluator(base, memory, {"validation": examples})
        # The window's three layers are in memory at the same time where weights are resident.
        score, exit_took = ServerEvaluation(cast("Any", job), evaluator).early_exit(stack, Window(1, 3))
        whole = evaluator.evaluate(stack, "validation")
        document = {
            "family": family,
            "early_exit": [exit_took.planned_bytes, exit_took.peak_bytes],
            "whole": [whole.planned_bytes, whole.peak_bytes],
            "losses": [score.loss, float(whole.predictions.losses.sum() / whole.predictions.counts.sum())],
            "process": whole.process_bytes,
        }
        print(json.dumps(document), flush=True)


if __name__ == "__main__":
    in_forks(sys.argv[2:], lambda family: main(Path(sys.argv[1]) / family, family))
