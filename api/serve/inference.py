"""The Ray Serve deployment that answers with trained models."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from threading import Event
from typing import Any

import torch
from ray import serve

from chainfed_ray.api.rest.schemas import MOST_TEXTS
from chainfed_ray.cluster.resources import inference_options
from chainfed_ray.cluster.storage import Storage
from chainfed_ray.model.saved_stack import load_stack
from chainfed_ray.serving.classifier import Classifier
from chainfed_ray.serving.generator import Generator, Piece, Prompt, Sampling
from chainfed_ray.serving.questions import Answer, Question, answer_together

_MODELS_IN_MEMORY = 2
_STACKS_IN_MEMORY = 256
_WAIT_SECONDS = 0.004  # for other requests, to be answered in one batch with them


def _texts_of(questions: list[Question]) -> int:
    return sum(len(question.texts) for question in questions)


@serve.deployment(
    name="Inference",
    ray_actor_options=inference_options(),
    max_ongoing_requests=64,
    max_queued_requests=64,
    health_check_period_s=1,
)
class Inference:
    """Classifies and generates text. It loads base models and adapter stacks on demand, and keeps those used last."""

    def __init__(self, storage: Storage) -> None:
        torch.set_num_threads(1)
        # A base model's forward pass is not thread-safe, so each kind of work has one thread. A long text that is generated
        # does not hold up a classification.
        self._classifying, self._writing = ThreadPoolExecutor(max_workers=1), ThreadPoolExecutor(max_workers=1)
        self._loaded: Callable[..., Any] = lru_cache(_MODELS_IN_MEMORY)(
            lambda kind, base, dtype: kind(base, getattr(torch, dtype))  # the dtype's name as in a job file
        )
        self._storage = storage
        self._stack = lru_cache(_STACKS_IN_MEMORY)(lambda job: load_stack(storage.model(job)))

    async def classify(self, job: str, base: str, dtype: str, texts: list[str]) -> list[list[float]]:
        """The probability of each class for each text, by the model of ``job`` on the base model ``base``."""
        answer: Answer | Exception = await self._classify_together(Question(job, base, dtype, texts))
        if isinstance(answer, Exception):
            raise answer
        return answer

    @serve.batch(max_batch_size=MOST_TEXTS, batch_wait_timeout_s=_WAIT_SECONDS, batch_size_fn=_texts_of)
    async def _classify_together(self, questions: list[Question]) -> list[Answer | Exception]:
        """Answer requests that come at about the same time in one pass through the base model, whatever their stacks."""
        return await asyncio.get_running_loop().run_in_executor(self._classifying, self._classify, questions)

    async def write(
        self, job: str, base: str, dtype: str, prompt: Prompt, sampling: Sampling
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt, or answer a chat, with the model of ``job``. Yields the text piece by piece.

        If the caller disconnects, generation stops after the next token.
        """
        loop, pieces, cancelled = asyncio.get_running_loop(), asyncio.Queue[Piece | None](), Event()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        work = loop.run_in_executor(self._writing, self._write, job, base, dtype, prompt, sampling, emit, cancelled)
        work.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            await work  # raises the error of the generation, if it failed
        finally:
            cancelled.set()
            work.cancel()  # a request that still waits for the worker never starts

    async def alive(self) -> None:
        """Return, which shows that this process works."""

    def _classify(self, questions: Sequence[Question]) -> list[Answer | Exception]:
        return answer_together(questions, self._stack, partial(self._loaded, Classifier))

    def _write(
        self,
        job: str,
        base: str,
        dtype: str,
        prompt: Prompt,
        sampling: Sampling,
        emit: Callable[[Piece], None],
        cancelled: Event,
    ) -> None:
        self._loaded(Generator, base, dtype).write(self._stack(job), prompt, sampling, emit, cancelled.is_set)
