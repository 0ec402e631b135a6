"""Routes that generate text with served language models, in the format of OpenAI's API: whole, or as a stream of events."""

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from time import time
from typing import Any, Protocol
from uuid import uuid4

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import BaseModel

from chainfed_ray.api.rest.callers import while_connected
from chainfed_ray.api.rest.models import served
from chainfed_ray.api.rest.openai_schemas import (
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
from chainfed_ray.api.rest.service import Service, WithService
from chainfed_ray.cluster.jobs.store import JobRecord
from chainfed_ray.data.chats import Chat
from chainfed_ray.errors import ChainFedError
from chainfed_ray.serving.generator import Piece

router = APIRouter(prefix="/v1", tags=["models"])

_MEDIA_TYPE = "text/event-stream"
_STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {_MEDIA_TYPE: {"schema": {"type": "string"}}}}}
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

TokenStream = AsyncGenerator[tuple[int, Piece], None]
"""Yields a prompt's index, and a piece of the text that follows it."""


@router.post("/completions", response_model=Completion, responses=_STREAMED)
async def completions(body: CompletionRequest, request: Request, service: WithService) -> Response:
    """Continue a prompt, or each of several."""
    return await _answer(body, body.prompt, _Completions("cmpl", body.model), request, service)


@router.post("/chat/completions", response_model=ChatCompletion, responses=_STREAMED)
async def chat_completions(body: ChatRequest, request: Request, service: WithService) -> Response:
    """Answer a chat. The model's tokenizer must have a chat template."""
    return await _answer(body, [body.chat], _Chats("chatcmpl", body.model), request, service)


class _Format(Protocol):
    """The format of an answer: OpenAI has one for completions, and one for chats."""

    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> BaseModel:
        """The whole answer, from the text of each prompt and its last piece."""

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """The chunk of a stream that carries one piece."""

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        """The last chunk of a stream, if the caller wants the token counts."""


class _SharedFields:
    """Holds the fields that all parts of an answer share."""

    def __init__(self, prefix: str, model: str) -> None:
        self._common: dict[str, Any] = {"id": f"{prefix}-{uuid4().hex}", "created": int(time()), "model": model}


class _Completions(_SharedFields):
    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> BaseModel:
        choices = [
            CompletionChoice(index=index, text=text, finish_reason=last[index].finish_reason)
            for index, text in enumerate(texts)
        ]
        return Completion(**self._common, choices=choices, usage=_usage(last))

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        choice = CompletionChoice(index=index, text=piece.text, finish_reason=piece.finish_reason)
        return Completion(**self._common, choices=[choice])

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        return Completion(**self._common, choices=[], usage=_usage(last))


class _Chats(_SharedFields):
    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> BaseModel:
        reason = last[0].finish_reason
        assert reason is not None, "the last piece of a text has a finish reason"
        choice = ChatChoice(index=0, message=AssistantMessage(content=texts[0]), finish_reason=reason)
        return ChatCompletion(**self._common, choices=[choice], usage=_usage(last))

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        choice = ChatChunkChoice(index=index, delta=Delta(content=piece.text), finish_reason=piece.finish_reason)
        return ChatChunk(**self._common, choices=[choice])

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        return ChatChunk(**self._common, choices=[], usage=_usage(last))


async def _answer(
    options: GenerationOptions, prompts: Sequence[str | Chat], form: _Format, request: Request, service: Service
) -> Response:
    job = await served(service, options.model, "causal-lm")
    stream = _stream(service, job, prompts, options)
    if options.stream:
        # Wait for the first piece: an invalid prompt raises here, while the response can still have an error status.
        first = await while_connected(request, anext(stream))
        return StreamingResponse(
            _events(first, stream, form, options.wants_usage), media_type=_MEDIA_TYPE, headers=_HEADERS
        )
    texts, last = await while_connected(request, _collected(stream, len(prompts)))
    return JSONResponse(form.whole(texts, last).model_dump())


async def _collected(stream: TokenStream, prompts: int) -> tuple[list[str], list[Piece]]:
    """The text that follows each prompt, and its last piece."""
    texts, last = [""] * prompts, list[Piece]()
    async with aclosing(stream):
        async for index, piece in stream:
            texts[index] += piece.text
            if piece.finish_reason:
                last.append(piece)
    return texts, last


async def _stream(
    service: Service, job: JobRecord, prompts: Sequence[str | Chat], options: GenerationOptions
) -> TokenStream:
    """Generate for one prompt after the other. Closing the stream stops the generation."""
    for index, prompt in enumerate(prompts):
        async with aclosing(service.write(job, prompt, options.sampling)) as pieces:
            async for piece in pieces:
                yield index, piece


async def _events(
    first: tuple[int, Piece], stream: TokenStream, form: _Format, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a stream whose ``first`` piece was taken already."""
    last = [first[1]] if first[1].finish_reason else []
    async with aclosing(stream):
        yield _event(form.chunk(*first))
        try:
            async for index, piece in stream:
                yield _event(form.chunk(index, piece))
                if piece.finish_reason:
                    last.append(piece)
        except ChainFedError as error:  # a later prompt is invalid; the response has begun, so an event tells the error
            yield format_sse_event(data_str=json.dumps({"error": error.document()}))
            return
    if wants_usage:
        yield _event(form.usage(last))
    yield format_sse_event(data_str="[DONE]")


def _event(chunk: BaseModel) -> bytes:
    return format_sse_event(data_str=chunk.model_dump_json())


def _usage(last: Sequence[Piece]) -> Usage:
    return Usage.of(sum(piece.prompt_tokens for piece in last), sum(piece.tokens for piece in last))
