"""Texts that SmolLM2 writes together, against one after another, and against transformers: rows of ``benchmarks serving``.

The texts have lengths from 8 to 96 tokens and stacks of their own. The tokens of both sides are compared.
"""

from time import process_time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.cell_process import Row
from benchmarks.random_stacks import RandomStacks
from chainfed_ray.data.docstrings import rows
from chainfed_ray.hub import resolve, tokenizer
from chainfed_ray.model.source import load_whole
from chainfed_ray.serving.generator import Generator
from chainfed_ray.serving.language_model import LanguageModel
from chainfed_ray.serving.messages import Piece, Sampling

_BASE, _BOTTLENECK, _SHORTEST, _LONGEST = "builtin:smollm2", 32, 8, 96


def text_rows(count: int, stacks: int) -> list[Row]:
    """``count`` texts over ``stacks`` stacks, each way."""
    made = RandomStacks(_BASE, _BOTTLENECK)
    saved = [made.stack(seed, None) for seed in range(stacks)]
    prompts = [text[:200] for text, _ in rows()[:count]]
    lengths = [_SHORTEST + (_LONGEST - _SHORTEST) * place // (count - 1) for place in range(count)]
    asked = [(saved[place % stacks], prompts[place], lengths[place]) for place in range(count)]
    generator = Generator(LanguageModel(_BASE, torch.float32), most_rows=count)
    generator.write(saved[0], "warm up", Sampling(4, temperature=0), lambda _: None)

    together, seconds = _together(generator, asked)
    alone, seconds_alone = _one_after_another(generator, asked)
    plain, seconds_plain = _together(generator, [(None, prompt, length) for _, prompt, length in asked])
    theirs, seconds_theirs = _by_transformers(prompts, lengths)
    assert together == alone, "texts that are written together are what they are alone"
    assert plain == theirs, "transformers writes the same texts with the base model"
    what = f"{count} texts, {sum(lengths)} tokens, {stacks} stacks"
    return [
        _row(what, seconds, "one after another", seconds_alone),
        _row(what, seconds, "transformers' continuous batching, no stacks", seconds_theirs),
        _row(
            f"{count} texts, no stacks", seconds_plain, "transformers' continuous batching, no stacks", seconds_theirs
        ),
    ]


def _row(what: str, ours: float, other: str, theirs: float) -> Row:
    return {
        "what": what,
        "together_seconds": ours,
        "other": other,
        "other_seconds": theirs,
        "ratio": theirs / ours,
    }


def _together(generator: Generator, asked: list[Any]) -> tuple[list[str], float]:
    texts = [list[Piece | Exception]() for _ in asked]
    started = process_time()
    for (saved, prompt, length), text in zip(asked, texts, strict=True):
        generator.begin(saved, prompt, Sampling(length, temperature=0), text.append)
    while generator.step():
        pass
    seconds = process_time() - started
    return ["".join(piece.text for piece in text if isinstance(piece, Piece)) for text in texts], seconds


def _one_after_another(generator: Generator, asked: list[Any]) -> tuple[list[str], float]:
    texts, started = [], process_time()
    for saved, prompt, length in asked:
        pieces = list[Piece]()
        generator.write(saved, prompt, Sampling(length, temperature=0), pieces.append)
        texts.append("".join(piece.text for piece in pieces))
    return texts, process_time() - started


def _by_transformers(prompts: list[str], lengths: list[int]) -> tuple[list[str], float]:
    folder = resolve(_BASE)
    words = tokenizer(_BASE, folder)
    model: Any = load_whole(AutoModelForCausalLM, folder, torch.float32)
    settings = GenerationConfig(do_sample=False, eos_token_id=model.generation_config.eos_token_id, pad_token_id=0)
    manager = model.init_continuous_batching(generation_config=settings)
    manager.start()
    try:
        started = process_time()
        names = [
            manager.add_request(words(prompt)["input_ids"], max_new_tokens=length)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        found = dict[str, list[int]]()
        while len(found) < len(names):
            if (result := manager.get_result(timeout=1)) is not None and result.is_finished():
                found[result.request_id] = result.generated_tokens
        seconds = process_time() - started
    finally:
        manager.stop(block=True)
    return [str(words.decode(found[name], skip_special_tokens=True)) for name in names], seconds
