"""Builds tokenizers of the kinds that language models have, trained on a few words."""

from collections.abc import Callable
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["hello world, yes or no? (a) Answer: b\n\n  x  y\n", "no  and no\n\nyes", "an  answer\n  or yes"] * 20
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_level(trimmed: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs, as in GPT-2 and LLaMA 3. With ``trimmed`` a token's offsets do not include its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trimmed:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _trained(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())


@cache
def prepending() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as in LLaMA 2 and the first Mistral."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _trained(tokenizer, _BYTES)


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before a text only if the text does not begin with one, by a pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    )
    return _trained(tokenizer, _BYTES)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "byte-level, trimmed": lambda: byte_level(trimmed=True),
    "prepending": prepending,
    "metaspace": metaspace,
}


def _trained(tokenizer: Tokenizer, more: list[str], alphabet: list[str] | None = None) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<unk>", "<s>", "</s>", *more],
        initial_alphabet=alphabet or [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )
