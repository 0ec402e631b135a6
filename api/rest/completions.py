"""Routes of served language models, in OpenAI's form: whole, or as a stream of server-sent events."""

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

from chainfed_ray.api.rest.models import served
from chainfed_ray.api.rest.openai_schemas import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatMessage,
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
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
_NOBODY_LISTENS = 499  # as nginx has it: the caller is gone, and nobody sees this

TokenStream = AsyncGenerator[tuple[int, Piece], None]
"""The pieces of each prompt, by its index."""


@router.post("/completions", response_model=Completion, responses={200: {"content": {_MEDIA_TYPE: {}}}})
async def completions(body: CompletionRequest, request: Request, service: WithService) -> Response:
    """Go on with a prompt, or with each of several."""
    return await _answer(body, body.prompt, _Completions("cmpl", body.model), request, service)


@router.post("/chat/completions", response_model=ChatCompletion, responses={200: {"content": {_MEDIA_TYPE: {}}}})
async def chat_completions(body: ChatRequest, request: Request, service: WithService) -> Response:
    """Answer a chat, with a model whose tokenizer has a template for it."""
    return await _answer(body, [body.chat], _Chats("chatcmpl", body.model), request, service)


class _Form(Protocol):
    """One of OpenAI's two forms."""

    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> BaseModel:
        """The answer, of texts and the last piece of each."""

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        """What a stream says of a piece."""

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        """What a stream says at its end, if it is asked to."""


class _Begun:
    """What every part of an answer has in common."""

    def __init__(self, prefix: str, model: str) -> None:
        self._common: dict[str, Any] = {"id": f"{prefix}-{uuid4().hex}", "created": int(time()), "model": model}


class _Completions(_Begun):
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


class _Chats(_Begun):
    def whole(self, texts: Sequence[str], last: Sequence[Piece]) -> BaseModel:
        reason = last[0].finish_reason
        assert reason is not None, "a last piece says why it is the last"
        choice = ChatChoice(index=0, message=ChatMessage(role="assistant", content=texts[0]), finish_reason=reason)
        return ChatCompletion(**self._common, choices=[choice], usage=_usage(last))

    def chunk(self, index: int, piece: Piece) -> BaseModel:
        choice = ChatChunkChoice(index=index, delta=Delta(content=piece.text), finish_reason=piece.finish_reason)
        return ChatChunk(**self._common, choices=[choice])

    def usage(self, last: Sequence[Piece]) -> BaseModel:
        return ChatChunk(**self._common, choices=[], usage=_usage(last))


async def _answer(
    asked: GenerationOptions, prompts: Sequence[str | Chat], form: _Form, request: Request, service: Service
) -> Response:
    job = await served(service, asked.model, "causal-lm")
    written = _written(service, job, prompts, asked)
    if asked.stream:
        # What cannot be written is refused with a status of its own, which a stream that has begun could not have.
        first = await anext(written)
        return StreamingResponse(
            _events(first, written, form, asked.wants_usage), media_type=_MEDIA_TYPE, headers=_HEADERS
        )
    texts, last = [""] * len(prompts), list[Piece]()
    async with aclosing(written):
        async for index, piece in written:
            if await request.is_disconnected():
                return Response(status_code=_NOBODY_LISTENS)
            texts[index] += piece.text
            if piece.finish_reason:
                last.append(piece)
    return JSONResponse(form.whole(texts, last).model_dump())


async def _written(
    service: Service, job: JobRecord, prompts: Sequence[str | Chat], asked: GenerationOptions
) -> TokenStream:
    """One prompt after the other; closed, it ends the one that is being written."""
    for index, prompt in enumerate(prompts):
        async with aclosing(service.write(job, prompt, asked.sampling)) as pieces:
            async for piece in pieces:
                yield index, piece


async def _events(
    first: tuple[int, Piece], written: TokenStream, form: _Form, wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    last = [first[1]] if first[1].finish_reason else []
    async with aclosing(written):
        yield _wire(form.chunk(*first))
        try:
            async for index, piece in written:
                yield _wire(form.chunk(index, piece))
                if piece.finish_reason:
                    last.append(piece)
        except ChainFedError as error:  # of a later prompt
            yield format_sse_event(data_str=json.dumps({"error": error.document()}))
            return
    if wants_usage:
        yield _wire(form.usage(last))
    yield format_sse_event(data_str="[DONE]")


def _wire(chunk: BaseModel) -> bytes:
    return format_sse_event(data_str=chunk.model_dump_json())


def _usage(last: Sequence[Piece]) -> Usage:
    return Usage.of(sum(piece.prompt_tokens for piece in last), sum(piece.tokens for piece in last))
