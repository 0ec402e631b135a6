"""Checks a job against its base model, and traces the memory that the parts of a turn hold on it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np

from chainfed_ray.activity import Listener, Reporter, no_listener
from chainfed_ray.budget.demand import MemoryProfile
from chainfed_ray.data.tokens import Examples
from chainfed_ray.errors import InvalidJob, UnsupportedModel
from chainfed_ray.hub import kind_and_line
from chainfed_ray.model.adapters import LoraShapes
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import known_profile_of
from chainfed_ray.model.source import ModelSource, check_generation
from chainfed_ray.problem import Problem, some_of
from chainfed_ray.reading import reading_from
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.sections import AdapterSpec, ChainSpec, DataSpec, ModelSpec

FEATURES = 1536  # the most pooled features of a fitted head by default; with a wider model the head has one layer


class Traced(NamedTuple):
    """Where the base model's module has its layers, what a LoRA is on, and how much memory the parts of a turn hold."""

    layers_path: str
    lora: LoraShapes | None
    memory: MemoryProfile


def traced(
    spec: JobSpec,
    source: ModelSource,
    classes: int | None,
    texts: Iterable[Examples],
    spelled_out: Callable[[int], Problem | None],
    listen: Listener = no_listener,
) -> Traced:
    """Check the job and its ``texts`` against the base model, and trace the memory of the model's parts.

    ``classes`` is C of a classifier's head; None for a language model. ``spelled_out`` names the row that spells out a token.

    Raises:
        InvalidJob: the model cannot be streamed, or a key of the job does not fit it.
    """
    chain, causal = spec.chain, spec.model.task == "causal-lm"
    Reporter("checking the base model", listen).begin()
    with about_the_model(spec.model.base), closing(Blocks(source.folder, source.dtype)) as blocks:
        blocks.check()
        if causal:
            _check_head(spec.model.base, blocks)
            check_generation(source.folder)
        check_texts(spec.model, spec.data, blocks, texts, spelled_out)
        _check_chain(chain, spec.window(blocks.num_layers), blocks.num_layers)
        Reporter("tracing the memory of the model's parts", listen).begin()
        lora = _lora(chain.adapter, blocks, causal) if chain.adapter.kind == "lora" else None
        with blocks.named_errors("has layers whose memory cannot be planned"):
            memory = known_profile_of(blocks, chain.adapter.width, classes, _head_layers(chain, blocks), lora)
        return Traced(blocks.causal_layers_path if causal else blocks.layers_path, lora, memory)


@contextmanager
def about_the_model(base: str) -> Iterator[None]:
    """Say of whatever goes wrong in the block that it is about the model ``base``: its files and its code are the user's.

    Raises:
        InvalidJob: with the cause in words.
        OSError: a disk or a connection does not work.
    """

    def refusal(error: Exception) -> InvalidJob:
        return InvalidJob.at("model.base", base, f"a model that can be streamed ({kind_and_line(error)})")

    try:
        with reading_from(base, refusal):
            yield
    except UnsupportedModel as error:
        raise InvalidJob.at("model.base", base, f"a model that can be streamed ({error.reason})") from None


def _check_head(base: str, blocks: Blocks) -> None:
    try:
        blocks.language_head  # noqa: B018  the property raises if the model has no language head
    except UnsupportedModel as error:
        raise InvalidJob.at("model.base", base, f"a language model ({error.reason})") from None


