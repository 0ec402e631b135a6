"""Tiny models with random weights, made in memory and saved as a user's would be."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

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


def tiny_model(family: str, layers: int = 4, vocabulary: int = 128, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode; no weight keeps a value (0 or 1) that could hide a mistake."""
    return _with_noise(AutoModel.from_config(_config(family, layers, vocabulary, **options)), seed)


def tiny_causal_model(family: str, tied: bool, vocabulary: int = 128) -> PreTrainedModel:
    """A random language model; its head is its word embeddings themselves if it is ``tied``."""
    config = _config(family, 2, vocabulary, tie_word_embeddings=tied)
    return _with_noise(AutoModelForCausalLM.from_config(config), seed=0)


def _config(family: str, layers: int, vocabulary: int, **options: Any) -> PreTrainedConfig:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
    sizes = _WIDTH[family] if family in ("distilbert", "gpt2") else {**common, **_WIDTH.get(family, {})}
    if family == "gpt2":
        sizes = {**sizes, "n_layer": layers}
    if family == "distilbert":
        sizes = {**sizes, "n_layers": layers}
    return AutoConfig.for_model(family, vocab_size=vocabulary, pad_token_id=0, **sizes, **options)


def _with_noise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()
