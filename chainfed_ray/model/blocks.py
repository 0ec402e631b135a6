"""Runs a base model as embed → layers, for any Hugging Face encoder or decoder.

``Trunk`` is what is around the layers. Here a layer gets its weights: all of them, or small ones alone, with its matrices read
when they are used. A layer is then run by itself, with the call that the model's own forward would make.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from chainfed_ray.budget.kept_profiles import pass_once
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.logit_form import LogitForm, form_of
from chainfed_ray.model.trunk import TOKENS_FIRST, LayerCall, Trunk, on_meta
from chainfed_ray.streaming.blank_model import copy_of
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.dequantize import dequantizing_bytes
from chainfed_ray.streaming.experts import expert_matrices, slice_experts, stream_experts
from chainfed_ray.streaming.matrices import (
    SLICE_BYTES,
    RowSlices,
    SliceReader,
    is_linear,
    rows_of_slice,
    slice_matrices,
    stream_matrices,
)
from chainfed_ray.streaming.numbers import check_numbers
from chainfed_ray.streaming.unchanged import while_unchanged


def linear_modules_of(layer: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """The linear modules of a layer, by their paths in it: those whose matrices can be streamed, and that a LoRA can be in."""
    return ((path, module) for path, module in layer.named_modules() if is_linear(module))


class Blocks:
    """The base model in ``folder``, frozen, with weights that are read when they are needed.

    Only the small parts outside layers and embedding tables stay resident (norms, rotary frequencies).

    Raises:
        UnsupportedModel: the model has no list of equal layers, or its checkpoint lacks a tensor.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.folder, self.dtype = folder, dtype
        self._checkpoint = Checkpoint(folder)
        try:
            self._trunk = Trunk(folder, dtype, self._checkpoint)
        except BaseException:
            self.close()
            raise
        self._config, self.family = self._trunk.config, self._trunk.family
        self.layers_path, self.num_layers = self._trunk.layers_path, self._trunk.num_layers
        self.hidden_size, self.vocabulary = self._trunk.hidden_size, self._trunk.vocabulary

    @property
    def causal_layers_path(self) -> str:
        """The path of the layers in this base model's causal language model, such as ``model.layers``."""
        return f"{self._trunk.prefix}.{self.layers_path}"

    @property
    def positions(self) -> int | None:
        """The model's maximum number of tokens, or None if its configuration does not say."""
        positions: int | None = getattr(self._config, "max_position_embeddings", None)
        return positions

    def check(self) -> None:
        """Check the checkpoint's tensors, and that the model can be run layer by layer. A job is planned after this.

        A process checks a model once, as long as its files stay as they are.

        Raises:
            UnsupportedModel: with what stands in the way.
        """
        while_unchanged(self.folder, ("check", self.dtype), self._check)

    def _check(self) -> None:
        # Here for lean_imports.py: it loads a model's code.
        from chainfed_ray.streaming.stored_names import check_left_out

        without_place = self._trunk.names.without_place
        check_left_out(self.folder, without_place, self.layers_path, self.num_layers, self._config)
        layers = [source for index in range(self.num_layers) for source in self._sources(index).values()]
        head = []
        with suppress(UnsupportedModel):  # a classifier needs none
            head = [self.language_head]
        check_numbers(self._checkpoint, dict.fromkeys([*self._trunk.parameters, *layers, *head]))
        hidden, calls = self._trunk.try_texts()
        pass_once(self.folder, f"layers in {self.dtype}", lambda: self._try_layers(hidden, calls))

    def _try_layers(self, hidden: Tensor, calls: list[LayerCall]) -> None:
        """Run each layer without values, on the meta device: as a whole, and with its matrices streamed."""
        for index, call in enumerate(calls):
            with self._trunk.named_errors("has layers that cannot be run one by one"):
                self._try_layer(copy_of(self._trunk.layers[index]), hidden, call)
            with self._trunk.named_errors("has layers whose matrices cannot be streamed"):
                self._try_layer(self._streamed(index, _BlankSlices(self._checkpoint, self.dtype)), hidden, call)

    def _try_layer(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> None:
        found = self._trunk.run(layer.to("meta"), hidden.to("meta"), on_meta(call))
        if found.shape != hidden.shape:
            raise ValueError(f"{list(hidden.shape)} became {list(found.shape)}")

    def named_errors(self, trouble: str) -> AbstractContextManager[None]:
        """Whatever the model's own code raises becomes an ``UnsupportedModel``, in which ``trouble`` says what does not go."""
        return self._trunk.named_errors(trouble)

    def embed(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Token ids and mask [B, T] → the hidden states [B, T, D] that enter layer 0, and the call of each layer."""
        return self._trunk.embed(ids, mask)

    def calls(self, mask: Tensor) -> list[LayerCall]:
        """The calls for right-padded examples with the mask [B, T]. The ids do not matter, and no embedding row is read."""
        return self._trunk.calls(mask)

    def load_layer(self, index: int, matrices: RowSlices | None = None) -> nn.Module:
        """Layer ``index`` with its weights; drop it to free them.

        If ``matrices`` are given, the layer's matrices are streamed from there whenever it runs; only norms and biases are
        resident. Without them, large matrices are used in the same slices, so that the layer gives the same bits.
        """
        layer = self._streamed(index, matrices) if matrices else copy_of(self._trunk.layers[index])
        prefix = f"{self._trunk.layer_name(index)}."
        self._load(layer, prefix)
        if matrices is None:
            slice_matrices(layer, lambda path: self._rows_of_slice(f"{prefix}{path}.weight"))
            slice_experts(layer, lambda path: self._rows_of_slice(f"{prefix}{path}"))
        return layer.eval().requires_grad_(False)

    def with_weights_of(self, index: int, other: nn.Module) -> nn.Module:
        """Layer ``index`` with the weights of ``other``, the same layer of the same model. They are shared, not copied."""
        layer = copy_of(self._trunk.layers[index])
        layer.load_state_dict(other.state_dict(), assign=True)
        return layer.eval().requires_grad_(False)

    def place_layer(self, index: int, place: Callable[[nn.Module], None]) -> nn.Module:
        """Layer ``index``, loaded one module at a time: ``place`` moves each module's weights away before the
        next is loaded.
        """
        layer = copy_of(self._trunk.layers[index])
        # Inner modules come first: when a module is placed, its submodules already have been.
        for path, module in reversed(list(layer.named_modules())):
            if own := [name for name in module.state_dict() if "." not in name]:
                prefix = f"{self._trunk.layer_name(index)}." + (f"{path}." if path else "")
                tensors = {name: self._checkpoint.read(self._trunk.source(prefix + name), self.dtype) for name in own}
                module.load_state_dict(tensors, strict=False, assign=True)
                del tensors
                place(module)
        return layer.eval().requires_grad_(False)

    def reader(self, slice_bytes: int = SLICE_BYTES) -> SliceReader:
        """A reader of this model's matrices. The caller closes it."""
        return SliceReader(self._checkpoint, self.dtype, slice_bytes)

    def finish(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """The model's operations after its last layer (for most, a norm): [B, T, D] → [B, T, D]."""
        return self._trunk.finish(hidden, mask)

    @property
    def language_head(self) -> str:
        """The checkpoint's name for the matrix [V, D] that gives logits. If the head is tied, it is the embedding table's name.

        Raises:
            UnsupportedModel: the model has no language model's head, or one of other tokens.
        """
        config = self._config
        # Masked language models tie their embeddings to another kind of head; encoders with a decoder have one above that.
        is_causal = config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or getattr(config, "is_decoder", False)
        is_causal &= not (getattr(config, "is_encoder_decoder", False) or config.model_type in TOKENS_FIRST)
        for name in ("lm_head.weight", "language_model.lm_head.weight", "embed_out.weight"):
            if is_causal and name in self._checkpoint.names:
                if (rows := self._checkpoint.shape(name)[0]) != self.vocabulary:
                    wanted = f"its checkpoint has {rows} rows of {name}, and its configuration {self.vocabulary}"
                    raise UnsupportedModel(str(self.folder), wanted)
                return str(name)
        tied = is_causal and getattr(config, "tie_word_embeddings", False)
        source = self._trunk.word_table if tied else None
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
            return form_of(self._config, self._checkpoint.names)
        except ValueError as error:
            raise UnsupportedModel(str(self.folder), f"its head has {error}, which is not supported") from None

    def run(self, layer: nn.Module, hidden: Tensor, call: LayerCall) -> Tensor:
        """One layer: [B, T, D] → [B, T, D]."""
        return self._trunk.run(layer, hidden, call)

    @property
    def blank_layers(self) -> tuple[nn.Module, ...]:
        """The layers on the meta device, without weights."""
        return tuple(self._trunk.layers)

    def linear_modules(self, index: int) -> dict[str, tuple[int, int]]:
        """The linear modules of layer ``index``: how many numbers each takes (K) and gives (N), by their paths in the layer."""
        found = {}
        for path, module in linear_modules_of(self._trunk.layers[index]):
            shape = tuple(module.weight.shape)
            found[path] = (shape[0], shape[1]) if isinstance(module, Conv1D) else (shape[1], shape[0])
        return found

    def text_modules(self, index: int) -> dict[str, tuple[int, int]]:
        """Of the ``linear_modules`` those that are given each text by itself, as [B, T, K] or [B · T, K], and nothing else.

        None if one module is several layers, as in ALBERT: it would have one LoRA for all of them.
        DeBERTa gives some of them the distances between tokens, which all texts share; XLNet has tokens before texts.
        """
        if len({self._trunk.layer_name(each) for each in range(self.num_layers)}) < self.num_layers:
            return {}
        mask = torch.ones(3, 7, dtype=torch.int64)
        hidden = torch.empty(*mask.shape, self.hidden_size, dtype=self.dtype, device="meta")
        layer, found = copy_of(self._trunk.layers[index]), self.linear_modules(index)
        rows = defaultdict[str, set[tuple[int, ...]]](set)

        def look(path: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[path].add(tuple(inputs[0].shape[:-1]))

        for path in found:
            layer.get_submodule(path).register_forward_pre_hook(partial(look, path))
        self._trunk.run(layer, hidden, on_meta(self.calls(mask)[index]))
        texts = ({tuple(mask.shape)}, {(mask.numel(),)})
        return {path: shape for path, shape in found.items() if rows[path] in texts}

    @property
    def kinds(self) -> list[int]:
        """A layer of each kind: layers of one kind have parameters of the same names and shapes."""
        forms = [
            tuple((name, it.shape) for name, it in layer.named_parameters()) for layer in reversed(self._trunk.layers)
        ]
        last = len(forms) - 1
        return sorted(last - place for place in {form: place for place, form in enumerate(forms)}.values())

    @property
    def modules(self) -> int:
        """The number of modules of which a turn makes copies: those around the layers, and those of its layers, one by one."""
        return self._trunk.modules + max(sum(1 for _ in layer.modules()) for layer in self._trunk.layers)

    @property
    def parts(self) -> int:
        """The number of tensors of the checkpoint that are parts of a parameter, such as the matrices of single experts."""
        return self._trunk.parts

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the layers' buffers that are real from the beginning (sinusoids, in a few families)."""
        buffers = (buffer for layer in self._trunk.layers for buffer in layer.buffers())
        return sum(buffer.nbytes for buffer in buffers if not buffer.is_meta)

    @property
    def layer_bytes(self) -> int:
        """The bytes of the largest layer's weights, once they are loaded."""
        return max(self._loaded_bytes(self._sources(index).values()) for index in range(self.num_layers))

    def bytes_above(self, layers: int) -> int:
        """The bytes of the weights of all layers but the lowest ``layers``, once they are loaded."""
        return sum(self._loaded_bytes(self._sources(index).values()) for index in range(layers, self.num_layers))

    @property
    def unstreamed_bytes(self) -> int:
        """The bytes of a layer that stay resident when its matrices are streamed; of the layer that has most of them."""
        return max(
            self._loaded_bytes(self._sources(index).values()) - self._loaded_bytes(self._matrices(index))
            for index in self.kinds
        )

    @property
    def longest_row_bytes(self) -> int:
        """The bytes of the longest row of a matrix, stored or loaded, whichever is more. A slice has at least one row."""
        names = [name for index in range(self.num_layers) for name in self._matrices(index)]
        rows = [(self._checkpoint.shape(name)[-1], self._checkpoint.dtype(name)) for name in names]
        rows.append((self.hidden_size, self._checkpoint.dtype(self._trunk.word_table)))  # of a language head
        return max(width * max(stored.itemsize, self.dtype.itemsize) for width, stored in rows)

    @property
    def conversion_bytes(self) -> int:
        """The most bytes that are held beside a parameter of a layer while it is read; 0 if none has to be converted."""
        names = [name for index in range(self.num_layers) for name in self._sources(index).values()]
        return max((self._checkpoint.conversion_bytes(name, self.dtype) for name in names), default=0)

    @property
    def dequantizing_bytes(self) -> int:
        """The bytes that are held beside the slices of streamed matrices; 0 if none is quantized."""
        forms = set(map(self._checkpoint.form, self._checkpoint.names))
        return max((dequantizing_bytes(form) for form in forms if form), default=0)

    @property
    def bytes_read(self) -> int:
        """The bytes of weights that were read from the checkpoint so far."""
        return self._checkpoint.bytes_read

    def close(self) -> None:
        """Close the checkpoint."""
        self._checkpoint.close()

    def _sources(self, index: int) -> dict[str, str]:
        """The checkpoint's name of each parameter of layer ``index``. One that is missing, or of another shape, is an error."""
        prefix = f"{self._trunk.layer_name(index)}."
        parameters = self._trunk.layers[index].named_parameters()
        return {name: self._trunk.fitting(prefix + name, parameter) for name, parameter in parameters}

    def _matrices(self, index: int) -> list[str]:
        """The checkpoint's names of the matrices of layer ``index`` that can be streamed."""
        sources = self._sources(index)
        layer = self._trunk.layers[index]
        streamed = [f"{path}.weight" for path, _ in linear_modules_of(layer)]
        streamed += [f"{path}.{name}" for path, module in layer.named_modules() for name in expert_matrices(module)]
        return [sources[name] for name in streamed]

    def _loaded_bytes(self, names: Iterable[str]) -> int:
        return sum(self._checkpoint.loaded_bytes(name, self.dtype) for name in names)

    def _streamed(self, index: int, matrices: RowSlices) -> nn.Module:
        """Layer ``index`` on the meta device, with its matrices read from ``matrices``."""
        layer, prefix = copy_of(self._trunk.layers[index]), f"{self._trunk.layer_name(index)}."
        stream_matrices(layer, prefix, matrices, self._trunk.source)
        stream_experts(layer, prefix, matrices, self._checkpoint, self._trunk.source)
        return layer

    def _rows_of_slice(self, parameter: str) -> int:
        """The rows that would be read at once of a matrix, or of the matrix of an expert."""
        name = self._trunk.source(parameter)
        matrix = self._checkpoint.matrix(name, 0) if len(self._checkpoint.shape(name)) == 3 else name
        return rows_of_slice(self._checkpoint, matrix, self.dtype)

    def _load(self, module: nn.Module, prefix: str) -> None:
        tensors = {
            name: self._checkpoint.read(self._trunk.source(prefix + name), self.dtype) for name in module.state_dict()
        }
        module.load_state_dict(tensors, assign=True)


def weight_bytes(folder: Path, dtype: torch.dtype, layers: int | None = None) -> int:
    """The bytes of all tensors of the checkpoint in ``folder``, once they are loaded as ``dtype``.

    With ``layers``, those above so many of the lowest layers do not count.

    Raises:
        UnsupportedModel: the folder has no checkpoint.
    """
    if layers is not None:
        blocks = Blocks(folder, dtype)
        blocks.close()
        return weight_bytes(folder, dtype) - blocks.bytes_above(layers)
    checkpoint = Checkpoint(folder)
    try:
        return sum(checkpoint.loaded_bytes(name, dtype) for name in checkpoint.names)
    finally:
        checkpoint.close()


class _BlankSlices:
    """Each matrix as one slice, without values."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint, self._dtype = checkpoint, dtype

    def slices(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """See ``RowSlices``."""
        yield 0, torch.empty(self._checkpoint.shape(name), dtype=self._dtype, device="meta")

    def numbers(self, name: str, first: int, count: int) -> Tensor:
        """See ``RowSlices``."""
        return torch.empty(count, dtype=self._dtype, device="meta")
