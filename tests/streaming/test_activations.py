"""Promise: activations that were kept in a file give the same gradients, and leave neither memory nor disk behind."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from chainfed_ray.model.adapters import Adapter
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.trace import AllocationTrace
from chainfed_ray.streaming.activations import (
    OffloadedActivations,
    OverwritingActivation,
    is_offloaded,
    overwrite_activations,
)
from tests.models import FAMILIES, tiny

DTYPES = (torch.float32, torch.bfloat16)
Compute = Callable[[Tensor], Tensor]


def some(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def an_adapter() -> Adapter:
    adapter = Adapter(32, 8, seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(some(*parameter.shape, seed=2))
    return adapter


def gradients(
    saving: AbstractContextManager[None], compute: Compute, wanted: list[Tensor], batch: int = 2
) -> list[Tensor]:
    """Of the input [B, 5, 32] and of ``wanted``."""
    hidden = some(batch, 5, 32, dtype=wanted[0].dtype if wanted else torch.float32).requires_grad_()
    with saving:
        output = compute(hidden)
        loss = (output * some(*output.shape, seed=1)).sum()
    return list(torch.autograd.grad(loss, [hidden, *wanted]))


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[OffloadedActivations]:
    made = OffloadedActivations(tmp_path / "spill")
    yield made
    made.close()


def files(folder: Path) -> list[Path]:
    """The files that this process has open in ``folder``, with or without a name; a link to each."""
    return [link for link in Path("/proc/self/fd").iterdir() if _target(link).startswith(str(folder))]


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # that of the listing itself
        return ""


def test_an_adapter_has_the_same_gradients(spill: OffloadedActivations) -> None:
    adapter = an_adapter()
    plain = gradients(nullcontext(), adapter, list(adapter.parameters()))
    activations_offloaded = gradients(spill, adapter, list(adapter.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(activations_offloaded, plain, strict=True))
    assert all(gradient.any() for gradient in plain)


def a_layer(family: str, dtype: torch.dtype, folder: Path, *, overwriting: bool = False) -> tuple[Adapter, Compute]:
    """A frozen layer on a trained adapter."""
    if not (folder / "config.json").exists():
        tiny(family, folder)
    blocks, adapter = Blocks(folder, dtype), an_adapter()
    layer = blocks.load_layer(1)
    call = blocks.calls(torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]))[1]
    if overwriting:
        overwrite_activations(layer)
        assert any(isinstance(module, OverwritingActivation) for module in layer.modules())
    return adapter, lambda hidden: blocks.run(layer, adapter(hidden.to(dtype)), call)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_the_same_gradients(
    family: str, dtype: torch.dtype, spill: OffloadedActivations, tmp_path: Path
) -> None:
    adapter, compute = a_layer(family, dtype, tmp_path)
    plain = gradients(nullcontext(), compute, list(adapter.parameters()))
    activations_offloaded = gradients(spill, compute, list(adapter.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(activations_offloaded, plain, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_that_are_overwritten_give_the_same_gradients(
    family: str, spill: OffloadedActivations, tmp_path: Path
) -> None:
    adapter, compute = a_layer(family, torch.float32, tmp_path)
    plain = gradients(nullcontext(), compute, list(adapter.parameters()))
    adapter, compute = a_layer(family, torch.float32, tmp_path, overwriting=True)
    torch.testing.assert_close(gradients(spill, compute, list(adapter.parameters())), plain)


WITHOUT_PARAMETERS = sorted(name for name in ACT2CLS if not list(ACT2FN[name].parameters()))


@pytest.mark.parametrize("name", WITHOUT_PARAMETERS)
def test_every_activation_function_may_overwrite_its_input(name: str, spill: OffloadedActivations) -> None:
    """The input itself is used by others as well, before and after; their gradients are those of the input."""
    stock = ACT2FN[name]
    layer = nn.Sequential(stock)
    overwrite_activations(layer)
    assert isinstance(layer[0], OverwritingActivation)
    widen = nn.Linear(32, 67)

    def around(function: nn.Module) -> Compute:
        def compute(hidden: Tensor) -> Tensor:
            inputs = widen(hidden)
            return inputs.square() * function(inputs) * inputs.exp()

        return compute

    plain = gradients(nullcontext(), around(stock), list(widen.parameters()))
    torch.testing.assert_close(gradients(spill, around(layer), list(widen.parameters())), plain)


def test_an_activation_function_with_parameters_stays() -> None:
    layer = nn.Sequential(nn.PReLU())
    overwrite_activations(layer)
    assert isinstance(layer[0], nn.PReLU)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_that_was_saved_stays_in_memory(family: str, spill: OffloadedActivations, tmp_path: Path) -> None:
    adapter, compute = a_layer(family, torch.float32, tmp_path)
    alive = {}
    for name, saving in (("plain", nullcontext()), ("activations_offloaded", spill)):
        hidden = some(2, 5, 32).requires_grad_()
        with AllocationTrace() as ledger:
            with saving:
                output = compute(hidden)
            alive[name] = ledger.alive - output.untyped_storage().nbytes()
        del output
    # What is left are masks, scales of rows and the like; the plain way keeps many tensors of the input's size.
    assert alive["plain"] > 8 * hidden.nbytes
    assert alive["activations_offloaded"] < hidden.nbytes
    assert adapter.down.weight.grad is None


def test_what_is_spilled() -> None:
    """Activations; not what is there anyway, or has few bytes of its own."""
    weight, activations = nn.Parameter(some(4, 4)), some(2, 3, 4)
    assert all(map(is_offloaded, (activations, activations.transpose(1, 2), activations.bfloat16(), activations[0])))
    stay = (weight, weight.T, weight.view(16, 1), activations > 0, activations[0, 0], some(2, 1, 4).expand(2, 3, 4))
    assert not any(map(is_offloaded, stay))


def test_micro_batches_write_over_each_other(spill: OffloadedActivations, tmp_path: Path) -> None:
    adapter = an_adapter()
    (link,) = files(tmp_path)
    sizes = []
    for batch in (3, 1, 2, 3):
        plain = gradients(nullcontext(), adapter, list(adapter.parameters()), batch)
        activations_offloaded = gradients(spill, adapter, list(adapter.parameters()), batch)
        assert all(torch.equal(one, other) for one, other in zip(activations_offloaded, plain, strict=True))
        sizes.append(link.stat().st_size)
    assert sizes[0] > 0
    assert len(set(sizes)) == 1


def test_the_file_has_no_name_and_is_gone_when_it_is_closed(tmp_path: Path) -> None:
    spill = OffloadedActivations(tmp_path / "made" / "here")
    with spill:
        output = an_adapter()(some(1, 5, 32).requires_grad_())
    assert len(files(tmp_path)) == 1
    assert not list((tmp_path / "made" / "here").iterdir())
    output.sum().backward()
    spill.close()
    assert files(tmp_path) == []


def test_a_full_disk_is_an_error_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    spill = OffloadedActivations(tmp_path)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left") as caught, spill:
        an_adapter()(some(1, 5, 32).requires_grad_())
    assert caught.value.errno == errno.ENOSPC
    spill.close()
    assert (files(tmp_path), list(tmp_path.iterdir())) == ([], [])


def test_the_disk_may_take_and_give_a_few_bytes_at_a_time(
    spill: OffloadedActivations, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    adapter = an_adapter()
    plain = gradients(nullcontext(), adapter, list(adapter.parameters()))
    monkeypatch.setattr(os, "pwrite", lambda file, view, start: pwrite(file, view[:7], start))
    monkeypatch.setattr(os, "preadv", lambda file, views, start: preadv(file, [views[0][:11]], start))
    activations_offloaded = gradients(spill, adapter, list(adapter.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(activations_offloaded, plain, strict=True))


def test_a_file_that_ends_early_is_an_error(spill: OffloadedActivations, tmp_path: Path) -> None:
    with spill:
        output = an_adapter()(some(1, 5, 32).requires_grad_())
    os.truncate(files(tmp_path)[0], 10)
    with pytest.raises(OSError, match="ended early"):
        output.sum().backward()
