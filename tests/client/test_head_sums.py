"""Promises of a client's sums for a head in closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm

from chainfed_ray.chain import Window
from chainfed_ray.client.head_sums import ClassSums
from chainfed_ray.client.messages import Fitting, HeadSums
from chainfed_ray.client.turn import take_turn
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.pooling import mean_over_tokens
from tests.builders import a_job


@pytest.mark.slow
@pytest.mark.parametrize("head_layers", [1, 2, 4])
def test_a_client_adds_up_what_comes_out_of_its_window(
    head_layers: int, document: dict[str, Any], tmp_path: Path
) -> None:
    document["chain"]["head"] = "fitted"
    job = a_job(document, tmp_path)
    client = job.clients[0]
    stack = AdapterStack.new(range(1, 4), job.hidden, bottleneck=8, classes=3, seed=0, head_layers=head_layers)
    for layer in stack.layers:
        torch.nn.init.normal_(stack.adapter(layer).up.weight, std=0.1, generator=torch.Generator().manual_seed(layer))
    sums = take_turn(client, job.base, lambda: Fitting(stack.tensors(), Window(1, 2), 2), capped=False)
    assert isinstance(sums, HeadSums)
    blocks = Blocks(job.base.folder, job.base.dtype)
    features = []  # of the lowest layer as of those of the window: the head reads all three
    with torch.no_grad():
        for index in range(len(client.examples)):
            batch = client.examples.batch(torch.tensor([index]).numpy())
            hidden, calls = blocks.embed(batch.ids, batch.mask)
            means = []
            for layer in range(3):
                hidden = blocks.run(blocks.load_layer(layer), hidden, calls[layer])
                hidden = stack.adapter(layer)(hidden) if layer else hidden
                means.append(layer_norm(mean_over_tokens(hidden, batch.mask), (job.hidden,)))
            features.append(torch.cat(means[-min(head_layers, 3) :], 1))
    blocks.close()
    expected = ClassSums.zeros(3, features[0].shape[1])
    expected.count(torch.cat(features), torch.from_numpy(client.examples.labels))
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(sums.tensors[name], tensor, rtol=1e-4, atol=1e-4)
