"""Routes that generate text with served language models, in the format of OpenAI's API: whole, or as a stream of events."""

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from time import time
from typing import Annotated, Any, ClassVar, Protocol
from uuid import uuid4

from fastapi import APIRouter, Body, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.models import served
from chainfed_ray.api.rest.service import Jobs, Service, WithService, while_connected
from chainfed_ray.api.schemas.completions import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    GenerationOptions,
    Usage,
)
from chainfed_ray.api.schemas.logprobs import ChatLogprobs, CompletionLogprobs
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.errors import ChainFedError
from chainfed_ray.serving.messages import FinishReason, Piece, Prompt, Sampling, TokenChances

router = APIRouter(prefix="/v1", tags=["models"], route_class=StrictRoute)

_log = logging.getLogger(__name__)
_MISTAKE = {"type": "InternalError", "message": "a mistake of the service; its log says more"}
_MEDIA_TYPE = "text/event-stream"
_MODEL = "smollm2:stories"
_EXAMPLE_PROMPT = {"model": _MODEL, "prompt": "Once upon a time", "max_tokens": 12, "seed": 7}
_EXAMPLE_CHAT = {"model": _MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "max_tokens": 12}
_EXAMPLE_USAGE = {"prompt_tokens": 4, "completion_tokens": 12, "total_tokens": 16}
_EXAMPLE_COMPLETION = {
    "id": "cmpl-5f2c9a1e7b3d4c6f8a0b1c2d",
    "created": 1_772_366_400,
    "model": _MODEL,
    "usage": _EXAMPLE_USAGE,
    "object": "text_completion",
    "choices": [{"index": 0, "text": ", there was a small boat.", "finish_reason": "length"}],
}
_EXAMPLE_MESSAGE = {"role": "assistant", "content": "There was a small boat."}
_EXAMPLE_ANSWER = {
    "id": "chatcmpl-5f2c9a1e7b3d4c6f8a0b1c2d",
    "created": 1_772_366_400,
    "model": _MODEL,
    "usage": _EXAMPLE_USAGE,
    "object": "chat.completion",
    "choices": [{"index": 0, "message": _EXAMPLE_MESSAGE, "finish_reason": "length"}],
}
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def _responses(example: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    """What the OpenAPI document says of an answer: with an ``example`` of it as a whole, or as a stream."""
    forms = {"application/json": {"example": example}, _MEDIA_TYPE: {"schema": {"type": "string"}}}
    return {200: {"content": forms}}


@router.post("/completions", response_model=Completion, responses=_responses(_EXAMPLE_COMPLETION))
async def completions(
    body: Annotated[CompletionRequest, Body(examples=[_EXAMPLE_PROMPT])],
    request: Request,
    service: WithService,
    jobs: Jobs,
) -> Response:
    """Continue a prompt, or each of several."""
    return await _answer(body, body.prompt, _Completions, request, service, jobs)


@router.post("/chat/completions", response_model=ChatCompletion, responses=_responses(_EXAMPLE_ANSWER))
async def chat_completions(
    body: Annotated[ChatRequest, Body(examples=[_EXAMPLE_CHAT])],
    request: Request,
    service: WithService,
    jobs: Jobs,
) -> Response:
    """Answer a chat. The model's tokenizer must have a chat template."""
    return await _answer(body, [body.chat], _Chats, request, service, jobs)


TextStream = AsyncGenerator[tuple[int, Piece], None]
"""Yields a text's index, and a piece of that text."""


@dataclass
class _Text:
    """A text in full: what its pieces say together, and its last piece."""

    text: str = ""
    chances: list[TokenChances] = field(default_factory=list)
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Add the next piece."""
        self.text += piece.text
        self.chances += piece.chances
        self.last = piece


class _Format(Protocol):
    """The format of an answer: OpenAI has one for completions, and one for chats."""

    def whole(self, texts: Sequence[_Text]) -> BaseModel:
        """The whole answer."""

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """The chunk of a stream that carries one piece."""

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        """The last chunk of a stream, if the caller wants the token counts."""


class _Common:
    """What all parts of an answer share, and the options that were asked for."""

    prefix: ClassVar[str]  # of the answer's id

    def __init__(self, model: str, options: GenerationOptions) -> None:
        self._fields: dict[str, Any] = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time()), "model": model}
        self._options = options
        self._offsets = defaultdict[int, int](int)  # of each text, where its next token begins

    def _counted(self, last: Sequence[Piece]) -> Usage:
        """The counts of tokens. A prompt that has several texts is counted once."""
        prompts = last[:: self._options.texts]
        return Usage.of(sum(piece.prompt_tokens for piece in prompts), sum(piece.tokens for piece in last))


class _Completions(_Common):
    prefix = "cmpl"

    def whole(self, texts: Sequence[_Text]) -> BaseModel:
        choices = [
            self._choice(index, text.text, text.chances, _last(text).finish_reason) for index, text in enumerate(texts)
        ]
        return Completion(**self._fields, choices=choices, usage=self._counted([_last(text) for text in texts]))

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        return Completion(**self._fields, choices=[self._choice(index, piece.text, piece.chances, piece.finish_reason)])

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        return Completion(**self._fields, choices=[], usage=self._counted(last))

    def _choice(
        self, index: int, text: str, chances: Sequence[TokenChances], reason: FinishReason | None
    ) -> CompletionChoice:
        logprobs = None
        if self._options.chances is not None:
            logprobs = CompletionLogprobs.of(chances, self._offsets[index])
            self._offsets[index] += sum(len(chance.chosen.token) for chance in chances)
        return CompletionChoice(index=index, text=text, finish_reason=reason, logprobs=logprobs)


class _Chats(_Common):
    prefix = "chatcmpl"

    def whole(self, texts: Sequence[_Text]) -> BaseModel:
        choices = []
        for index, text in enumerate(texts):
            reason = _last(text).finish_reason
            assert reason is not None, "the last piece of a text has a finish reason"
            message, logprobs = AssistantMessage(content=text.text), self._logprobs(text.chances)
            choices.append(ChatChoice(index=index, message=message, finish_reason=reason, logprobs=logprobs))
        return ChatCompletion(**self._fields, choices=choices, usage=self._counted([_last(text) for text in texts]))

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        delta, logprobs = Delta(content=piece.text), self._logprobs(piece.chances)
        choice = ChatChunkChoice(index=index, delta=delta, finish_reason=piece.finish_reason, logprobs=logprobs)
        return ChatChunk(**self._fields, choices=[choice])

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        return ChatChunk(**self._fields, choices=[], usage=self._counted(last))

    def _logprobs(self, chances: Sequence[TokenChances]) -> ChatLogprobs | None:
        return None if self._options.chances is None else ChatLogprobs.of(chances)


async def _answer(
    options: GenerationOptions,
    prompts: Sequence[Prompt],
    kind: Callable[[str, GenerationOptions], _Format],
    request: Request,
    service: Service,
    jobs: JobStore,
) -> Response:
    found = await served(jobs, options.model, "causal-lm")
    form = kind(found.model.id, options)  # an alias is answered with the name of the model that it stands for
    asked = [(prompt, sampling) for prompt in prompts for sampling in _samplings(options)]
    in_pieces = bool(options.stream)
    stream = _together([service.write(found.key, prompt, sampling, in_pieces) for prompt, sampling in asked])
    if options.stream:
        # Wait for the first piece: an invalid prompt raises here, while the response can still have an error status.
        first = await while_connected(request, anext(stream))
        return StreamingResponse(
            _events(first, stream, form, options.wants_usage), media_type=_MEDIA_TYPE, headers=_HEADERS
        )
    texts = await while_connected(request, _whole(stream, len(asked)))
    return JSONResponse(form.whole(texts).model_dump())


def _samplings(options: GenerationOptions) -> list[Sampling]:
    """How each of the texts for one prompt is sampled. Each has its own seed, or they would be the same text."""
    sampling = options.sampling
    if sampling.seed is None:
        return [sampling] * options.texts
    return [replace(sampling, seed=(sampling.seed + place) % 2**63) for place in range(options.texts)]


async def _together(texts: Sequence[AsyncGenerator[Piece, None]]) -> TextStream:
    """The pieces of all texts as they come. The first error ends all of them; so does closing the stream."""
    told = asyncio.Queue[tuple[int, Piece] | Exception | None]()

    async def listen(index: int, text: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(text):
                async for piece in text:
                    told.put_nowait((index, piece))
            told.put_nowait(None)
        except Exception as error:
            told.put_nowait(error)

    listening = [asyncio.create_task(listen(index, text)) for index, text in enumerate(texts)]
    try:
        writing = len(listening)
        while writing:
            piece = await told.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                writing -= 1
            else:
                yield piece
    finally:
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)


async def _whole(stream: TextStream, count: int) -> list[_Text]:
    """Each of ``count`` texts in full."""
    texts = [_Text() for _ in range(count)]
    async with aclosing(stream):
        async for index, piece in stream:
            texts[index].add(piece)
    return texts


async def _events(
    first: tuple[int, Piece], stream: TextStream, form: _Format, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a stream whose ``first`` piece was taken already."""
    last = {first[0]: first[1]}
    async with aclosing(stream):
        yield _event(form.chunk(*first))
        try:
            async for index, piece in stream:
                yield _event(form.chunk(index, piece))
                last[index] = piece
        except ChainFedError as error:  # another prompt is invalid; the response has begun, so an event tells the error
            yield format_sse_event(data_str=json.dumps({"error": error.document()}))
            return
        except Exception:
            _log.exception("a stream that had begun failed")
            yield format_sse_event(data_str=json.dumps({"error": _MISTAKE}))
            return
    if wants_usage:
        yield _event(form.usage([last[index] for index in sorted(last)]))
    yield format_sse_event(data_str="[DONE]")


def _event(chunk: BaseModel) -> bytes:
    return format_sse_event(data_str=chunk.model_dump_json())


def _last(text: _Text) -> Piece:
    assert text.last is not None, "every text has a last piece"
    return text.last
