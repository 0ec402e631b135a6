"""Builds tiny models with random weights, and stacks for them, and computes their outputs plainly."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from chainfed_ray.model.adapters import AdapterStack, Head
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.forward import added
from chainfed_ray.model.pooling import mean_over_tokens
from chainfed_ray.model.saved_stack import SavedStack

FAMILIES = ("bert", "roberta", "distilbert", "gpt2", "llama", "qwen2")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
# Decoders whose head is their table of embeddings, or is not.
TIED = ("llama", "gpt2", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "cohere", "granite")
UNTIED = ("llama", "gpt2", "qwen2", "mistral", "phi", "phi3", "gptj", *MIXTURES)
# Encoders with a way of their own: positions given to each layer, one layer many times, two stacks, tokens before examples.
ENCODERS = ("deberta-v2", "mpnet", "roformer", "albert", "t5", "bart", "xlnet")

_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 8, **_ENDS}
_SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 6.0}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True}
# The families whose configurations have names of their own for the common sizes.
_OWN_NAMES = ("distilbert", "gpt2", "t5", "bart", "xlnet")
_DEPTH = {"distilbert": "n_layers", "gpt2": "n_layer", "t5": "num_layers", "bart": "encoder_layers", "xlnet": "n_layer"}
_WIDTH: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_heads": 4},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_positions": 64, **_ENDS},
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 4},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 8},
    "gemma": _GEMMA,
    "gemma2": _GEMMA | {"sliding_window": 4, "attn_logit_softcapping": 0.1, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"sliding_window": 4, "sliding_window_pattern": 2, "final_logit_softcapping": 3.0},
    "phi": _GROUPED | _ENDS,
    "phi3": _GROUPED | _ENDS | {"sliding_window": 4},
    "gptj": {"rotary_dim": 4, **_ENDS},
    "cohere": _GROUPED | _ENDS | {"logit_scale": 0.3},
    "granite": _GROUPED | _ENDS | _SCALES,
    "mixtral": _GROUPED | _ENDS | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": _GROUPED | _ENDS | _EXPERTS | {"shared_expert_intermediate_size": 40},
    "qwen3_moe": _GROUPED | _ENDS | _EXPERTS | {"head_dim": 8},
    "gpt_oss": _GROUPED | _ENDS | {"head_dim": 8, "num_local_experts": 5, "sliding_window": 4},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "max_position_embeddings": 64,
    },
    "albert": {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    "t5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4},
    "bart": {
        "d_model": 32,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "decoder_layers": 3,
        "max_position_embeddings": 64,
        **_ENDS,
    },
    "xlnet": {"d_model": 32, "n_head": 4, "d_inner": 64},
}


def tiny(family: str, folder: Path, layers: int = 4, vocabulary: int = 128, seed: int = 0, **options: Any) -> Path:
    """Save a random model of ``family`` with hidden size 32 in ``folder``."""
    tiny_model(family, layers, vocabulary, seed, **options).save_pretrained(folder)
    return folder


def tiny_model(family: str, layers: int = 4, vocabulary: int = 128, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A random model in evaluation mode; no weight keeps a value (0 or 1) that could hide a mistake."""
    return _made(AutoModel, _config(family, layers, vocabulary, **options), seed)


def tiny_causal_model(
    family: str, tied: bool, vocabulary: int = 128, layers: int = 2, **options: Any
) -> PreTrainedModel:
    """A random language model; its head is its word embeddings themselves if it is ``tied``."""
    config = _config(family, layers, vocabulary, tie_word_embeddings=tied, **options)
    return _made(AutoModelForCausalLM, config, seed=0)


