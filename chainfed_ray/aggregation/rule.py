"""The type of an aggregation rule: a plain function of the updates of a round. Write one of your own: docs/python.md."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from chainfed_ray.model.adapters import Tensors

WeightedUpdate = tuple[Mapping[str, Tensor], int]
"""The tensors that a client sent, by name, and the number of examples on which they were trained."""

AggregationRule = Callable[[Sequence[WeightedUpdate]], Tensors]
"""A function that takes the updates of a round, at least one, in client order, and gives the new tensors by name, in float32.

A client with less memory trains a narrower window, so not every update has every tensor. A tensor that the rule does not give
stays as it was.
"""
