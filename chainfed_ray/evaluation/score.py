"""Scores of predictions: mean loss, accuracy, perplexity and macro-F1."""

import math
from collections.abc import Iterable
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


class ScoreSums(NamedTuple):
    """What scores are made of, added up over examples; sums of several sets of examples add up to those of all.

    For each class ``hits`` [C] counts the examples that were rightly given it, and ``occurs`` [C] those that have it and those
    that were given it. Both are empty for a language model.
    """

    examples: int
    predictions: int
    loss: float
    correct: int
    hits: tuple[int, ...]
    occurs: tuple[int, ...]

    @classmethod
    def of(cls, predictions: Predictions, labels: np.ndarray, classes: int | None) -> "ScoreSums":
        """The sums over examples with ``labels`` [n], of a classifier for C = ``classes`` or a language model (None)."""
        hits, occurs = (), ()
        if classes is not None:
            truth, found = torch.from_numpy(labels), predictions.classes
            hits = tuple(_counts(truth[truth == found], classes).tolist())
            occurs = tuple((_counts(truth, classes) + _counts(found, classes)).tolist())
        counted = int(predictions.counts.sum()), float(predictions.losses.sum()), int(predictions.correct.sum())
        return cls(len(labels), *counted, hits, occurs)

    @classmethod
    def total(cls, parts: "Iterable[ScoreSums]", classes: int | None) -> "ScoreSums":
        """The sums over the examples of all ``parts``."""
        found, blank = [*parts], [0] * (classes or 0)
        examples, predictions = sum(part.examples for part in found), sum(part.predictions for part in found)
        loss, correct = math.fsum(part.loss for part in found), sum(part.correct for part in found)
        hits = tuple(map(sum, zip(blank, *(part.hits for part in found), strict=True)))
        occurs = tuple(map(sum, zip(blank, *(part.occurs for part in found), strict=True)))
        return cls(examples, predictions, loss, correct, hits, occurs)

    @property
    def score(self) -> Score:
        """The mean loss, and the accuracy; NaN over no predictions."""
        if not self.predictions:
            return Score(math.nan, math.nan)
        return Score(self.loss / self.predictions, self.correct / self.predictions)

    @property
    def macro_f1(self) -> float:
        """The mean of the F1 scores of all classes that occur. See ``macro_f1``."""
        hits, occurs = torch.tensor(self.hits).double(), torch.tensor(self.occurs).double()
        return float((2 * hits[occurs > 0] / occurs[occurs > 0]).mean())


def macro_f1(predictions: Predictions, labels: np.ndarray) -> float:
    """The mean of the F1 scores of all classes that occur in ``labels`` [n] or among the predicted classes."""
    classes = int(max(labels.max(), predictions.classes.max())) + 1
    return ScoreSums.of(predictions, labels, classes).macro_f1


def _counts(values: Tensor, classes: int) -> Tensor:
    return torch.bincount(values, minlength=classes)