def _config(family: str, layers: int, vocabulary: int, **options: Any) -> PreTrainedConfig:
    if family == "gemma3":  # with pictures
        text = _config("gemma3_text", layers, vocabulary, final_logit_softcapping=None, **options).to_dict()
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        pictures = {"image_size": 28, "patch_size": 14, **sizes}
        return AutoConfig.for_model(
            "gemma3", text_config=text, vision_config=pictures, mm_tokens_per_image=4, **options
        )
    common = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": layers}
    depth = {_DEPTH[family]: layers} if family in _OWN_NAMES else {}
    sizes = {**({} if family in _OWN_NAMES else common), **_WIDTH.get(family, {}), **depth}
    return AutoConfig.for_model(family, **{"vocab_size": vocabulary, "pad_token_id": 0, **sizes, **options})


def _made(kind: Any, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose weights depend on ``seed`` alone, not on random numbers that were drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = kind.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@torch.no_grad()
def whole_outputs(folder: Path, dtype: torch.dtype, layers_path: str, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The output [B, T, D] of each layer of the whole Hugging Face model; of its encoder, if it has two stacks."""
    model: Any = AutoModel.from_pretrained(folder, dtype=dtype).eval()
    outputs: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(hidden.transpose(0, 1) if model.config.model_type == "xlnet" else hidden)

    for layer in model.get_submodule(layers_path):
        layer.register_forward_hook(keep)
    reader = model.get_encoder() if model.config.is_encoder_decoder else model
    reader(input_ids=ids, attention_mask=mask)
    return outputs


@torch.no_grad()
def chain_outputs(blocks: Blocks, stack: AdapterStack, ids: Tensor, mask: Tensor) -> list[Tensor]:
    """The output [B, T, D] of each layer of the chain, for token ids and their mask [B, T]. One layer is loaded at a time."""
    hidden, calls = blocks.embed(ids, mask)
    outputs = []
    for index in range(blocks.num_layers):
        layer = blocks.load_layer(index)
        with added(layer, stack.inside(index)):
            hidden = blocks.run(layer, hidden, calls[index])
        if adapter := stack.after(index):
            hidden = adapter(hidden)
        outputs.append(hidden)
    return outputs


def a_stack(layers: range, seed: int = 0, head_layers: int = 1) -> AdapterStack:
    """A stack with random values, whose adapters are far from the identity."""
    stack = AdapterStack.new(layers, 32, 4, 2, seed, head_layers)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return stack


def a_saved_stack(
    folder: Path, layers: tuple[int, ...] = (1, 2, 3), classes: int = 3, seed: int = 0, bottleneck: int = 8
) -> SavedStack:
    """A stack with random values: a value of 0 or 1 could hide a mistake. The number of head layers depends on the seed."""
    stack = AdapterStack.new(layers, 32, bottleneck, classes, seed, head_layers=3 - seed % 3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    names = tuple(f"class-{index}" for index in range(classes))
    return SavedStack(stack, names, 16, f"path:{folder}", Blocks(folder, torch.float32).layers_path)


def a_lora_classifier(
    folder: Path, layers: tuple[int, ...] = (1, 2, 3), classes: int = 3, seed: int = 0, rank: int = 3
) -> SavedStack:
    """As ``a_saved_stack``, with LoRAs on all linear modules that a LoRA of a classifier can be on."""
    blocks = Blocks(folder, torch.float32)
    shapes = {layer: blocks.text_modules(layer) for layer in layers}
    blocks.close()
    stack = AdapterStack.new_lora(shapes, rank, seed, Head(32, classes, layers=3 - seed % 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    names = tuple(f"class-{index}" for index in range(classes))
    return SavedStack(stack, names, 16, f"path:{folder}", blocks.layers_path)


@torch.no_grad()
def class_logits(folder: Path, stack: AdapterStack, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits [B, C] of token ids and their mask [B, T]. One layer is in memory at a time."""
    blocks = Blocks(folder, torch.float32)
    *below, last = chain_outputs(blocks, stack, ids, mask)
    means = torch.stack([mean_over_tokens(hidden, mask) for hidden in below], 1)
    logits: Tensor = stack.head(last, mask, means)
    return logits
