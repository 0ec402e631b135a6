"""Orders on their way to clients: through Ray's shared memory, in which a client reads the tensors where they lie.

Ray copies a torch tensor when it is sent and when it is received, but neither a numpy array: its bytes are mapped, and only
the pages that a client reads count as its own.
"""

import warnings
from dataclasses import replace
from typing import Any

import ray
import torch

from chainfed_ray.client.messages import Fitting, Training, TurnOrder


def send(order: TurnOrder) -> Any:
    """A reference to an order. It is sent to each node once, not to each client."""
    if isinstance(order, Training | Fitting):
        arrays: Any = {name: tensor.numpy() for name, tensor in order.tensors.items()}
        order = replace(order, tensors=arrays)
    return ray.put(order)


def receive(reference: Any) -> TurnOrder:
    """The order; its tensors may be read, and not written to."""
    order: TurnOrder = ray.get(reference)
    if isinstance(order, Training | Fitting):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            order = replace(order, tensors={name: torch.from_numpy(array) for name, array in order.tensors.items()})
    return order
