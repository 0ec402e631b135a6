"""What a model makes of examples, one by one: of it every score is made, whoever judged which of them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from chainfed_ray.data.tokens import Batch
from chainfed_ray.model.adapters import AdapterStack
from chainfed_ray.model.blocks import Blocks
from chainfed_ray.model.lm_head import next_token_scores
from chainfed_ray.model.pooling import LayerStates
from chainfed_ray.streaming.matrices import RowSlices


@dataclass(frozen=True)
class Predictions:
    """Of n examples, each tensor [n]. A classifier predicts one thing of an example, a language model each of its targets."""

    losses: Tensor  # float64, cross-entropy in nats, summed over what is predicted
    counts: Tensor  # int64, how much is predicted
    right: Tensor  # int64, how much of it rightly
    classes: Tensor  # int64, the class that is predicted; -1 for a language model

    @classmethod
    def blank(cls, count: int) -> "Predictions":
        """Of ``count`` examples that are still to be judged."""
        whole = torch.zeros(count, dtype=torch.int64)
        return cls(whole.double(), whole, whole.clone(), whole - 1)

    def put(self, indices: Tensor, other: "Predictions") -> None:
        """Take over the judgement of the examples at ``indices``."""
        for own, given in zip(self._tensors(), other._tensors(), strict=True):
            own[indices] = given

    def take(self, indices: Tensor) -> "Predictions":
        """That of some of the examples, in the order of ``indices``."""
        return Predictions(*(tensor[indices] for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.losses, self.counts, self.right, self.classes


@torch.no_grad()
def predict(
    blocks: Blocks, stack: AdapterStack, states: LayerStates, batch: Batch, matrices: RowSlices | None = None
) -> Predictions:
    """Judge a batch by the chain's output ``states``; ``matrices`` are for the head of a language model."""
    if stack.head is not None:
        logits = stack.head(states.hidden, batch.mask, states.pooled)
        classes = logits.argmax(-1)
        losses = cross_entropy(logits, batch.labels, reduction="none").double()
        return Predictions(losses, torch.ones_like(classes), (classes == batch.labels).long(), classes)
    assert matrices is not None, "a language model's head is streamed"
    assert batch.targets is not None, "and its examples say what it is to predict"
    ids, targets = batch.ids.numpy(), batch.targets.numpy()
    losses, right = next_token_scores(blocks, states.hidden, ids, batch.mask, targets, matrices)
    return Predictions(losses, batch.targets.sum(1), right, torch.full_like(right, -1))
