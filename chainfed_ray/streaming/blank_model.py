"""A base model without values, on the meta device: built once in a process, since that takes longer than a small step."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel

from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.streaming import experts
from chainfed_ray.streaming.checkpoint import Checkpoint
from chainfed_ray.streaming.unchanged import Answers

if TYPE_CHECKING:
    from chainfed_ray.streaming.stored_names import StoredNames

Kind = TypeVar("Kind", bound=nn.Module)

_blank_models = Answers(most=4)  # one of 30 layers takes 4 MiB
# As it builds a model, transformers replaces the first with the second.
_DRAWING = ("torch.nn.init", "transformers.initialization")
# What families call the number of layers. A layer may run several times, so a few layers need no tensors of their own.
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers", "depth")
_FEW_LAYERS = 200
_FILLING = (torch.tensor, torch.arange, torch.ones, torch.zeros, torch.full, torch.linspace)
# What constants may take: each, such as a mask of 16,384 positions; the numbers of a sequence; and all that is made of them.
_MOST_BYTES, _LONGEST, _MOST_IN_ALL = 256 * 2**20, 2**21, 2**31


@dataclass(frozen=True)
class BlankModel:
    """A base model and where its checkpoint has its parameters. All users of a process share both, so nobody changes them."""

    model: Any
    names: "StoredNames"
    settings: str  # its configuration as JSON


def blank_model(folder: Path, config: Any, dtype: torch.dtype, checkpoint: Checkpoint) -> BlankModel:
    """The model in ``folder``, whose files are those of ``config`` and ``checkpoint``.

    Raises:
        UnsupportedModel: its configuration has more layers than its checkpoint has tensors.
        Exception: whatever the model's own code raises.
    """

    def built() -> BlankModel:
        settings = config.to_dict()
        _check_depth(settings, len(checkpoint.names), folder)
        try:
            return _built(copy.deepcopy(config), dtype, checkpoint)  # transformers writes the dtype into it
        except KeyError as error:  # a table of functions by name, such as activations, has no such name
            if error.args and (key := _said_by(settings, error.args[0])):
                reason = f"its config.json has {error} for {key}, which transformers does not know"
                raise UnsupportedModel(str(folder), reason) from None
            raise

    return _blank_models.while_unchanged(folder, ("blank model", dtype), built)


def copy_of(module: Kind, shared: Iterable[nn.Module] = ()) -> Kind:
    """A module whose submodules, at any depth, are copies, apart from those in ``shared``.

    Parameters, buffers and settings stay those of ``module`` until the copy is given others: a whole copy takes ten times
    as long, and a turn makes one of each layer whenever it loads it. So weights come first, and ``to`` another dtype after.
    """
    made: Kind = _copied(module, {id(it): it for it in shared})
    return made


def _copied(module: Any, copies: dict[int, Any]) -> Any:
    """As ``copy_of``, with the ``copies`` that were made already, by the identity of what they are copies of."""
    # No function inside the other: one that calls itself would keep all copies, with their weights, until the next collection.
    if id(module) not in copies:
        made = copies[id(module)] = copy.copy(module)
        own = vars(made)
        own.update({key: value.copy() for key, value in own.items() if isinstance(value, dict | set | list)})
        inner = module._modules.items()
        own["_modules"] = {name: part if part is None else _copied(part, copies) for name, part in inner}
    return copies[id(module)]


def _built(config: Any, dtype: torch.dtype, checkpoint: Checkpoint) -> BlankModel:
    from chainfed_ray.streaming.stored_names import StoredNames  # here for lean_imports.py: it loads a model's code

    with torch.device("meta"), _RealConstants():
        whole = AutoModel.from_config(config, dtype=dtype, experts_implementation=experts.registered())
        whole.eval().requires_grad_(False)
    _empty_parameters(whole)
    _keep_frequencies(whole)
    return BlankModel(whole, StoredNames(whole, checkpoint.names), config.to_json_string())


def _check_depth(config: dict[str, Any], tensors: int, folder: Path) -> None:
    """Check the depth of the model and of its parts before it is built, which takes as long as it is deep.

    Raises:
        UnsupportedModel: the checkpoint has less than a tensor for each layer.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _check_depth(value, tensors, folder)
        elif key in _DEPTHS and isinstance(value, int) and value > max(tensors, _FEW_LAYERS):
            raise UnsupportedModel(
                str(folder), f"its configuration has {value} for {key}, and its checkpoint {tensors} tensors"
            )


def _said_by(settings: dict[str, Any], value: Any) -> str | None:
    """The key with this value in a configuration, at any depth, as a path."""
    for key, found in settings.items():
        if isinstance(found, dict):
            if inner := _said_by(found, value):
                return f"{key}.{inner}"
        elif found == value or (isinstance(found, list) and value in found):
            return str(key)
    return None


def _keep_frequencies(model: nn.Module) -> None:
    """Let dynamic rotary frequencies be those for texts within the model's positions. No text is longer here.

    To know that a text is longer, the model's code looks at values, which traces do not have.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            module.rope_type = {key: "default" if it == "dynamic" else it for key, it in kind.items()}  # type: ignore[assignment]
        elif kind == "dynamic":
            module.rope_type = "default"  # type: ignore[assignment]


def _empty_parameters(model: nn.Module) -> None:
    """Take the values of those parameters that were filled with a constant as the model was built."""
    for module in model.modules():
        for key, value in list(module.named_parameters(recurse=False)):
            if not value.is_meta:
                setattr(module, key, nn.Parameter(value.to("meta"), requires_grad=False))


class _RealConstants(TorchFunctionMode):
    """Gives real values to the constants of a model that is built on the meta device: scales, ranges and masks in buffers.

    Random initialisation is skipped: the weights have no values, and drawing them takes most of the time.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if getattr(function, "__module__", None) in _DRAWING and options["tensor"].is_meta:
            return options["tensor"]
        if function in _FILLING and options.get("device") is None:
            if function is not torch.tensor:
                blank = function(*args, **options | {"device": "meta"})
                _check_bytes(blank.nbytes, _LONGEST * blank.itemsize if blank.ndim == 1 else _MOST_BYTES)
            options["device"] = "cpu"
        made = function(*args, **options)
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self._bytes += made.nbytes
            _check_bytes(self._bytes, _MOST_IN_ALL)
        return made


def _check_bytes(size: int, most: int) -> None:
    """Check what a configuration asks for, such as tables of a billion positions, before it is made."""
    if size > most:
        raise ValueError(f"its configuration asks for {size} bytes of numbers; at most {most} are made")
