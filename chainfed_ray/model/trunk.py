"""What is around a base model's layers: the embeddings below them and the operations after the last one, for any family.

There is no file per family. The model is built on the meta device, without memory, and its *own* forward is run with its layers
replaced by recorders. These keep what the model passes to each layer besides the hidden states (masks, rotary tables), and the
last one stops the forward. A layer can then be run by itself, with its own weights and the recorded call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.hub import configuration, kind_and_line
from chainfed_ray.reading import reading_from
from chainfed_ray.streaming.blank_model import BlankModel, blank_model, copy_of
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.embeddings import RowTable, embedding_tables
from chainfed_ray.streaming.unchanged import while_unchanged


class LayerCall(NamedTuple):
    """The arguments that the model's forward passes to a layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Trunk:
    """The base model in ``folder`` without its layers. ``layers`` are these, on the meta device.

    Only small parts are resident (norms, rotary frequencies); of embedding tables the rows in use are read.

    Raises:
        UnsupportedModel: the model has no list of equal layers, or its checkpoint lacks a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, checkpoint: Checkpoint) -> None:
        self.folder, self._checkpoint, self._dtype = folder, checkpoint, dtype
        config = while_unchanged(folder, "configuration", lambda: configuration(folder))
        self.family = config.model_type
        if self.family in _DIFFERENT:
            raise self._unlike("gives other values layer by layer than as a whole")
        with self.named_errors("cannot be built"):
            blank = blank_model(folder, config, dtype, checkpoint)
        with self.named_errors("has no list of equal layers above a table of embeddings"):
            self._take_apart(blank)
        self._position_bias = self._read_position_bias()
        self._tables = [self._replace_table(name, table) for name, table in embedding_tables(self._model)]
        self._materialise()
        self._calls: list[LayerCall] = []
        self._embedded, self._bias = torch.empty(0), torch.empty(0)
        self._last_output: Tensor | None = None

    def _take_apart(self, blank: BlankModel) -> None:
        """Find the part of the model that reads texts and its layers, and put recorders in their place."""
        self.names, self._settings = blank.names.in_checkpoint(self._checkpoint), blank.settings
        self.layers_path = find_layers(blank.model, str(self.folder))
        whole = copy_of(
            blank.model, blank.model.get_submodule(self.layers_path)
        )  # what is around the layers is changed
        self.prefix = whole.base_model_prefix
        within = text_part(whole)
        self._within = f"{within}." if within else ""
        self._model: Any = whole.get_submodule(within)
        self.config = getattr(self._model, "config", whole.config)  # a few encoders have none of their own
        if (given := self._model.main_input_name) != "input_ids":
            raise UnsupportedModel(str(self.folder), f"{self.family} reads no texts, but {given}")
        self.hidden_size, self.vocabulary = int(self.config.hidden_size), int(self.config.vocab_size)
        words = self._model.get_input_embeddings()
        self._tokens = len(words.weight)
        table = next(name for name, module in self._model.named_modules() if module is words)
        self.word_table = self.source(f"{self._within}{table}.weight")
        modules: Any = whole.get_submodule(self.layers_path)
        count = int(self.config.num_hidden_layers)
        self._places = [index * len(modules) // count for index in range(count)]
        self.layers: list[nn.Module] = [modules[place] for place in self._places]
        whole.set_submodule(self.layers_path, nn.ModuleList(_Recorder(layer, self._record) for layer in modules))

    @property
    def num_layers(self) -> int:
        """L, the number of times that the model runs a layer."""
        return len(self.layers)

    def source(self, name: str) -> str:
        """The checkpoint's name of a parameter.

        Raises:
            UnsupportedModel: the checkpoint does not have it.
        """
        source = self.names.find(name)
        if source is None:
            raise UnsupportedModel(str(self.folder), f"its checkpoint has no tensor {name}")
        return source

    def fitting(self, name: str, parameter: Tensor) -> str:
        """The checkpoint's name of a parameter that it has as the configuration says.

        Raises:
            UnsupportedModel: it has no such tensor, or one of another shape, or numbers of another kind.
        """
        source, wanted = self.source(name), list(parameter.shape)
        if (stored := list(self._checkpoint.shape(source))) != wanted:
            raise UnsupportedModel(
                str(self.folder), f"its configuration has {wanted} for {name}, and its checkpoint {stored}"
            )
        if (dtype := self._checkpoint.dtype(source)).is_floating_point != parameter.is_floating_point():
            raise UnsupportedModel(
                str(self.folder), f"its checkpoint has {name} as {str(dtype).removeprefix('torch.')}"
            )
        return source

    def layer_name(self, index: int) -> str:
        """The path of layer ``index`` in the model. In ALBERT several layers are one module, which runs several times."""
        return f"{self.layers_path}.{self._places[index]}"

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Token ids and mask [B, T] → the hidden states [B, T, D] that enter layer 0, and the call of each layer."""
        self._calls = []
        with torch.no_grad(), suppress(_LastLayerReached):
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        embedded, calls = self._embedded, self._calls
        self._embedded, self._bias, self._calls = torch.empty(0), torch.empty(0), []
        return self.turned(embedded), calls

    def calls(self, mask: Tensor) -> list[LayerCall]:
        """The calls for right-padded examples with the mask [B, T]. The ids do not matter, and no embedding row is read."""
        # Tables of positions may be what layers are given; those of tokens are not.
        with self._without([table for table in self._tables if table.num_embeddings == self._tokens]):
            return self.embed(self._placeholder_ids(mask), mask)[1]

    def run(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer: [B, T, D] → [B, T, D]."""
        output = layer(self.turned(hidden), *call.args, **call.kwargs)
        return self.turned(output[0] if isinstance(output, tuple | list) else output)

    def turned(self, hidden: Tensor) -> Tensor:
        """Hidden states as the model's layers have them, and back: in XLNet they are [T, B, D]."""
        return hidden.transpose(0, 1) if self.family in TOKENS_FIRST else hidden

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The model's operations after its last layer (for most, a norm): [B, T, D] → [B, T, D]."""
        self._last_output = self.turned(hidden)
        try:
            with self._without(self._tables):
                finished: Tensor = self._model(
                    input_ids=self._placeholder_ids(mask), attention_mask=mask, use_cache=False
                )[0]  # also where a configuration asks for tuples
        finally:
            self._last_output, self._calls = None, []
        return finished

    def try_texts(self) -> tuple[Tensor, list[LayerCall]]:
        """Embed two short texts, of which one is padded: as ``embed``, and check that layers can be run one by one.

        Raises:
            UnsupportedModel: they cannot; with what stands in the way.
        """
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
        ids = torch.where(mask.bool(), torch.arange(3, 15).view(2, 6) % self.vocabulary, self._placeholder_ids(mask))
        with self.named_errors("cannot be run on texts alone"):
            (hidden, calls), without = self.embed(ids, mask), self.calls(mask)
        if len(calls) < self.num_layers:
            raise self._unlike("does not run its layers one after the other")
        if any(tensor.isnan().any() for tensor in _tensors((hidden, calls))):
            raise self._unlike("gives its layers a whole embedding table")
        if not all(map(torch.equal, _tensors(calls), _tensors(without))):
            raise self._unlike("gives its layers rows of embedding tables besides hidden states")
        if hidden.shape != (*mask.shape, self.hidden_size):
            raise self._unlike(f"has hidden states {list(hidden.shape)} for texts of {list(mask.shape)} tokens")
        if lacking := self._lacking:
            with self.named_errors(f"cannot be run after its last layer; {lacking[0]} is missing"):
                self.finish(hidden, mask)
        return hidden, calls

    @property
    def modules(self) -> int:
        """The number of modules around the layers."""
        return sum(1 for _ in self._model.modules())

    @property
    def parts(self) -> int:
        """The number of tensors of the checkpoint that are parts of a parameter."""
        return self.names.parts

    @property
    def _lacking(self) -> list[str]:
        """The parameters around the layers that the checkpoint does not have."""
        return [name for name, _ in self._model.named_parameters() if not self.names.find(self._within + name)]

    @property
    def parameters(self) -> list[str]:
        """The checkpoint's names of the embedding tables, and of what is resident around the layers."""
        names = (self.names.find(self._within + name) for name, _ in self._model.named_parameters())
        return [name for name in names if name]

    @contextmanager
    def named_errors(self, trouble: str) -> Iterator[None]:
        """Whatever the model's own code raises is about the model: ``trouble`` says what of it does not go.

        Raises:
            UnsupportedModel: with the error in words.
        """
        folder, what = str(self.folder), f"{self.family} {trouble}"
        with reading_from(folder, lambda error: UnsupportedModel(folder, f"{what} ({kind_and_line(error)})")):
            yield

    def _placeholder_ids(self, mask: Tensor) -> Tensor:
        """Token ids with padding where ``mask`` is 0: some families find positions by the padding token."""
        pad = max(getattr(self.config, "pad_token_id", None) or 0, 0)  # some say by -1 that there is none
        return torch.where(mask.bool(), pad + 1, pad)

    @contextmanager
    def _without(self, tables: list[RowTable]) -> Iterator[None]:
        """Read no row of ``tables``, for the length of the block."""
        for table in tables:
            table.enabled = False
        try:
            yield
        finally:
            for table in tables:
                table.enabled = True

    def _record(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Any:
        """Take the place of the next layer. Its output is ``hidden`` itself, which shows whether the model changes it."""
        place = len(self._calls)
        if place == 0:
            self._embedded = hidden
        elif hidden is not self._embedded:
            raise self._unlike("changes the hidden states between its layers")
        if layer is not self.layers[place]:
            raise self._unlike("does not run its layers one after the other")
        if any(tensor.is_meta for tensor in _tensors(call)):
            raise self._unlike("hands more than hidden states from layer to layer")
        if place == 0 and self._position_bias:
            call = self._with_position_bias(layer, hidden, call)
        self._calls.append(call)
        output = hidden
        beside = self._beside_hidden(layer, hidden, call)  # of a model's only layer as well: ``finish`` may be traced
        if place == self.num_layers - 1:
            if self._last_output is None:
                raise _LastLayerReached
            output = self._last_output
        if self._position_bias and beside:
            beside = (self._bias, *beside[1:])
        return output if beside is None else (output, *beside)

    def _beside_hidden(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> tuple[Any, ...] | None:
        """What layers return besides hidden states, without values; None if they return these alone, in no tuple."""
        kind = type(layer), self._settings
        if kind not in _BESIDE:
            with self.named_errors("has layers that cannot be run one by one"):
                output = run_on_meta(layer, hidden, call)
            _BESIDE[kind] = tuple(output[1:]) if isinstance(output, tuple | list) else None
        return _BESIDE[kind]

    def _read_position_bias(self) -> Any:
        """T5's first layer computes a bias of positions, and hands it to the others. The module that does so, with its table.

        None for a family in which no layer or each layer has such a module.
        """
        found = [
            [(path, module) for path, module in layer.named_modules() if hasattr(module, "relative_attention_bias")]
            for layer in self.layers
        ]
        if not found[0] or any(found[1:]):
            return None
        path, module = found[0][0]
        made: Any = copy_of(module)
        name = f"{self.layer_name(0)}.{path}.relative_attention_bias.weight"
        table = self._checkpoint.read(self.source(name), self._dtype)
        made.relative_attention_bias.weight = nn.Parameter(table, requires_grad=False)
        return made.eval()

    def _with_position_bias(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> LayerCall:
        """The call of T5's first layer with the bias that the others are given, so that all layers hold the same."""
        tokens = hidden.shape[1]
        given = signature(layer.forward).bind(hidden, *call.args, **call.kwargs)
        self._bias = given.arguments["position_bias"] = self._position_bias.compute_bias(tokens, tokens)
        return LayerCall(given.args[1:], given.kwargs)

    def _unlike(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(str(self.folder), f"{self.family} {what}, so they cannot be run one by one")

    def _replace_table(self, name: str, table: nn.Embedding) -> RowTable:
        RowTable.take_over(table, self._checkpoint, self.fitting(f"{self._within}{name}.weight", table.weight))
        assert isinstance(table, RowTable)
        return table

    def _materialise(self) -> None:
        """Load what is neither a layer nor an embedding table. What the checkpoint lacks stays on the meta device."""
        # Many checkpoints lack a pooler, and nothing here uses what it makes.
        if any(name.startswith("pooler.") for name in self._lacking):
            self._model.pooler = None
        for name, module in list(self._model.named_modules()):
            if isinstance(module, _Recorder | RowTable):
                continue
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                stored = self._within + (f"{name}.{key}" if name else key)
                source = self.names.find(stored)
                if source and isinstance(value, nn.Parameter):
                    self.fitting(stored, value)
                    setattr(module, key, nn.Parameter(self._checkpoint.read(source, self._dtype), requires_grad=False))
                elif source:
                    setattr(module, key, self._checkpoint.read(source, value.dtype))


def text_part(model: Any) -> str:
    """The path of the part of a model that reads texts: "" for most; an encoder, or the language model beside one of pictures.

    Raises:
        ValueError: the model has no such part.
    """
    # Imported here, where a process may have chosen what comes with it (lean_imports.py).
    from transformers import PreTrainedModel

    if getattr(model.config, "is_encoder_decoder", False):
        part = model.get_encoder()
        return str(next(name for name, module in model.named_modules() if module is part))
    text = type(model.config.get_text_config())
    if isinstance(model.config, text):
        return ""
    models = [(name, module) for name, module in model.named_modules() if isinstance(module, PreTrainedModel)]
    return str(next(name for name, module in models if isinstance(module.config, text)))


def find_layers(model: Any, name: str) -> str:
    """The path of the list of layers in a Hugging Face model; ``name`` names the model in the error.

    Raises:
        UnsupportedModel: no list has as many modules, all of one class, as the configuration has hidden layers.
    """
    within = text_part(model)
    part = model.get_submodule(within)
    config = getattr(part, "config", model.config)
    # ALBERT has a module for each group of layers, which share their weights.
    count = int(getattr(config, "num_hidden_groups", config.num_hidden_layers))
    found: list[str] = [
        path
        for path, module in part.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(item) for item in module}) == 1
    ]
    if not found:
        raise UnsupportedModel(name, f"{type(model).__name__} has no list of {count} equal layers")
    # A list inside a layer may have the same length; the outermost list is the layers.
    layers = min(found, key=lambda path: path.count("."))
    return f"{within}.{layers}" if within else layers


def run_on_meta(layer: nn.Module, hidden: Tensor, call: LayerCall) -> Any:
    """What a layer returns, without values: it is run on the meta device, which costs nothing."""
    # Run a copy, because a layer may move its buffers to the device of its input.
    elsewhere = on_meta(call)
    return copy_of(layer).to("meta")(hidden.to("meta"), *elsewhere.args, **elsewhere.kwargs)


def on_meta(call: LayerCall) -> LayerCall:
    moved: LayerCall = tree_map(lambda it: it.to("meta") if isinstance(it, Tensor) else it, call)
    return moved


def _tensors(values: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


TOKENS_FIRST = ("xlnet",)
_DIFFERENT = ("inkling_text", "chinese_clip")  # found by `python -m benchmarks zoo`; why is not known
_BESIDE: dict[tuple[type, str], tuple[Any, ...] | None] = {}  # by class and configuration


class _LastLayerReached(Exception):
    """Stops the model's forward, because nothing after the layers is needed."""


class _Recorder(nn.Module):
    """Takes the place of a layer, and returns what ``record`` returns for the layer's call."""

    def __init__(self, layer: nn.Module, record: Callable[[nn.Module, Tensor, LayerCall], Any]) -> None:
        super().__init__()
        # Set without registering a submodule, because the layer's weights are not this module's.
        object.__setattr__(self, "_replaced", layer)
        self._record = record

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._record(object.__getattribute__(self, "_replaced"), hidden, LayerCall(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_replaced"), name)
