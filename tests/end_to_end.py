"""End-to-end training by plain Hugging Face code, against which a chain of one window is tested."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModel

from chainfed_ray.budget.planner import PREFIX_BATCH
from chainfed_ray.data.tokens import Examples
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.pooling import mean_over_tokens


class EndToEnd:
    """The whole Hugging Face model, frozen, with an adapter after each layer. It uses hooks, and none of the chain's code."""

    def __init__(self, folder: Path, examples: Examples) -> None:
        self._model = AutoModel.from_pretrained(folder).eval().requires_grad_(False)
        self._layers = self._model.encoder.layer
        self._examples = examples
        # The layers below the lowest adapter run in the same micro-batches as in the prefix cache, so that the bits are equal.
        self._lowest: dict[int, Tensor] = {}
        for indices in examples.by_length(PREFIX_BATCH):
            outputs: list[Tensor] = []
            hook = self._layers[0].register_forward_hook(lambda _, __, output, to=outputs: to.append(output))
            self._run(indices)
            hook.remove()
            self._lowest |= {
                index: row[: examples.lengths[index]]
                for index, row in zip(indices.tolist(), outputs[0], strict=True)
            }  # fmt: skip

    def loss(self, stack: AdapterStack, indices: np.ndarray) -> Tensor:
        """The sum of the cross-entropies of the examples at ``indices``, in nats."""
        (indices,) = self._examples.by_length(
            len(indices), indices
        )  # as in the chain, so that the order of sums is the same
        lowest = torch.nn.utils.rnn.pad_sequence([self._lowest[index] for index in indices.tolist()], batch_first=True)
        batch = self._examples.batch(indices)
        means: list[Tensor] = []
        last = lowest

        def follow(place: int, output: Tensor) -> Tensor:
            nonlocal last
            last = stack.adapter(place)(lowest if place == 0 else output)
            if place + 1 < len(
                self._layers
            ):  # pooled here, so that gradients are added up in the same order as in the chain
                means.append(mean_over_tokens(last, batch.mask))
            return last

        hooks = [
            layer.register_forward_hook(lambda _, __, output, at=place: follow(at, output))
            for place, layer in enumerate(self._layers)
        ]
        self._run(indices)
        for hook in hooks:
            hook.remove()
        return cross_entropy(stack.head(last, batch.mask, torch.stack(means, 1)), batch.labels, reduction="sum")

    def _run(self, indices: np.ndarray) -> None:
        batch = self._examples.batch(indices)
        self._model(input_ids=batch.ids, attention_mask=batch.mask)
