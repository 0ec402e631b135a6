"""An aggregation rule of your own: every client has the same weight, no matter how many rows it has.

Run it with ``python -m examples.equal_mean``, from a checkout.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from chainfed_ray.aggregation.rule import WeightedUpdate
from chainfed_ray.federation.run import run_job
from chainfed_ray.model.adapters import Tensors
from examples.own_job import a_job


def equal_mean(updates: Sequence[WeightedUpdate]) -> Tensors:
    """The plain mean of each tensor, over the clients that trained it; example counts are ignored."""
    sent = [tensors for tensors, _ in updates]
    names = sorted({name for tensors in sent for name in tensors})
    return {name: torch.stack([tensors[name] for tensors in sent if name in tensors]).mean(0) for name in names}


if __name__ == "__main__":
    for record in run_job(a_job("equal-mean"), Path("chainfed-python/equal-mean"), aggregation=equal_mean):
        print(record, flush=True)
