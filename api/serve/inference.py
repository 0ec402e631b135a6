"""The Ray Serve deployment that answers with trained models, in one pass for requests that come at about the same time."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from threading import Event
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from chainfed_ray.api.schemas.bodies import MOST_TEXTS
from chainfed_ray.cluster.local_ray import hear_at_own_address
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.cluster.structured_logs import log_as_asked
from chainfed_ray.cluster.tracing import begin_tracing, flush, open_span
from chainfed_ray.device.memory_limit import machine_bytes
from chainfed_ray.errors import ChainFedError, PartUnavailable
from chainfed_ray.reading import HubAway, trouble_behind, what_fails
from chainfed_ray.serving.messages import ModelKey, Piece, Prompt, Question, Sampling, Work, joined

_log = logging.getLogger(__name__)
_RETRY_SECONDS = 5  # until a storage is asked again that did not answer
_ROUTER: Any = {"request_router_class": "chainfed_ray.api.serve.stack_router:StackRouter"}


@serve.deployment(
    name="Inference",
    max_ongoing_requests=64,
    max_queued_requests=256,  # a request may ask for 128 texts
    health_check_period_s=1,
    health_check_timeout_s=10,  # as of the API: one that hangs is noticed after three of them
    request_router_config=RequestRouterConfig(**_ROUTER),
)
class Inference:
    """Classifies, embeds and generates text. See ``Engine``."""

    def __init__(self, settings: Settings) -> None:
        # They import torch, which the processes that only make this deployment do without.
        from chainfed_ray.device.lean_imports import load_models

        load_models()
        from chainfed_ray.serving.engine import Engine
        from chainfed_ray.serving.questions import Answering

        log_as_asked()
        begin_tracing()
        hear_at_own_address()
        most_bytes = settings.serving_bytes or machine_bytes() // 2 // settings.serving_replicas
        self._engine = Engine(partial(_folder_of, settings.storage), most_bytes)
        # A thread for each kind of work, so that neither a long text nor a model that is loaded holds up a classification.
        self._answering, self._beginning = Answering(MOST_TEXTS), ThreadPoolExecutor(max_workers=1)

    async def classify(self, questions: list[Question]) -> list[Any]:
        """For each question the probability of each class for each text, or the error because of which it has none."""
        return await self._answers(self._engine.classify, questions)

    async def embed(self, questions: list[Question]) -> list[Any]:
        """For each question the embedding of each text, or the error because of which it has none."""
        return await self._answers(self._engine.embed, questions)

    async def _answers(self, work: Work, questions: list[Question]) -> list[Any]:
        spans = [open_span("answer", question.asked, texts=len(question.texts)) for question in questions]
        asked = [asyncio.wrap_future(self._answering.ask(work, question)) for question in questions]
        answers: list[Any] = []
        try:
            answers = await asyncio.gather(*asked, return_exceptions=True)
        finally:  # also if nobody waits for the answers any more
            for span, found in zip_longest(spans, answers):
                span.end(failed=isinstance(found, BaseException))
        return [_picklable(found) for found in answers]

    async def write(
        self,
        model: ModelKey,
        prompt: Prompt,
        sampling: Sampling,
        in_pieces: bool,
        asked: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Continue a prompt, or answer a chat, with ``model``. Yields the text piece by piece, or as a single one.

        If the caller disconnects, generation stops after the next token. Its span is below what ``asked`` names.
        """
        span, failed = open_span("answer", asked), True
        loop, told, cancelled = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception](), Event()

        def emit(piece: Piece | Exception) -> None:
            with suppress(RuntimeError):  # this process ends, and its loop is closed
                loop.call_soon_threadsafe(told.put_nowait, piece)

        try:
            await loop.run_in_executor(
                self._beginning, self._engine.begin, model, prompt, sampling, emit, cancelled.is_set
            )
            pieces, ended = list[Piece](), False
            while not ended:
                piece = await told.get()
                if isinstance(piece, Exception):
                    raise piece
                pieces.append(piece)
                ended = piece.finish_reason is not None
                if ended or (in_pieces and told.empty()):  # what has come meanwhile is told in one message
                    yield joined(pieces)
                    pieces = []
            failed = False
        except (GeneratorExit, asyncio.CancelledError):  # nobody wants the rest
            failed = False
            raise
        except OSError as error:
            raise _picklable(error) from error
        finally:
            cancelled.set()
            span.end(failed=failed)

    def __del__(self) -> None:
        """Export the last spans. Serve calls this when everybody was answered."""
        flush()

    async def alive(self) -> None:
        """Return, which shows that this process works."""


def _picklable(found: Any) -> Any:
    """An answer, or an error as the other process can read it: one of ours as it is, of any other its words."""
    if not isinstance(found, BaseException) or isinstance(found, ChainFedError):
        return found
    _log.error("a question was not answered", exc_info=found)
    if trouble := trouble_behind(found):
        what = what_fails(trouble) if isinstance(trouble, HubAway) else "the disk of the model"
        return PartUnavailable(what, f"does not answer ({trouble.strerror})", _RETRY_SECONDS)
    return RuntimeError(f"{type(found).__name__}: {found}")


def _folder_of(storage: Storage, model: ModelKey) -> Path:
    """The folder of a model's stack."""
    try:
        return storage.stack(str(model.job), model.round, model.moving, model.layers)
    except OSError as error:
        raise PartUnavailable("the storage", f"does not answer ({error.strerror})", _RETRY_SECONDS) from error
