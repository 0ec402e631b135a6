"""Sends ``calls`` and carries out ``exchanges``: ``Client`` waits for answers, ``AsyncClient`` awaits them. ::

with Client("http://127.0.0.1:8000") as service:
    job = service.send(calls.submit_job(document))
    for event in service.stream(exchanges.events(job.id)):
        print(event.kind)

async with AsyncClient("http://127.0.0.1:8000") as service:
    page = await service.send(calls.list_jobs(state=["running"]))
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from typing import Any, Self, TypeVar, cast

import httpx
from pydantic import ValidationError

from chainfed_ray.api.sdk import exchanges
from chainfed_ray.api.sdk.calls import Answer, Call, Model
from chainfed_ray.api.sdk.exchanges import Exchange, Give, Next, Open, Opened, Pause, Read
from chainfed_ray.api.sdk.keys import key_header
from chainfed_ray.api.sdk.problems import error_of
from chainfed_ray.errors import ChainFedError, ServiceUnavailable

_CONNECT_SECONDS = 5.0
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)


class Client:
    """The service at ``address``, with an API key, by default that in ``CHAINFED_API_KEY``. Close it, or use it by ``with``.

    Every method raises a ``ChainFedError`` if the service refuses what is asked, or does not answer: see ``docs/errors.md``.
    Methods with ``json`` in their name give answers as they were sent, and load no model.
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._http = _opened(httpx.Client, self._address, key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[Answer]) -> Answer:
        """Send a call, and return its answer."""
        return _modelled(self._address, call.answer, self.json(call))

    def json(self, call: Call[Any]) -> Any:
        """Send a call, and return its answer as JSON; None if it has no body."""
        return self.finish_json(exchanges.answer(call))

    def finish(self, exchange: Exchange[Answer]) -> Answer:
        """Carry out an exchange, and return what it gives: the last, if that is several, and None, if that is nothing."""
        return _last(self._address, exchange.answer, self.finish_json(exchange))

    def finish_json(self, exchange: Exchange[Any]) -> Any:
        """As ``finish``, as JSON."""
        found = None
        for item in self.stream_json(exchange):
            found = item
        return found

    def stream(self, exchange: Exchange[Answer]) -> Iterator[Answer]:
        """Carry out an exchange, and yield what it gives as it comes."""
        with closing(self.stream_json(exchange)) as items:
            for item in items:
                yield _modelled(self._address, exchange.answer, item)

    def stream_json(self, exchange: Exchange[Any]) -> Generator[Any, None, None]:
        """As ``stream``, as JSON."""
        steps, came = exchange.steps, None
        failed: ChainFedError | None = None
        pieces: Iterator[Any] = iter(())
        with closing(steps), ExitStack() as receiving:
            while True:
                try:
                    step = steps.throw(failed) if failed else steps.send(came)
                except StopIteration:
                    return
                came, failed = None, None
                try:
                    match step:
                        case Give(item):
                            yield item
                        case Pause(seconds):
                            time.sleep(seconds)
                        case Read(file):
                            came = file()
                        case Call():
                            response = self._http.request(step.method, step.path, **_options(step, step.content))
                            came = _json(self._address, step, response)
                        case Open():
                            receiving.close()
                            response = receiving.enter_context(self._http.stream(**_request(step)))
                            if response.is_error:
                                response.read()
                            came = _status(self._address, step, response)
                            pieces = iter(response.iter_lines() if step.in_lines else response.iter_bytes())
                        case Next():
                            came = next(pieces, None)
                except httpx.TransportError as error:
                    failed = _unavailable(self._address, error)
                except ChainFedError as error:
                    failed = error


