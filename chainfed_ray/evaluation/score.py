"""Scores of predictions: mean loss, accuracy, perplexity and macro-F1."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from chainfed_ray.evaluation.predictions import Predictions
from chainfed_ray.units import perplexity


class Score(NamedTuple):
    """The mean loss and the accuracy of a set of predictions.

    ``loss`` is the mean cross-entropy in nats, ``accuracy`` the share of correct predictions. Both are taken over examples
    for a classifier, and over predicted tokens for a language model.
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        """The perplexity exp(loss) of a language model; see ``units.perplexity``."""
        return perplexity(self.loss)

    @classmethod
    def of(cls, predictions: Predictions) -> "Score":
        """The score over all ``predictions``."""
        count = int(predictions.counts.sum())
        return cls(float(predictions.losses.sum()) / count, int(predictions.correct.sum()) / count)


def macro_f1(predictions: Predictions, labels: np.ndarray) -> float:
    """The mean of the F1 scores of all classes that occur in ``labels`` [n] or among the predicted classes."""
    truth, found = torch.from_numpy(labels), predictions.classes
    classes = int(max(truth.max(), found.max())) + 1
    hits = _counts(truth[truth == found], classes)
    occurs = _counts(truth, classes) + _counts(found, classes)
    return float((2 * hits[occurs > 0] / occurs[occurs > 0]).mean())


def _counts(values: Tensor, classes: int) -> Tensor:
    return torch.bincount(values, minlength=classes).double()
