"""Makes a small model of random weights of any family that transformers knows."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_LARGEST = 30_000_000  # parameters
_LAYERS, _WIDTH, _INNER, _HEADS, _HEAD = 4, 32, 64, 4, 8
# The names that families have for the same size.
_NAMES: dict[str | int, str] = {
    _WIDTH: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size d_embed width projection_dim lru_width",
    _INNER: "intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner hidden_dim ffn_hidden_size "
    "moe_intermediate_size shared_expert_intermediate_size mlp_dim moe_layer_ffn_dim shared_intermediate_size "
    "intermediate_size_mlp feed_forward_size expert_ffn_size ffn_intermediate_size max_position_embeddings n_positions n_ctx "
    "max_seq_len max_seq_length max_sequence_length",
    _LAYERS: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts mamba_n_heads mamba_num_heads "
    "sliding_window local_attention rotary_dim index_topk",
    2: "num_key_value_heads num_kv_heads num_key_value_groups n_head_kv num_experts_per_tok moe_topk moe_k "
    "num_experts_per_token experts_per_token linear_num_key_heads linear_num_value_heads index_n_heads max_window_layers "
    "expand eos_token_id",
    _HEAD: "head_dim d_kv attention_head_size kv_channels d_head kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "linear_key_head_dim linear_value_head_dim index_head_dim state_size mamba_d_state hidden_size_per_layer_input",
    16: "q_lora_rank mamba_d_head mamba_head_dim attention_window",
    1: "bos_token_id n_group topk_group first_k_dense_replace n_shared_experts n_groups mamba_n_groups num_kv_shared_layers",
    0: "pad_token_id num_nextn_predict_layers",
    128: "vocab_size vocab_size_per_layer_input",
    28: "image_size",
    14: "patch_size",
}
_SIZES: dict[str, Any] = {name: size for size, names in _NAMES.items() for name in names.split()}
# What the sizes above leave at odds, and what makes a family use what it is known for.
_OF_FAMILIES: dict[str, dict[str, Any]] = {
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2},
    "albert": {"num_hidden_groups": 2},
}


def small_model(family: str) -> PreTrainedModel:
    """A random model of ``family``.

    Raises:
        ValueError: the family cannot be made small by these sizes.
        Exception: its code does not accept them; or it needs a package that is not installed.
    """
    config = _shrunk(CONFIG_MAPPING[family]())
    for key, value in _OF_FAMILIES.get(family, {}).items():
        setattr(config, key, value)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())
    if parameters > _LARGEST:
        raise ValueError(f"it has {parameters:,} parameters at the least")
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float32)
    model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def saved_model(family: str, folder: Path) -> PreTrainedModel:
    """A random model of ``family``, as it is after it was saved in ``folder``: some families save less than they have."""
    small_model(family).save_pretrained(folder)
    saved: PreTrainedModel = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    saved.eval()
    return saved


def _shrunk(config: Any) -> Any:
    """``config`` with small sizes, and so the configurations within it."""
    for key in [*vars(config), *type(config).attribute_map.values()]:
        value = _read(config, key)
        if isinstance(value, PreTrainedConfig):
            _shrunk(value)
        elif key in ("layer_types", "mlp_layer_types") and value:
            kinds = list(dict.fromkeys(value))
            _write(config, key, [kinds[index % len(kinds)] for index in range(_LAYERS)])
        elif key in _SIZES and isinstance(value, int):
            _write(config, key, _SIZES[key])
    return config


def _read(config: Any, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except (AttributeError, ValueError):  # some follow from others, layer by layer
        return None


def _write(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except (AttributeError, ValueError):  # some follow from others
        return
