"""What a judgement comes to."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.units import perplexity


class Score(NamedTuple):
    """``loss`` is the mean cross-entropy in nats, ``accuracy`` the share that is right: of the examples for a classifier, of
    the tokens to be predicted for a language model. Its perplexity is exp(loss).
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """See ``units.perplexity``."""
        return perplexity(self.loss)

    @classmethod
    def of(cls, judgement: Predictions) -> "Score":
        """The score of everything that was predicted."""
        count = int(judgement.counts.sum())
        return cls(float(judgement.losses.sum()) / count, int(judgement.right.sum()) / count)


def macro_f1(judgement: Predictions, labels: np.ndarray) -> float:
    """The mean of the F1 of each class that occurs, among the ``labels`` [n] or in what was predicted."""
    truth, found = torch.from_numpy(labels), judgement.classes
    classes = int(max(truth.max(), found.max())) + 1
    hits = _counts(truth[truth == found], classes)
    occurs = _counts(truth, classes) + _counts(found, classes)
    return float((2 * hits[occurs > 0] / occurs[occurs > 0]).mean())


def _counts(values: Tensor, classes: int) -> Tensor:
    return torch.bincount(values, minlength=classes).double()
