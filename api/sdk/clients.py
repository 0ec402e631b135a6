"""Sends the calls of ``calls``: ``Client`` waits for each answer, ``AsyncClient`` awaits it. ::

with Client("http://127.0.0.1:8000") as service:
    job = service.send(calls.submit_job(document))
    print(job.status)

async with AsyncClient("http://127.0.0.1:8000") as service:
    page = await service.send(calls.list_jobs(state=["running"]))
"""

from typing import Any, Self, cast

import httpx
from pydantic import ValidationError

from chainfed_ray.api.client.problems import error_of
from chainfed_ray.api.client.service_client import key_header
from chainfed_ray.api.sdk.calls import Answer, Call
from chainfed_ray.errors import ServiceUnavailable

_TIMEOUT = httpx.Timeout(330.0, connect=5.0)  # the longest call is a dry run, which times training steps


class Client:
    """The service at ``address``, with an API key, by default that in ``CHAINFED_API_KEY``. Close it, or use it by ``with``."""

    def __init__(self, address: str, key: str | None = None, timeout: httpx.Timeout = _TIMEOUT) -> None:
        self._address = address.rstrip("/")
        self._http = httpx.Client(base_url=self._address, headers=key_header(key), timeout=timeout, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[Answer]) -> Answer:
        """Send a call, and return its answer.

        Raises:
            ChainFedError: the service refuses it, or does not answer: see ``docs/errors.md``.
        """
        try:
            response = self._http.request(call.method, call.path, **_options(call))
        except httpx.TransportError as error:
            raise _unavailable(self._address, error) from None
        return _answer(self._address, call, response)


class AsyncClient:
    """As ``Client``, for programs with an event loop."""

    def __init__(self, address: str, key: str | None = None, timeout: httpx.Timeout = _TIMEOUT) -> None:
        self._address = address.rstrip("/")
        self._http = httpx.AsyncClient(
            base_url=self._address, headers=key_header(key), timeout=timeout, trust_env=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[Answer]) -> Answer:
        """See ``Client.send``."""
        try:
            response = await self._http.request(call.method, call.path, **_options(call))
        except httpx.TransportError as error:
            raise _unavailable(self._address, error) from None
        return _answer(self._address, call, response)


def _options(call: Call[Any]) -> dict[str, Any]:
    parameters = {name: value for name, value in call.parameters.items() if value is not None}
    return {"params": parameters, "json": call.body}


def _answer(address: str, call: Call[Answer], response: httpx.Response) -> Answer:
    if response.is_error:
        raise error_of(address, response, call.about)
    if call.answer is type(None):
        return cast("Answer", None)
    try:
        return cast("Answer", cast("Any", call.answer).model_validate_json(response.content))
    except ValidationError:
        answer = (
            f"its answer {response.status_code} to {call.method} {call.path} is not one of this version of chainfed"
        )
        raise ServiceUnavailable(address, answer) from None


def _unavailable(address: str, error: httpx.TransportError) -> ServiceUnavailable:
    return ServiceUnavailable(address, str(error) or type(error).__name__)
