"""Builds tiny language models with a tokenizer of bytes, and stacks for them, and computes their logits plainly."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.messages import Piece, Sampling
from tests.models import chain_outputs, tiny_causal_model

FAMILIES = ("llama", "gpt2", "qwen2")
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def causal_folder(family: str, folder: Path, chat: bool = False) -> Path:
    """A random two-layer language model of ``family``, and a tokenizer with a token for each byte."""
    tiny_causal_model(family, tied=family == "gpt2", vocabulary=260).save_pretrained(folder)
    byte_tokenizer(chat).save_pretrained(folder)
    return folder


def byte_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes. Tokens 0, 1 and 2 are padding, the beginning and the end; every other token is a byte."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {byte: 3 + place for place, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    made.chat_template = CHAT if chat else None
    return made


def a_causal_stack(folder: Path, layers: tuple[int, ...] = (0, 1), seed: int = 0) -> SavedStack:
    """A stack with random values: a value of 0 or 1 could hide a mistake."""
    stack = AdapterStack.new(layers, 32, 8, None, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return SavedStack(stack, (), 64, f"path:{folder}", Blocks(folder, torch.float32).causal_layers_path)


def a_lora_stack(folder: Path, layers: tuple[int, ...] = (0, 1), rank: int = 3, seed: int = 0) -> SavedStack:
    """LoRAs with random values on all linear modules of these layers."""
    blocks = Blocks(folder, torch.float32)
    stack = AdapterStack.new_lora({layer: blocks.linear_modules(layer) for layer in layers}, rank, seed)
    blocks.close()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return SavedStack(stack, (), 64, f"path:{folder}", blocks.causal_layers_path)


@torch.no_grad()
def streamed_logits(folder: Path, stack: AdapterStack, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits [B, T, V] of token ids and their mask [B, T].

    One layer and one slice of the head are in memory at a time.
    """
    blocks = Blocks(folder, torch.float32)
    finished = blocks.finish(chain_outputs(blocks, stack, ids, mask)[-1], mask)
    reader = blocks.reader()
    try:
        return torch.cat([finished @ rows.T for _, rows in reader.slices(blocks.language_head)], dim=-1)
    finally:
        reader.close()
        blocks.close()


def written(generator: Generator, saved: SavedStack, prompt: str, sampling: Sampling) -> tuple[str, Piece]:
    """The text that the generator writes, and its last piece."""
    pieces: list[Piece] = []
    generator.write(saved, prompt, sampling, pieces.append)
    assert [piece.finish_reason is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    return "".join(piece.text for piece in pieces), pieces[-1]