def check_texts(
    model: ModelSpec,
    data: DataSpec,
    blocks: Blocks,
    texts: Iterable[Examples],
    spelled_out: Callable[[int], Problem | None] | None = None,
) -> None:
    """Check that every token id has an embedding, and that the model can embed the longest text.

    The longest text is embedded for a try, since not every model has a table of positions that tells its limit.
    ``spelled_out`` names the row that spells out a token, where the rows may be named.

    Raises:
        InvalidJob: the tokenizer, the text length or the model is unsuitable.
    """
    for examples in texts:
        if not len(examples):
            continue  # every client is at a site, which checks its own rows
        if (highest := int(examples.ids.max())) >= blocks.vocabulary:
            if spelled_out and (problem := spelled_out(highest)):
                raise InvalidJob((problem,))
            made_for = f"a tokenizer made for the model, which has {blocks.vocabulary} token ids"
            expected = f"{made_for}; this one gives {highest}, perhaps for a special token that a text has"
            raise InvalidJob.at("model.base", model.base, expected)
        longest = int(examples.lengths.argmax())
        positions = blocks.positions if model.task == "causal-lm" else None  # an encoder's may be relative
        if positions is not None and examples.lengths[longest] > positions:
            expected = f"at most {positions}, the model's positions; a text has {examples.lengths[longest]} tokens"
            raise InvalidJob.at("data.max_length", data.max_length, expected)
        batch = examples.batch(np.array([longest]))
        try:
            blocks.embed(batch.ids, batch.mask)
        except (IndexError, RuntimeError):
            expected = (
                f"a smaller number: a text has {examples.lengths[longest]} tokens, more than the model has positions"
            )
            raise InvalidJob.at("data.max_length", data.max_length, expected) from None


def _check_chain(chain: ChainSpec, window: int, layers: int) -> None:
    """Check that a window of Q = ``window`` adapters, the chain's start and its head fit a model of L = ``layers``."""
    if window > layers:
        raise InvalidJob.at("chain.window", window, f"at most {layers}, the model's layers")
    if isinstance(chain.start, int) and chain.start > layers - window:
        raise InvalidJob.at("chain.start", chain.start, f"at most {layers - window}, where a window fits")
    if chain.head_layers is not None and chain.head_layers > layers:
        raise InvalidJob.at("chain.head_layers", chain.head_layers, f"at most {layers}, the model's layers")


def _head_layers(chain: ChainSpec, blocks: Blocks) -> int:
    """The number of head layers: the job's own or, by default, several if the head is fitted anew in each stage.

    The clients' sums grow with the square of the features, so ``FEATURES`` limits them. A head that is not fitted anew takes
    one layer: as the window slides, the layers below its top are others than those on which it was trained.
    """
    if chain.head_layers is not None:
        return chain.head_layers
    fitted_anew = chain.head == "fitted" and chain.schedule == "staged"
    return max(1, min(blocks.num_layers, FEATURES // blocks.hidden_size)) if fitted_anew else 1


def _lora(adapter: AdapterSpec, blocks: Blocks, causal: bool) -> LoraShapes:
    """The linear modules of each layer that a LoRA is on.

    Raises:
        InvalidJob: a target is the name of no linear module, or no LoRA fits the model.
    """
    made = blocks.linear_modules if causal else blocks.text_modules
    modules = {index: made(index) for index in range(blocks.num_layers)}
    names = {path.rpartition(".")[2] for layer in modules.values() for path in layer}
    if not names:
        expected = f"'bottleneck' for {blocks.family}: no linear module is of one layer and given each text by itself"
        raise InvalidJob.at("chain.adapter.kind", adapter.kind, expected)
    wanted = names if adapter.targets is None else set(adapter.targets)
    if unknown := sorted(wanted - names):
        expected = f"a linear module for a LoRA: {some_of(sorted(names))}"
        raise InvalidJob.at("chain.adapter.targets", unknown[0], expected)
    chosen = {
        index: {path: shape for path, shape in layer.items() if path.rpartition(".")[2] in wanted}
        for index, layer in modules.items()
    }
    if without := [index for index, layer in chosen.items() if not layer]:
        expected = f"modules that every layer has; layer {without[0]} has {some_of(sorted(set(modules[without[0]])))}"
        raise InvalidJob.at("chain.adapter.targets", list(adapter.targets or ()), expected)
    return chosen
