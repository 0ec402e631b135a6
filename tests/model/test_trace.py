"""Promise: what a rehearsal with fake tensors tells for a shape is what real tensors of that shape hold, to the byte."""

import json
from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from chainfed_ray.budget.demand import BytePolynomial, PartMemory
from chainfed_ray.device.peak import PeakMemory
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.adapters import Adapter, Head
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.costs import Parts, memory_profile_of, new_adapter, padded, with_bottleneck
from chainfed_ray.model.trace import (
    SHAPES,
    AllocationTrace,
    DiscardedActivations,
    Prepare,
    RestOfStep,
    polynomial_of,
    trace_memory,
    with_blank_weights,
)
from chainfed_ray.streaming.activations import overwrite_activations
from tests.causal import causal_folder
from tests.models import FAMILIES, tiny, tiny_causal_model

ELSEWHERE = ((4, 20), (7, 9), (1, 40))  # shapes that no rehearsal is made with
WIDTH = 32


Real = Callable[[int, int], Callable[[Tensor], Tensor]]  # a part of real tensors, for a batch of so many tokens


def held(
    compute: Callable[[Tensor], Tensor], batch: int, tokens: int, dtype: torch.dtype, activations_offloaded: bool
) -> PartMemory:
    """What a part holds of real tensors: constants, for one shape."""
    with AllocationTrace() as ledger:
        # The rest of a step is the rehearsal's: whoever holds the part's input and output is not the part.
        hidden = torch.zeros((), dtype=dtype, requires_grad=True).expand(batch, tokens, WIDTH).clone()
        ledger.history()
        with DiscardedActivations() if activations_offloaded else nullcontext():
            output = compute(hidden)
        del hidden
        forward = max(ledger.history())
        rest = RestOfStep.apply(output)
        del output
        saved = ledger.alive
        ledger.history()
        rest.backward()
        backward = max(ledger.history())
    return PartMemory(constant(saved), (constant(forward),), (constant(backward),))


def constant(size: int) -> BytePolynomial:
    return BytePolynomial(((size,),))


def assert_told(prepare: Prepare, real: Real, dtype: torch.dtype, activations_offloaded: bool) -> None:
    """At shapes at which no rehearsal was held."""
    told = trace_memory(prepare, WIDTH, dtype, activations_offloaded=activations_offloaded)
    for batch, tokens in ELSEWHERE:
        assert (batch, tokens) not in SHAPES
        found = held(real(batch, tokens), batch, tokens, dtype, activations_offloaded)
        shape = batch, tokens
        assert told.forward_at(*shape) == found.forward_at(*shape), shape
        assert told.saved.at(*shape) == found.saved.at(*shape), shape
        assert told.backward_at(*shape) == found.backward_at(*shape), shape


# Families that have a path of their own, in every combination; the others in two that differ in both.
KEPT_32, SPILLED_16 = (torch.float32, False), (torch.bfloat16, True)
KEPT_16, SPILLED_32 = (torch.bfloat16, False), (torch.float32, True)
CASES = [(family, *way) for family in FAMILIES for way in (KEPT_32, SPILLED_16)]
CASES += [(family, *way) for family in ("bert", "llama", "mixtral") for way in (KEPT_16, SPILLED_32)]
CASES += [(family, *way) for family in ("gpt_oss", "xlnet", "t5", "deberta-v2") for way in (KEPT_32, SPILLED_32)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "activations_offloaded"), CASES, ids=str)
def test_a_layer_holds_what_was_told(
    family: str, dtype: torch.dtype, activations_offloaded: bool, tmp_path: Path
) -> None:
    blocks = Blocks(tiny(family, tmp_path), dtype)
    assert_told(
        Parts(blocks, 3, 1).layer(activations_offloaded),
        a_real_layer(blocks, activations_offloaded),
        dtype,
        activations_offloaded,
    )


