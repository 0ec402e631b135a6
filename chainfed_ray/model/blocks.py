"""A base model as embed → layers, for any Hugging Face encoder or decoder.

There is no file per family. The model is built without memory (on the meta device), and its *own* forward is run with its
layer list substituted: by recorders, which keep what the model hands to each layer besides the hidden states (masks,
rotary tables), and stop the forward after the last. A layer is then run by itself, with its own weights and that call.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.logit_form import LogitForm, form_of
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.embeddings import RowTable, embedding_tables
from chainfed_ray.streaming.matrices import RowSlices, SliceReader, is_streamed, stream_matrices


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
        self.folder, self.dtype = folder, dtype
        self._checkpoint = Checkpoint(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"), _LiteralsAreReal():
            model = AutoModel.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self._model: Any = model
        self.layers_path = find_layers(model, str(self.folder))
        self._meta_layers: nn.ModuleList = model.get_submodule(self.layers_path)  # type: ignore[assignment]
        self.num_layers = len(self._meta_layers)
        self.hidden_size = int(config.hidden_size)
        self.vocabulary = int(config.vocab_size)
        self._calls: list[LayerCall] = []
        self._last_output: Tensor | None = None
        self._in_tuple: bool | None = None  # whether a layer gives its output in a tuple
        self._embedded = torch.empty(0)
        self._word_table = _name_of(model, model.get_input_embeddings()) + ".weight"
        model.set_submodule(self.layers_path, nn.ModuleList(self._recorder(index) for index in range(self.num_layers)))
        self._tables = [self._replace_table(name, module) for name, module in embedding_tables(model)]
        self._materialise_trunk(config)

    @property
    def causal_layers_path(self) -> str:
        """Where the causal language model of this base model has its layers, such as ``model.layers``."""
        return f"{self._model.base_model_prefix}.{self.layers_path}"

    @property
    def positions(self) -> int | None:
        """How many tokens of a text the model was made for; None where it does not say."""
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
        """The calls for right-padded examples of which only the mask [B, T] is known; no embedding row is read."""
        with self._without_tables():
            return self.embed(self._some_ids(mask), mask)[1]

    def load_layer(self, index: int, matrices: RowSlices | None = None) -> nn.Module:
        """Layer ``index`` with its weights; drop it to free them. With ``matrices``, those stay where they are kept, and
        are streamed whenever the layer runs: resident are its norms and biases.
        """
        layer = copy.deepcopy(self._meta_layers[index])
        prefix = f"{self.layers_path}.{index}."
        if matrices:
            stream_matrices(layer, prefix, matrices, self._source)
        self._load(layer, prefix)
        return layer.eval().requires_grad_(False)

    def place_layer(self, index: int, place: Callable[[nn.Module], None]) -> nn.Module:
        """Layer ``index``, of which one module is loaded at a time; ``place`` puts its weights elsewhere before the next is."""
        layer = copy.deepcopy(self._meta_layers[index])
        # The inner ones first: where a module is placed, what it contains has been already.
        for path, module in reversed(list(layer.named_modules())):
            if own := [name for name in module.state_dict() if "." not in name]:
                prefix = f"{self.layers_path}.{index}." + (f"{path}." if path else "")
                tensors = {name: self._checkpoint.read(self._source(prefix + name), self.dtype) for name in own}
                module.load_state_dict(tensors, strict=False, assign=True)
                del tensors
                place(module)
        return layer.eval().requires_grad_(False)

    def reader(self) -> SliceReader:
        """A reader of this model's matrices; close it."""
        return SliceReader(self._checkpoint, self.dtype)

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What the model does after its last layer (a norm, for most): [B, T, D] → [B, T, D]."""
        self._last_output = hidden
        try:
            with self._without_tables():
                finished: Tensor = self._model(
                    input_ids=self._some_ids(mask), attention_mask=mask, use_cache=False
                ).last_hidden_state
        finally:
            self._last_output, self._calls = None, []
        return finished

    @property
    def language_head(self) -> str:
        """The checkpoint's name for the matrix [V, D] that gives logits: the embeddings themselves, where they are tied.

        Raises:
            UnsupportedModel: the model has none.
        """
        config = self._model.config
        # Of those that fill in words, the embeddings are tied to a head that is not this one.
        goes_on = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
        for name in ("lm_head.weight", "embed_out.weight"):
            if goes_on and name in self._checkpoint.names:
                return str(name)
        tied = goes_on and getattr(config, "tie_word_embeddings", False)
        source = self._find(self._word_table) if tied else None
        if source is None:
            raise UnsupportedModel(str(self.folder), "it has no head of a language model")
        return source

    @property
    def logit_form(self) -> LogitForm:
        """What the model does with the products of its head's matrix to make them logits.

        Raises:
            UnsupportedModel: it does something that is not known here.
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
        """The layers, none of them loaded."""
        return tuple(self._meta_layers)

    @property
    def largest_layer(self) -> nn.Module:
        """The layer with the most weights, none of them loaded."""
        return max(self._meta_layers, key=_numbers)

    @property
    def modules(self) -> int:
        """How many modules there are, in the layers and around them."""
        return sum(1 for part in (self._model, *self._meta_layers) for _ in part.modules())

    @property
    def kept_bytes(self) -> int:
        """The bytes of what layers keep besides their weights (sinusoids, for a few families): there from the beginning."""
        buffers = (buffer for layer in self._meta_layers for buffer in layer.buffers())
        return sum(buffer.nbytes for buffer in buffers if not buffer.is_meta)

    @property
    def layer_bytes(self) -> int:
        """The bytes of the largest layer's weights."""
        return _numbers(self.largest_layer) * self.dtype.itemsize

    @property
    def unstreamed_bytes(self) -> int:
        """Of those, the bytes that stay resident when matrices are streamed."""
        return self.layer_bytes - sum(matrix.numel() for matrix in self._matrices()) * self.dtype.itemsize

    @property
    def longest_row_bytes(self) -> int:
        """The bytes of the longest row of a matrix, in the wider of its two dtypes: a slice has one row or more."""
        widest = max(matrix.shape[1] for matrix in self._matrices())
        return max(widest, self.hidden_size) * max(self.dtype.itemsize, self._kept_itemsize)

    @property
    def conversion_bytes(self) -> int:
        """The bytes of the largest parameter as it is kept, if it has to be converted to be used; otherwise none."""
        if self._kept_dtype == self.dtype:
            return 0
        return max(parameter.numel() for parameter in self.largest_layer.parameters()) * self._kept_itemsize

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _matrices(self) -> list[Tensor]:
        return [module.weight for module in self.largest_layer.modules() if is_streamed(module)]

    @property
    def _kept_dtype(self) -> torch.dtype:
        index = next(index for index, layer in enumerate(self._meta_layers) if layer is self.largest_layer)
        name = next(name for name, _ in self.largest_layer.named_parameters())
        return self._checkpoint.dtype(self._source(f"{self.layers_path}.{index}.{name}"))

    @property
    def _kept_itemsize(self) -> int:
        return self._kept_dtype.itemsize

    def _some_ids(self, mask: Tensor) -> Tensor:
        """Token ids that are padded where ``mask`` is 0: some families count positions by where the padding is."""
        pad = getattr(self._model.config, "pad_token_id", None) or 0
        return torch.where(mask.bool(), pad + 1, pad)

    @contextmanager
    def _without_tables(self) -> Iterator[None]:
        """No embedding row is read meanwhile."""
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
            if self._in_tuple is None:
                self._in_tuple = _gives_a_tuple(self._meta_layers[0], hidden, call)
        self._calls.append(call)
        output = hidden
        if index == self.num_layers - 1:
            if self._last_output is None:
                raise _LastLayerReached
            output = self._last_output
        return (output,) if self._in_tuple else output

    def _replace_table(self, name: str, table: nn.Embedding) -> "RowTable":
        RowTable.take_over(table, self._checkpoint, self._source(f"{name}.weight"))
        assert isinstance(table, RowTable)
        return table

    def _materialise_trunk(self, config: Any) -> None:
        """Give real values to what is neither a layer nor a table; what the checkpoint lacks stays without memory.

        Buffers that no checkpoint holds (rotary frequencies, position ids) are computed by their module's constructor:
        the modules that own some are made again, for real.
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


_DRAWING = ("torch.nn.init", "transformers.initialization")  # of which the second stands in for the first meanwhile


class _LiteralsAreReal(TorchFunctionMode):
    """While a model is built without memory: numbers that its code writes down, such as a scale, are kept all the same, and
    with them what it makes of a range of numbers, such as sinusoids. Random weights are not drawn: they have no values, and
    going through the motions takes longer than all the rest.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if getattr(function, "__module__", None) in _DRAWING and options["tensor"].is_meta:
            return options["tensor"]
        if function in (torch.tensor, torch.arange):
            options.setdefault("device", "cpu")
        return function(*args, **options)


class _LastLayerReached(Exception):
    """Stops the model's forward: nothing after the layers is needed."""


class _Recorder(nn.Module):
    """Stands in for a layer: gives what ``record`` gives for its call."""

    def __init__(self, layer: nn.Module, record: Callable[[Tensor, LayerCall], Any]) -> None:
        super().__init__()
        # Not a submodule: the layer's weights are not this module's.
        object.__setattr__(self, "_stands_for", layer)
        self._record = record

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._record(hidden, LayerCall(args, kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_stands_for"), name)


def _gives_a_tuple(layer: nn.Module, hidden: Tensor, call: LayerCall) -> bool:
    """A run of the layer itself, on the meta device, costs nothing and shows the form of its output."""
    args, kwargs = _to_meta(tuple(call))
    # A copy: a layer may move what it keeps to where its input is.
    return isinstance(copy.deepcopy(layer)(hidden.to("meta"), *args, **kwargs), tuple)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(item) for item in value)
    return {key: _to_meta(item) for key, item in value.items()} if isinstance(value, dict) else value


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    found: str = next(name for name, module in model.named_modules() if module is wanted)
    return found
