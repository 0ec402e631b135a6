"""Runs a base model as embed → layers, for any Hugging Face encoder or decoder.

There is no file per family. The model is built on the meta device, without memory, and its *own* forward is run with its layers
replaced by recorders. These keep what the model passes to each layer besides the hidden states (masks, rotary tables), and the
last one stops the forward. A layer is then run by itself, with its own weights and the recorded call.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.hub import configuration
from chainfed_ray.model.logit_form import LogitForm, form_of
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.embeddings import RowTable, embedding_tables
from chainfed_ray.streaming.matrices import RowSlices, SliceReader, is_streamed, stream_matrices


class LayerCall(NamedTuple):
    """The arguments that the model's forward passes to a layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks:
    """The base model in ``folder``, frozen, with weights that are read when they are needed.

    Only the small parts outside layers and embedding tables stay resident (norms, rotary frequencies).

    Raises:
        UnsupportedModel: the model has no list of equal layers, or its checkpoint lacks a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._checkpoint = Checkpoint(folder)
        config = configuration(folder)
        with torch.device("meta"), _RealConstants():
            model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self._model: Any = model
        self.layers_path = find_layers(model, str(self.folder))
        self._meta_layers: nn.ModuleList = model.get_submodule(self.layers_path)  # type: ignore[assignment]
        self.num_layers = len(self._meta_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self._calls: list[LayerCall] = []
        self._last_output: Tensor | None = None
        self._kind = type(self._meta_layers[0]), config.to_json_string()
        self._embedded = torch.empty(0)
        words = model.get_input_embeddings()
        self._word_table = next(name for name, module in model.named_modules() if module is words) + ".weight"
        model.set_submodule(self.layers_path, nn.ModuleList(self._recorder(index) for index in range(self.num_layers)))
        self._tables = [self._replace_table(name, module) for name, module in embedding_tables(model)]
        self._materialise_trunk(config)

    @property
    def causal_layers_path(self) -> str:
        """The path of the layers in this base model's causal language model, such as ``model.layers``."""
        return f"{self._model.base_model_prefix}.{self.layers_path}"

    @property
    def positions(self) -> int | None:
        """The model's maximum number of tokens, or None if its configuration does not say."""
        positions: int | None = getattr(self._model.config, "max_position_embeddings", None)
        return positions

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Token ids and mask [B, T] → the hidden states [B, T, D] that enter layer 0, and the call of each layer."""
        self._calls = []
        with torch.no_grad(), suppress(_LastLayerReached):
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        embedded, calls = self._embedded, self._calls
        self._embedded, self._calls = torch.empty(0), []
        return embedded, calls

    def calls(self, mask: Tensor) -> list[LayerCall]:
        """The calls for right-padded examples with the mask [B, T]. The ids do not matter, and no embedding row is read."""
        with self._without_tables():
            return self.embed(self._placeholder_ids(mask), mask)[1]

    def load_layer(self, index: int, matrices: RowSlices | None = None) -> nn.Module:
        """Layer ``index`` with its weights; drop it to free them.

        If ``matrices`` are given, the layer's matrices are streamed from there whenever it runs; only norms and biases are
        resident.
        """
        layer = copy.deepcopy(self._meta_layers[index])
        prefix = f"{self.layers_path}.{index}."
        if matrices:
            stream_matrices(layer, prefix, matrices, self._source)
        self._load(layer, prefix)
        return layer.eval().requires_grad_(False)

    def place_layer(self, index: int, place: Callable[[nn.Module], None]) -> nn.Module:
        """Layer ``index``, loaded one module at a time: ``place`` moves each module's weights away before the
        next is loaded.
        """
        layer = copy.deepcopy(self._meta_layers[index])
        # Inner modules come first: when a module is placed, its submodules already have been.
        for path, module in reversed(list(layer.named_modules())):
            if own := [name for name in module.state_dict() if "." not in name]:
                prefix = f"{self.layers_path}.{index}." + (f"{path}." if path else "")
                tensors = {name: self._checkpoint.read(self._source(prefix + name), self.dtype) for name in own}
                module.load_state_dict(tensors, strict=False, assign=True)
                del tensors
                place(module)
        return layer.eval().requires_grad_(False)

    def reader(self) -> SliceReader:
        """A reader of this model's matrices. The caller closes it."""
        return SliceReader(self._checkpoint, self.dtype)

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The model's operations after its last layer (for most, a norm): [B, T, D] → [B, T, D]."""
        self._last_output = hidden
        try:
            with self._without_tables():
                finished: Tensor = self._model(
                    input_ids=self._placeholder_ids(mask), attention_mask=mask, use_cache=False
                ).last_hidden_state
        finally:
            self._last_output, self._calls = None, []
        return finished

    @property
    def language_head(self) -> str:
        """The checkpoint's name for the matrix [V, D] that gives logits. If the head is tied, it is the embedding table's name.

        Raises:
            UnsupportedModel: the model has no language model's head.
        """
        config = self._model.config
        # Masked language models tie their embeddings to another kind of head.
        is_causal = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
        for name in ("lm_head.weight", "embed_out.weight"):
            if is_causal and name in self._checkpoint.names:
                return str(name)
        tied = is_causal and getattr(config, "tie_word_embeddings", False)
        source = self._find(self._word_table) if tied else None
        if source is None:
            raise UnsupportedModel(str(self.folder), "it has no head of a language model")
        return source

    @property
    def logit_form(self) -> LogitForm:
        """How the model turns products with its head's matrix into logits.

        Raises:
            UnsupportedModel: the head has an operation that is not supported.
        """
        try:
            return form_of(self._model.config, self._checkpoint.names)
        except ValueError as error:
            raise UnsupportedModel(str(self.folder), f"its head has {error}, which is not supported") from None

    def run(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer: [B, T, D] → [B, T, D]."""
        output = layer(hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @property
    def blank_layers(self) -> tuple[nn.Module, ...]:
        """The layers on the meta device, without weights."""
        return tuple(self._meta_layers)

    @property
    def largest_layer(self) -> nn.Module:
        """The layer with the most bytes, on the meta device."""
        return self._meta_layers[self._largest]

    @property
    def modules(self) -> int:
        """The number of modules, in the layers and around them."""
        return sum(1 for part in (self._model, *self._meta_layers) for _ in part.modules())

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the layers' buffers that are real from the beginning (sinusoids, in a few families)."""
        buffers = (buffer for layer in self._meta_layers for buffer in layer.buffers())
        return sum(buffer.nbytes for buffer in buffers if not buffer.is_meta)

    @property
    def layer_bytes(self) -> int:
        """The bytes of the largest layer's weights, once they are loaded."""
        return self._loaded_bytes(self._sources(self._largest).values())

    @property
    def unstreamed_bytes(self) -> int:
        """The bytes of the largest layer that stay resident when its matrices are streamed."""
        return self.layer_bytes - self._loaded_bytes(self._matrices(self._largest))

    @property
    def longest_row_bytes(self) -> int:
        """The bytes of the longest row of a matrix, stored or loaded, whichever is more. A slice has at least one row."""
        names = [name for index in range(self.num_layers) for name in self._matrices(index)]
        rows = [(self._checkpoint.shape(name)[1], self._checkpoint.dtype(name)) for name in names]
        rows.append((self.hidden_size, self._checkpoint.dtype(self._source(self._word_table))))  # of a language head
        return max(width * max(stored.itemsize, self.dtype.itemsize) for width, stored in rows)

    @property
    def conversion_bytes(self) -> int:
        """The bytes of the largest stored parameter of a layer that has to be converted to be used; 0 if there is none."""
        names = [name for index in range(self.num_layers) for name in self._sources(index).values()]
        converted = (name for name in names if self._checkpoint.dtype(name) != self.dtype)
        return max(map(self._checkpoint.stored_bytes, converted), default=0)

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    @cached_property
    def _largest(self) -> int:
        """The index of the layer with the most bytes."""
        return max(range(self.num_layers), key=lambda index: self._loaded_bytes(self._sources(index).values()))

    def _sources(self, index: int) -> dict[str, str]:
        """The checkpoint's name of each parameter of layer ``index``. One that is missing, or of another shape, is an error."""
        prefix, sources = f"{self.layers_path}.{index}.", {}
        for name, parameter in self._meta_layers[index].named_parameters():
            sources[name] = source = self._source(prefix + name)
            if (stored := self._checkpoint.shape(source)) != tuple(parameter.shape):
                wanted = f"its configuration has {list(parameter.shape)} for {prefix}{name}, and its checkpoint {list(stored)}"
                raise UnsupportedModel(str(self.folder), wanted)
        return sources

    def _matrices(self, index: int) -> list[str]:
        """The checkpoint's names of the matrices of layer ``index`` that can be streamed."""
        sources = self._sources(index)
        streamed = [path for path, module in self._meta_layers[index].named_modules() if is_streamed(module)]
        return [sources[f"{path}.weight"] for path in streamed]

    def _loaded_bytes(self, names: Iterable[str]) -> int:
        return sum(self._checkpoint.loaded_bytes(name, self.dtype) for name in names)

    def _placeholder_ids(self, mask: Tensor) -> Tensor:
        """Token ids with padding where ``mask`` is 0: some families find positions by the padding token."""
        pad = getattr(self._model.config, "pad_token_id", None) or 0
        return torch.where(mask.bool(), pad + 1, pad)

    @contextmanager
    def _without_tables(self) -> Iterator[None]:
        """Read no embedding row, for the length of the block."""
        for table in self._tables:
            table.enabled = False
        try:
            yield
        finally:
            for table in self._tables:
                table.enabled = True

    def _recorder(self, index: int) -> nn.Module:
        return _Recorder(self._meta_layers[index], lambda hidden, call: self._record(index, hidden, call))

    def _record(self, index: int, hidden: Tensor, call: LayerCall) -> Any:
        if index == 0:
            self._embedded = hidden
            if self._kind not in _IN_TUPLE:
                _IN_TUPLE[self._kind] = _returns_a_tuple(self._meta_layers[0], hidden, call)
        self._calls.append(call)
        output = hidden
        if index == self.num_layers - 1:
            if self._last_output is None:
                raise _LastLayerReached
            output = self._last_output
        return (output,) if _IN_TUPLE[self._kind] else output

    def _replace_table(self, name: str, table: nn.Embedding) -> "RowTable":
        RowTable.take_over(table, self._checkpoint, self._source(f"{name}.weight"))
        assert isinstance(table, RowTable)
        return table

    def _materialise_trunk(self, config: Any) -> None:
        """Load what is neither a layer nor an embedding table. What the checkpoint lacks stays on the meta device.

        A checkpoint does not hold every buffer (rotary frequencies, position ids). Constructors compute these, so modules that
        have such buffers are constructed again, for real.
        """
        for name, module in list(self._model.named_modules()):
            if isinstance(module, _Recorder | RowTable) or name.startswith(f"{self.layers_path}."):
                continue
            buffers = {key: value for key, value in module.named_buffers(recurse=False) if value.is_meta}
            if buffers and not list(module.parameters(recurse=False)) and not list(module.children()):
                self._model.set_submodule(name, type(module)(config).eval())
                continue
            for key in buffers:
                if key in ("position_ids", "token_type_ids"):
                    buffers[key] = torch.zeros(buffers[key].shape, dtype=torch.int64)
                    if key == "position_ids":
                        buffers[key] = torch.arange(buffers[key].shape[-1]).expand(buffers[key].shape)
                    module.register_buffer(key, buffers[key], persistent=False)
            for key in dict(module.named_parameters(recurse=False)):
                source = self._find(f"{name}.{key}" if name else key)
                if source:
                    value = self._checkpoint.read(source, self.dtype)
                    setattr(module, key, nn.Parameter(value, requires_grad=False))

    def _load(self, module: nn.Module, prefix: str) -> None:
        tensors = {name: self._checkpoint.read(self._source(prefix + name), self.dtype) for name in module.state_dict()}
        module.load_state_dict(tensors, assign=True)

    def _source(self, name: str) -> str:
        source = self._find(name)
        if source is None:
            raise UnsupportedModel(str(self.folder), f"its checkpoint has no tensor {name}")
        return source

    def _find(self, name: str) -> str | None:
        """The checkpoint's name for a parameter, or None. It may have the base model's prefix, and LayerNorm's old names."""
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        prefix = self._model.base_model_prefix
        candidates = (name, f"{prefix}.{name}", old, f"{prefix}.{old}")
        return next((candidate for candidate in candidates if candidate in self._checkpoint.names), None)


def find_layers(model: Any, name: str) -> str:
    """The path of the list of layers in a Hugging Face model; ``name`` names the model in the error.

    Raises:
        UnsupportedModel: no list has as many modules, all of one class, as the configuration has hidden layers.
    """
    count = int(model.config.num_hidden_layers)
    found: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(item) for item in module}) == 1
    ]
    if not found:
        raise UnsupportedModel(name, f"{type(model).__name__} has no list of {count} equal layers")
    # A list inside a layer may have the same length; the outermost list is the layers.
    return min(found, key=lambda path: path.count("."))


