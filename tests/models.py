"""Tiny models with random weights, made in memory and saved as a user's would be."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2")

_WIDTH = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4, "n_layers": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
}


def tiny(family: str, folder: Path, layers: int = 4, vocabulary: int = 128, seed: int = 0) -> Path:
    """Save a random model of ``family`` with hidden size 32 in ``folder``."""
    tiny_model(family, layers, vocabulary, seed).save_pretrained(folder)
    return folder


def tiny_model(family: str, layers: int = 4, vocabulary: int = 128, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; no weight keeps a value (0 or 1) that could hide a mistake."""
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
    sizes = _WIDTH[family] if family in ("distilbert", "gpt2") else {**common, **_WIDTH.get(family, {})}
    if family == "gpt2":
        sizes = {**sizes, "n_layer": layers}
    if family == "distilbert":
        sizes = {**sizes, "n_layers": layers}
    config = AutoConfig.for_model(family, vocab_size=vocabulary, pad_token_id=0, **sizes)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