def a_real_layer(blocks: Blocks, activations_offloaded: bool) -> Real:
    layer = blocks.load_layer(0)
    if activations_offloaded:
        overwrite_activations(layer)

    def real(batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        call = blocks.calls(padded(batch, tokens))[0]
        return lambda hidden: blocks.run(layer, hidden, call)

    return real


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_attention_that_makes_its_scores_has_a_square_term(family: str, tmp_path: Path) -> None:
    """Every pair of tokens for each of 4 heads, of which some are saved; the ordinary attention saves none."""
    folder = tiny(family, tmp_path)
    ordinary = trace_memory(Parts(Blocks(folder, torch.float32), 3, 1).layer(False), WIDTH, torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    blocks = Blocks(folder, torch.float32)
    eager = trace_memory(Parts(blocks, 3, 1).layer(False), WIDTH, torch.float32)
    assert ordinary.saved.terms[1][2] < 4 * 4 <= eager.saved.terms[1][2]
    assert max(moment.terms[1][2] for moment in eager.backward) > eager.saved.terms[1][2]
    assert_told(Parts(blocks, 3, 1).layer(False), a_real_layer(blocks, False), torch.float32, False)


@pytest.mark.slow
@pytest.mark.parametrize("activations_offloaded", [False, True], ids=["kept", "activations_offloaded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_layers", [1, 3])
def test_adapters_and_the_head_hold_what_was_told(
    head_layers: int, dtype: torch.dtype, activations_offloaded: bool, tmp_path: Path
) -> None:
    """With the gradients of those that are trained."""
    parts = Parts(Blocks(tiny("bert", tmp_path), dtype), 3, head_layers)

    def head(batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        labels, mask, it = torch.zeros(batch, dtype=torch.int64), padded(batch, tokens), Head(WIDTH, 3, head_layers)
        below = torch.randn(batch, head_layers - 1, WIDTH)
        return lambda hidden: nn.functional.cross_entropy(it(hidden, mask, below), labels, reduction="sum")

    assert_told(parts.head, head, dtype, activations_offloaded)
    for trained in (True, False):
        assert_told(
            new_adapter(WIDTH, 8, trained),
            lambda *_, on=trained: Adapter(WIDTH, 8, seed=0).requires_grad_(on),
            dtype,
            activations_offloaded,
        )


@pytest.mark.slow
def test_a_head_is_traced_without_reading_a_table_of_positions(tmp_path: Path) -> None:
    assert memory_profile_of(Blocks(causal_folder("gpt2", tmp_path), torch.float32), 8, None).streamed_head


@pytest.mark.slow
def test_a_language_model_of_one_layer_is_traced(tmp_path: Path) -> None:
    """What is traced first is what comes after its only layer."""
    tiny_causal_model("gpt2", tied=True, layers=1).save_pretrained(tmp_path)
    assert memory_profile_of(Blocks(tmp_path, torch.float32), 8, None).layers == 1


@pytest.mark.slow
def test_layers_of_several_kinds_are_planned_by_the_largest_of_each(tmp_path: Path) -> None:
    """The first layer has no experts; its feed-forward is wide, and it has fewer weights."""
    folder = tiny("qwen3_moe", tmp_path, mlp_only_layers=[0], intermediate_size=200, moe_intermediate_size=96)
    blocks = Blocks(folder, torch.float32)
    assert blocks.kinds == [0, 1]
    whole = memory_profile_of(blocks, 8, 3).kept.layer
    parts = [trace_memory(Parts(blocks, 3, 1).layer(False, index), WIDTH, torch.float32) for index in blocks.kinds]
    for shape in ELSEWHERE:
        assert whole.forward_at(*shape) == max(part.forward_at(*shape) for part in parts)
        assert whole.backward_at(*shape) == max(part.backward_at(*shape) for part in parts)
        assert whole.saved.at(*shape) >= max(part.saved.at(*shape) for part in parts)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "classes"), [(torch.float32, 3), (torch.bfloat16, None)], ids=str)
def test_adapters_of_another_width_change_nothing_else(dtype: torch.dtype, classes: int | None, tmp_path: Path) -> None:
    blocks = Blocks(causal_folder("llama", tmp_path), dtype)
    assert with_bottleneck(memory_profile_of(blocks, 8, classes), dtype, 4) == memory_profile_of(blocks, 4, classes)


@pytest.mark.slow
def test_what_runs_without_gradients_saves_nothing(tmp_path: Path) -> None:
    parts = Parts(Blocks(tiny("gpt2", tmp_path), torch.float32), 3, 1)
    training = trace_memory(parts.layer(False), WIDTH, torch.float32)
    advance = trace_memory(parts.layer(False), WIDTH, torch.float32, gradients=False)
    assert (advance.saved.at(2, 16), advance.backward_at(2, 16)) == (0, 0)
    assert 2 * 2 * 16 * WIDTH * 4 <= advance.forward_at(2, 16) < training.forward_at(2, 16)


def test_a_part_may_take_another_path_for_another_shape() -> None:
    """Two more operations, which allocate nothing: the peak is that of the input and the results of two, and one number."""

    def prepare(fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        def compute(hidden: Tensor) -> Tensor:
            result = hidden.exp().log().view(-1, WIDTH)
            return result if tokens > 16 else result.view(-1).view(batch, tokens, WIDTH)

        return compute

    told = trace_memory(prepare, WIDTH, torch.float32, gradients=False)
    assert told.forward_at(5, 7) == 3 * 5 * 7 * WIDTH * 4 + 4


@pytest.mark.slow
def test_nothing_is_allocated_for_real() -> None:
    """Weights of 2 GiB, and activations of as much."""
    with torch.device("meta"):
        wide = nn.Sequential(nn.Linear(WIDTH, 2**24, bias=False), nn.GELU(), nn.Linear(2**24, WIDTH, bias=False))

    def prepare(fake: FakeTensorMode, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        return with_blank_weights(wide.requires_grad_(False), fake)

    trace_memory(prepare, WIDTH, torch.float32)  # what libraries load the first time
    with PeakMemory() as peak:
        told = trace_memory(prepare, WIDTH, torch.float32)
    assert told.saved.at(1, 16) >= 2**30
    assert told.backward_at(2, 16) >= 2 * 2**30
    assert (peak.bytes or 0) < 4 * 2**20


def test_blank_weights_need_gradients_where_the_real_ones_do() -> None:
    fake, adapter = FakeTensorMode(allow_non_fake_inputs=True), Adapter(WIDTH, 8, seed=0)
    adapter.down.requires_grad_(False)
    blank = with_blank_weights(adapter, fake)
    assert all(isinstance(parameter, FakeTensor) for parameter in blank.parameters())
    assert [it.requires_grad for it in blank.parameters()] == [it.requires_grad for it in adapter.parameters()]
    assert adapter.up.weight.requires_grad


factors = st.lists(st.integers(0, 10**9), min_size=6, max_size=6)


@given(factors, st.integers(1, 512), st.integers(1, 8192))
def test_a_polynomial_is_found_exactly(found: list[int], batch: int, tokens: int) -> None:
    wanted = BytePolynomial((tuple(found[:3]), tuple(found[3:])))
    assert polynomial_of(wanted.at) == wanted


@given(st.integers(1, 512), st.integers(1, 8192))
def test_fractions_are_rounded_up(batch: int, tokens: int) -> None:
    pairs = tokens * (tokens + 1) // 2
    assert polynomial_of(lambda _, t: t * (t + 1) // 2).at(batch, tokens) >= pairs
    assert polynomial_of(lambda b, t: b * t * (t + 1) // 2).at(batch, tokens) >= batch * pairs


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "vocab_size": 128,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "refused"),
    [
        ("gpt_neo", {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4}, None),
        ("gpt_neo", {"attention_types": [[["global"], 3]], "num_layers": 3, "num_heads": 2}, None),
        ("lfm2", {"num_key_value_heads": 2}, "lfm2 has layers whose memory cannot be planned"),
    ],
)
def test_a_family_is_planned_or_refused_by_its_name(
    family: str, options: dict[str, Any], refused: str | None, tmp_path: Path
) -> None:
    """Their own code asks fake tensors for numbers, or makes tensors on a device of its own."""
    own = {"max_position_embeddings": 64, "vocab_size": 128, "hidden_size": 32, **options}
    config = AutoConfig.for_model(family, **(own if family == "gpt_neo" else _SIZES | options))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    expected = pytest.raises(UnsupportedModel, match=refused) if refused else nullcontext()
    with closing(Blocks(tmp_path, torch.float32)) as blocks:
        blocks.check()
        with expected, blocks.named_errors("has layers whose memory cannot be planned"):
            memory_profile_of(blocks, 4, None)