class AsyncClient:
    """As ``Client``, for programs with an event loop."""

    def __init__(self, address: str, key: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._http = _opened(httpx.AsyncClient, self._address, key)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[Answer]) -> Answer:
        """See ``Client.send``."""
        return _modelled(self._address, call.answer, await self.json(call))

    async def json(self, call: Call[Any]) -> Any:
        """See ``Client.json``."""
        return await self.finish_json(exchanges.answer(call))

    async def finish(self, exchange: Exchange[Answer]) -> Answer:
        """See ``Client.finish``."""
        return _last(self._address, exchange.answer, await self.finish_json(exchange))

    async def finish_json(self, exchange: Exchange[Any]) -> Any:
        """See ``Client.finish_json``."""
        found = None
        async for item in self.stream_json(exchange):
            found = item
        return found

    async def stream(self, exchange: Exchange[Answer]) -> AsyncIterator[Answer]:
        """See ``Client.stream``."""
        async with aclosing(self.stream_json(exchange)) as items:
            async for item in items:
                yield _modelled(self._address, exchange.answer, item)

    async def stream_json(self, exchange: Exchange[Any]) -> AsyncGenerator[Any, None]:
        """See ``Client.stream_json``."""
        steps, came = exchange.steps, None
        failed: ChainFedError | None = None
        pieces: AsyncIterator[Any] = _each(iter(()))
        with closing(steps):
            async with AsyncExitStack() as receiving:
                while True:
                    try:
                        step = steps.throw(failed) if failed else steps.send(came)
                    except StopIteration:
                        return
                    came, failed = None, None
                    try:
                        match step:
                            case Give(item):
                                yield item
                            case Pause(seconds):
                                await asyncio.sleep(seconds)
                            case Read(file):
                                came = await asyncio.to_thread(file)
                            case Call():
                                content = _each(step.content) if step.content else None
                                response = await self._http.request(step.method, step.path, **_options(step, content))
                                came = _json(self._address, step, response)
                            case Open():
                                await receiving.aclose()
                                response = await receiving.enter_async_context(self._http.stream(**_request(step)))
                                if response.is_error:
                                    await response.aread()
                                came = _status(self._address, step, response)
                                pieces = response.aiter_lines() if step.in_lines else response.aiter_bytes()
                            case Next():
                                came = await anext(pieces, None)
                    except httpx.TransportError as error:
                        failed = _unavailable(self._address, error)
                    except ChainFedError as error:
                        failed = error


async def _each(items: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (item := await asyncio.to_thread(next, items, None)) is not None:
        yield item


def _opened(make: Callable[..., Http], address: str, key: str | None) -> Http:
    headers = key_header(key)
    try:
        return make(base_url=address, headers=headers, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ServiceUnavailable(address, str(error)) from None


def _options(call: Call[Any], content: object) -> dict[str, Any]:
    parameters = {name: value for name, value in call.parameters.items() if value is not None}
    return {"params": parameters, "json": call.body, "content": content, "timeout": _timeout(call.seconds)}


def _request(step: Open) -> dict[str, Any]:
    asked = {"url": step.path, "headers": step.headers, "json": step.body, "timeout": _timeout(step.seconds)}
    return {"method": "GET" if step.body is None else "POST", **asked}


def _timeout(seconds: float | None) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=_CONNECT_SECONDS)


def _json(address: str, call: Call[Any], response: httpx.Response) -> Any:
    if response.is_error and response.status_code != call.also:
        raise error_of(address, response, call.about)
    if not response.content:
        return None
    try:
        answer = json.loads(response.content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise _of_others(address, f"its answer {response.status_code} to {call.method} {call.path}")
    return answer


def _status(address: str, step: Open, response: httpx.Response) -> Opened:
    error = error_of(address, response, step.about) if response.is_error else None
    return Opened(address, response.status_code, response.headers.get("x-request-id", ""), error)


def _modelled(address: str, model: Model[Answer], document: Any) -> Answer:
    try:
        return model.of(document)
    except ValidationError:
        raise _of_others(address, f"its answer, where a {model.name} is expected,") from None


def _last(address: str, model: Model[Answer], document: Any) -> Answer:
    # What callers see is the type of what an exchange gives: only those of any number of items may give none.
    return cast("Answer", None) if document is None else _modelled(address, model, document)


def _of_others(address: str, what: str) -> ServiceUnavailable:
    return ServiceUnavailable(address, f"{what} is not one of this version of chainfed")


def _unavailable(address: str, error: httpx.TransportError) -> ServiceUnavailable:
    return ServiceUnavailable(address, str(error) or type(error).__name__)
