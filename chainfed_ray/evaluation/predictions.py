"""A model's predictions, example by example. Every score is computed from them (score.py)."""

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
    """The predictions for n examples. Every tensor is [n].

    A classifier makes one prediction for an example. A language model makes one for each token that it has to predict.
    """

    losses: Tensor  # float64: cross-entropy in nats, summed over the example's predictions
    counts: Tensor  # int64: the number of predictions
    correct: Tensor  # int64: the number of correct predictions
    classes: Tensor  # int64: the predicted class; -1 for a language model

    @classmethod
    def blank(cls, count: int) -> "Predictions":
        """Predictions for ``count`` examples, to be filled by ``put``."""
        zeros = torch.zeros(count, dtype=torch.int64)
        return cls(zeros.double(), zeros, zeros.clone(), zeros - 1)

    def put(self, indices: Tensor, other: "Predictions") -> None:
        """Store the predictions ``other`` as those of the examples at ``indices``."""
        for own, given in zip(self._tensors(), other._tensors(), strict=True):
            own[indices] = given

    def take(self, indices: Tensor) -> "Predictions":
        """The predictions for the examples at ``indices``, in that order."""
        return Predictions(*(tensor[indices] for tensor in self._tensors()))

    def _tensors(self) -> tuple[Tensor, ...]:
        return self.losses, self.counts, self.correct, self.classes


@torch.no_grad()
def predict(
    blocks: Blocks, stack: AdapterStack, states: LayerStates, batch: Batch, matrices: RowSlices | None = None
) -> Predictions:
    """The predictions for a batch of B examples, from the chain's output ``states``.

    ``matrices`` reads the head of a language model, which is never in memory as a whole. A classifier needs no reader.
    """
    if stack.head is not None:
        logits = stack.head(states.hidden, batch.mask, states.pooled)
        classes = logits.argmax(-1)
        losses = cross_entropy(logits, batch.labels, reduction="none").double()
        return Predictions(losses, torch.ones_like(classes), (classes == batch.labels).long(), classes)
    assert matrices is not None, "a language model's head is streamed, so a reader is needed"
    assert batch.targets is not None, "a language model's examples have targets"
    ids, targets = batch.ids.numpy(), batch.targets.numpy()
    losses, correct = next_token_scores(blocks, states.hidden, ids, batch.mask, targets, matrices)
    return Predictions(losses, batch.targets.sum(1), correct, torch.full_like(correct, -1))
