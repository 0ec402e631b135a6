"""Makes a small language model for ``decoder.yaml``, and rows from a field that the model was not trained on.

    .venv/bin/python examples/decoder.py [FOLDER]

The model is a LLaMA of six layers with its own tokenizer. It is trained on the prose in the docstrings of installed libraries.
The rows are whole docstrings of another library, with formulae and interactive sessions. The packages of that library are the
sites that hold the rows.
"""

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from chainfed_ray.data.docstrings import docstrings, sources
from chainfed_ray.data.targets import packed, tokenize_texts
from chainfed_ray.data.tokens import Examples
from chainfed_ray.device.threads import one_thread

LIBRARIES = ("matplotlib", "networkx", "numpy", "pandas", "scipy", "sqlalchemy")
FIELD = "sympy"  # symbolic mathematics
MODEL = "tiny-llama"  # the model's folder, whose name is part of the finished model's name
SEED = 7
LENGTH, BATCH = 128, 4  # tokens of an example, as in decoder.yaml, and examples of a step
_END, _VOCABULARY = "</s>", 4096
_RATE, _WARMUP = 3e-3, 0.05  # AdamW's learning rate, and the share of the steps over which it rises
_TOLD = 150  # steps between two progress reports, which take as long as ten
_FEWEST_WORDS, _NO_PROSE = 5, ("---", "===", "~~~", ">>>")


def make(folder: Path, libraries: Sequence[str] = LIBRARIES, steps: int = 1200, rows: int = 2500) -> dict[str, float]:
    """Train a model on ``libraries`` for ``steps`` steps, and save it and at most ``rows`` rows in ``folder``.

    Returns the model's perplexity, measured as in a job, on held-out text of its ``own`` libraries and on the ``validation``
    and ``test`` rows.
    """
    began = perf_counter()
    known = sorted({prose(text) for library in libraries for _, text in written(library)} - {""})
    _say(began, f"{len(known)} texts of {', '.join(libraries)}")
    tokenizer = trained_tokenizer(known)
    read = packed(tokenize_texts(tokenizer, _shuffled(known), LENGTH), LENGTH)
    _say(began, f"a tokenizer of {len(tokenizer)} tokens; {len(read.ids)} tokens of training text")
    tenth = len(read) // 10
    own, learnt = read.take(np.arange(tenth)[:200]), read.take(np.arange(tenth, len(read)))
    model = pretrained(len(tokenizer), learnt, own, steps, began)
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)

    field = _shuffled(list(islice(written(FIELD), rows)))
    held_out = len(field) // 10
    splits = {"validation": field[:held_out], "test": field[held_out : 2 * held_out], "train": field[2 * held_out :]}
    found = {"own": perplexity(model, own)}
    for name, chosen in splits.items():
        lines = [json.dumps({"site": site, "text": text}) for site, text in chosen]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        if name != "train":
            examples = packed(tokenize_texts(tokenizer, [text for _, text in chosen], LENGTH), LENGTH)
            found[name] = perplexity(model, examples)
    sites = len({site for site, _ in splits["train"]})
    _say(began, f"{len(field)} rows from {sites} packages of {FIELD}; a tenth for validation, a tenth for the test")
    return found


def written(library: str) -> Iterator[tuple[str, str]]:
    """Yield each docstring of ``library`` once, after the name of the package that it is in."""
    seen = set[str]()
    for path in sources(library):
        package, *inner = path.as_posix().rpartition(f"/{library}/")[2].split("/")
        for text in docstrings(path):
            if text not in seen and len(text.split()) >= _FEWEST_WORDS:
                seen.add(text)
                yield f"{library}.{package}" if inner else library, text


def prose(docstring: str) -> str:
    """The paragraphs of a docstring that are sentences, without headings, tables and interactive sessions."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in docstring.split("\n\n"))
    return " ".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    sentence = paragraph[:1].isupper() and paragraph.endswith(".") and len(paragraph.split()) >= _FEWEST_WORDS
    return sentence and not any(mark in paragraph for mark in _NO_PROSE)


def trained_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer like that of LLaMA 3, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=_END, pad_token=_END)


def pretrained(vocabulary: int, read: Examples, own: Examples, steps: int, began: float) -> LlamaForCausalLM:
    """A model trained on ``steps`` batches of ``read``, with AdamW and a cosine schedule. ``own`` is for progress reports."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rises = max(int(steps * _WARMUP), 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rises, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for step, chosen in enumerate(_batches(len(read), steps), start=1):
        loss = _loss(model, read, chosen)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % _TOLD == 0:
            _say(began, f"step {step} of {steps}: perplexity {perplexity(model, own):.1f} on held-out text")
    return model


def _batches(count: int, steps: int) -> Iterator[np.ndarray]:
    """The indices of each step's examples: all examples in random order, then all in another order, and so on."""
    generator = np.random.default_rng(SEED)
    order = np.concatenate([generator.permutation(count) for _ in range(steps * BATCH // count + 1)])
    return iter(order[: steps * BATCH].reshape(steps, BATCH))


@torch.no_grad()
def perplexity(model: Any, examples: Examples) -> float:
    """The perplexity: exp of the mean cross-entropy over all tokens except the first of each example."""
    chosen = list(examples.by_length(BATCH))
    counts = [int((examples.lengths[places] - 1).sum()) for places in chosen]
    losses = [float(_loss(model, examples, places)) for places in chosen]
    return math.exp(float(np.average(losses, weights=counts)))


def _loss(model: Any, examples: Examples, chosen: np.ndarray) -> torch.Tensor:
    batch = examples.batch(chosen)
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    loss: torch.Tensor = model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
    return loss


def _shuffled(rows: list[Any]) -> list[Any]:
    return [rows[place] for place in np.random.default_rng(SEED).permutation(len(rows))]


def _say(began: float, words: str) -> None:
    print(f"{perf_counter() - began:5.0f} s  {words}", flush=True)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"  # saving a model imports DeepSpeed, which would look for a GPU
    logging.disable_progress_bar()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "decoder")
    with one_thread():
        found = make(folder)
    print(f"The model is in {folder / MODEL}. Its perplexity before fine-tuning:")
    print(f"  {found['own']:6.1f}  on held-out text from the libraries that it was trained on")
    print(f"  {found['validation']:6.1f}  on the validation rows, from a library that it was not trained on")
    print(f"  {found['test']:6.1f}  on the test rows, from the same library")
