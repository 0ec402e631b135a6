"""A base model as embed → layers, for any Hugging Face encoder or decoder.

There is no file per family. The model is built without memory (on the meta device), and its *own* forward is run with its
layer list substituted: by recorders, which keep what the model hands to each layer besides the hidden states (masks,
rotary tables), and stop the forward after the last. A layer is then run by itself, with its own weights and that call.
"""

import copy
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.weights import Checkpoint


class LayerCall(NamedTuple):
    """What the model's forward hands to a layer besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Blocks:
    """The base model in ``folder``, its weights frozen and read when they are needed.

    Resident are only the small parts outside layers and embedding tables (norms, rotary frequencies).

    Raises:
        UnsupportedModel: the model has no list of equal layers, or its checkpoint lacks a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._name, self.dtype = str(folder), dtype
        self._checkpoint = Checkpoint(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self._model: Any = model
        self.layers_path = find_layers(model, self._name)
        self._meta_layers: nn.ModuleList = model.get_submodule(self.layers_path)  # type: ignore[assignment]
        self.num_layers = len(self._meta_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self._calls: list[LayerCall] = []
        self._embedded = torch.empty(0)
        model.set_submodule(self.layers_path, nn.ModuleList(self._recorder(index) for index in range(self.num_layers)))
        self._tables = [self._replace_table(name, module) for name, module in _embedding_tables(model)]
        self._materialise_trunk(config)

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Token ids and mask [B, T] → the hidden states [B, T, D] that enter layer 0, and the call of each layer."""
        self._calls = []
        with torch.no_grad(), suppress(_LastLayerReached):
            self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        embedded, calls = self._embedded, self._calls
        self._embedded, self._calls = torch.empty(0), []
        return embedded, calls

    def calls(self, mask: Tensor) -> list[LayerCall]:
        """The calls for right-padded examples of which only the mask [B, T] is known; no embedding row is read."""
        pad = getattr(self._model.config, "pad_token_id", None) or 0
        ids = torch.where(mask.bool(), pad + 1, pad)  # some families count positions by where the padding is
        for table in self._tables:
            table.reads = False
        try:
            return self.embed(ids, mask)[1]
        finally:
            for table in self._tables:
                table.reads = True

    def load_layer(self, index: int) -> nn.Module:
        """Layer ``index`` with its weights; drop it to free them."""
        layer = copy.deepcopy(self._meta_layers[index])
        prefix = f"{self.layers_path}.{index}."
        self._load(layer, prefix)
        return layer.eval().requires_grad_(False)

    def run(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer: [B, T, D] → [B, T, D]."""
        output = layer(hidden, *call.args, **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    @property
    def layer_bytes(self) -> int:
        """The bytes of the largest layer's weights."""
        return max(sum(p.numel() for p in layer.parameters()) for layer in self._meta_layers) * self.dtype.itemsize

    @property
    def widest(self) -> int:
        """The largest dimension of a layer's matrices: the width of its feed-forward part."""
        return max(max(parameter.shape) for parameter in self._meta_layers[0].parameters())

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _recorder(self, index: int) -> nn.Module:
        return _Recorder(self._meta_layers[index], lambda hidden, call: self._record(index, hidden, call))

    def _record(self, index: int, hidden: Tensor, call: LayerCall) -> None:
        if index == 0:
            self._embedded = hidden
        self._calls.append(call)
        if index == self.num_layers - 1:
            raise _LastLayerReached

    def _replace_table(self, name: str, table: nn.Embedding) -> "_RowTable":
        rows = _RowTable(self._checkpoint, self._source(f"{name}.weight"), table.embedding_dim, self.dtype)
        self._model.set_submodule(name, rows)
        return rows

    def _materialise_trunk(self, config: Any) -> None:
        """Give real values to what is neither a layer nor a table; what the checkpoint lacks stays without memory.

        Buffers that no checkpoint holds (rotary frequencies, position ids) are computed by their module's constructor:
        the modules that own some are made again, for real.
        """
        for name, module in list(self._model.named_modules()):
            if isinstance(module, _Recorder | _RowTable) or name.startswith(f"{self.layers_path}."):
                continue
            buffers = dict(module.named_buffers(recurse=False))
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
            raise UnsupportedModel(self._name, f"its checkpoint has no tensor {name}")
        return source

    def _find(self, name: str) -> str | None:
        """The checkpoint's name for a parameter: with or without the base model's prefix, LayerNorm in old or new words."""
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        prefix = self._model.base_model_prefix
        candidates = (name, f"{prefix}.{name}", old, f"{prefix}.{old}")
        return next((candidate for candidate in candidates if candidate in self._checkpoint.names), None)


def find_layers(model: Any, name: str) -> str:
    """The path of the list of layers in a Hugging Face model; ``name`` is for the error.

    Raises:
        UnsupportedModel: there is no list of as many equal modules as the configuration has hidden layers.
    """
    count = int(model.config.num_hidden_layers)
    found: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(item) for item in module}) == 1
    ]
    if not found:
        raise UnsupportedModel(name, f"{type(model).__name__} has no list of {count} equal layers")
    # An inner list of the same length belongs to a layer: the outermost one is the chain.
    return min(found, key=lambda path: path.count("."))


class _LastLayerReached(Exception):
    """Stops the model's forward: nothing after the layers is needed."""


class _Recorder(nn.Module):
    """Stands in for a layer: keeps its call, and hands the hidden states on as they are."""

    def __init__(self, layer: nn.Module, record: Callable[[Tensor, LayerCall], None]) -> None:
        super().__init__()
        # Not a submodule: the layer's weights are not this module's.
        object.__setattr__(self, "_stands_for", layer)
        self._record = record
        self._in_tuple: bool | None = None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._record(hidden, LayerCall(args, kwargs))
        if self._in_tuple is None:
            # A run of the layer itself, on the meta device, costs nothing and shows the form of its output.
            meta_args, meta_kwargs = _to_meta((args, kwargs))
            self._in_tuple = isinstance(self._stands_for(hidden.to("meta"), *meta_args, **meta_kwargs), tuple)
        return (hidden,) if self._in_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_stands_for"), name)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    return {key: _to_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


class _RowTable(nn.Module):
    """An embedding table [V, D] of which only the rows in use are read; zeros that take no memory while not ``reads``."""

    def __init__(self, checkpoint: Checkpoint, name: str, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self._checkpoint, self._name, self._width, self._dtype = checkpoint, name, width, dtype
        self.reads = True

    def forward(self, ids: Tensor) -> Tensor:
        """Ids of any shape → rows [..., D]."""
        if not self.reads:
            return torch.zeros((), dtype=self._dtype).expand(*ids.shape, self._width)
        unique, places = ids.unique(return_inverse=True)
        return self._checkpoint.rows(self._name, unique, self._dtype)[places]


def _embedding_tables(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
