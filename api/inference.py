"""The Serve deployment in which finished stacks answer."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from ray import serve

from chainfed_ray.classifier import Classifier
from chainfed_ray.saved_stack import SavedStack, load_stack
from cluster.storage import Storage

_MODELS_IN_MEMORY = 2
_STACKS_IN_MEMORY = 256


@serve.deployment(name="Inference", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=64)
class Inference:
    """Classifies texts: a base model is loaded when it is first asked for, a stack as well."""

    def __init__(self, storage: Storage) -> None:
        torch.set_num_threads(1)
        # One at a time: the base model's forward is not to be entered twice, and the cores are shared.
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._classifier = lru_cache(_MODELS_IN_MEMORY)(
            lambda base, dtype: Classifier(base, getattr(torch, dtype))  # the dtype's name as in a job file
        )
        self._storage = storage
        self._stack = lru_cache(_STACKS_IN_MEMORY)(lambda job: load_stack(storage.model(job)))

    async def classify(self, job: str, base: str, dtype: str, texts: list[str]) -> list[list[float]]:
        """The probability of each class for each text, by the model of ``job``."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._classify, job, base, dtype, texts)

    async def alive(self) -> None:
        """Answer."""

    def _classify(self, job: str, base: str, dtype: str, texts: list[str]) -> list[list[float]]:
        saved: SavedStack = self._stack(job)
        probabilities: list[list[float]] = self._classifier(base, dtype).probabilities(saved, texts).tolist()
        return probabilities