# As it builds a model, transformers replaces the first with the second.
_DRAWING = ("torch.nn.init", "transformers.initialization")
_IN_TUPLE: dict[tuple[type, str], bool] = {}  # by class and configuration: does a layer return its output in a tuple


class _RealConstants(TorchFunctionMode):
    """Gives real values to the constants of a model that is built on the meta device: scales, and ranges that become sinusoids.

    Random initialisation is skipped: the weights have no values, and drawing them takes most of the time.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if getattr(function, "__module__", None) in _DRAWING and options["tensor"].is_meta:
            return options["tensor"]
        if function in (torch.tensor, torch.arange):
            options.setdefault("device", "cpu")
        return function(*args, **options)


class _LastLayerReached(Exception):
    """Stops the model's forward, because nothing after the layers is needed."""


class _Recorder(nn.Module):
    """Takes the place of a layer, and returns what ``record`` returns for the layer's call."""

    def __init__(self, layer: nn.Module, record: Callable[[Tensor, LayerCall], Any]) -> None:
        super().__init__()
        # Set without registering a submodule, because the layer's weights are not this module's.
        object.__setattr__(self, "_replaced", layer)
        self._record = record

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._record(hidden, LayerCall(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_replaced"), name)


def _returns_a_tuple(layer: nn.Module, hidden: Tensor, call: LayerCall) -> bool:
    """True if the layer returns a tuple: it is run on the meta device, which costs nothing."""
    args, kwargs = _to_meta(tuple(call))
    # Run a copy, because a layer may move its buffers to the device of its input.
    return isinstance(copy.deepcopy(layer)(hidden.to("meta"), *args, **kwargs), tuple)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    return {key: _to_meta(item) for key, item in value.items()} if isinstance(value, dict) else value
