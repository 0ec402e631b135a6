"""Sends orders to clients through Ray's shared memory, without copying their tensors.

Ray would copy a torch tensor when it is sent and again when it is received. It does not copy a numpy array: a client maps its
bytes, and only the pages that it reads count as its memory. So tensors travel as numpy arrays.
"""

import warnings
from dataclasses import replace
from typing import Any

import ray
import torch

from chainfed_ray.client.messages import Calibrating, Evaluating, Fitting, Training, TurnOrder


class SentOrder:
    """An order in shared memory. Ray sends it once to each machine, not to each client.

    It is put there when the first client needs it, and again after it was lost: Ray cannot make it anew by itself.
    """

    def __init__(self, order: TurnOrder) -> None:
        self._order = order
        self._reference: Any = None

    def reference(self) -> Any:
        """Ray's reference to the order.

        Raises:
            RayError: there is no room for it, in memory or on disk.
        """
        if self._reference is None:
            self._reference = _put(self._order)
        return self._reference

    def lost(self) -> None:
        """Note that a client did not find the order: the next one gets it anew."""
        self._reference = None


def _put(order: TurnOrder) -> Any:
    if isinstance(order, Training | Fitting | Evaluating | Calibrating):
        arrays: Any = {name: tensor.numpy() for name, tensor in order.tensors.items()}
        order = replace(order, tensors=arrays)
    return ray.put(order)


def receive(reference: Any) -> TurnOrder:
    """The order behind a reference. Its tensors are read-only: writing to them would change other clients' order."""
    order: TurnOrder = ray.get(reference)
    if isinstance(order, Training | Fitting | Evaluating | Calibrating):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            order = replace(order, tensors={name: torch.from_numpy(array) for name, array in order.tensors.items()})
    return order
