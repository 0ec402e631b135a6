"""What an aggregation rule is: a plain function of the updates of a round. Write one of your own: docs/python.md."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from chainfed_ray.model.adapters import Tensors

WeightedUpdate = tuple[Mapping[str, Tensor], int]
"""The tensors that a client sent, by name, and on how many examples they were trained."""

AggregationRule = Callable[[Sequence[WeightedUpdate]], Tensors]
"""The updates of a round in client order, with at least one, → the new tensors by name, in float32.

A client with less memory trains a narrower window, so not every update has every tensor. A tensor that the rule does not give
stays as it was.
"""
