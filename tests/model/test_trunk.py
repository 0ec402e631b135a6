"""Promise: a family whose layers cannot be run one by one, or not streamed, is refused by what it does."""

from pathlib import Path

import pytest
import torch

from benchmarks.zoo_models import small_model
from chainfed_ray.errors import UnsupportedModel
from chainfed_ray.model.blocks import Blocks
from tests.models import tiny


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("xlm", "xlm changes the hidden states between its layers"),
        ("flaubert", "flaubert changes the hidden states between its layers"),
        ("jamba", "jamba has layers whose matrices cannot be streamed"),
        ("vit", "vit reads no texts, but pixel_values"),
        ("canine", "canine has no list of equal layers above a table of embeddings"),
    ],
)
def test_a_family_is_refused_by_what_it_does(family: str, words: str, tmp_path: Path) -> None:
    small_model(family).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=words):
        Blocks(tmp_path, torch.float32).check()


@pytest.mark.slow
def test_a_convolution_between_layers_is_noticed(tmp_path: Path) -> None:
    """Some checkpoints of DeBERTa have one after the first layer, others have none."""
    Blocks(tiny("deberta-v2", tmp_path / "without"), torch.float32).check()
    with pytest.raises(UnsupportedModel, match="changes the hidden states between its layers"):
        Blocks(tiny("deberta-v2", tmp_path / "with", conv_kernel_size=3), torch.float32).check()
