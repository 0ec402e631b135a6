"""A Python client of the REST API, for the command line and for users' own programs."""

import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NoReturn

import httpx

from chainfed_ray.activity import Activity, Listener, Reporter, no_listener
from chainfed_ray.api.client.problems import error_of
from chainfed_ray.errors import InvalidSetting, ModelNotFound, ServiceFailed, ServiceUnavailable
from chainfed_ray.units import format_seconds

_CHECK_SECONDS = 150.0  # before it accepts a job, the service loads the job's data
_TIMEOUT = httpx.Timeout(_CHECK_SECONDS, connect=5.0)
_PLAN_TIMEOUT = httpx.Timeout(330.0, connect=5.0)  # a dry run also times training steps
_TEXTS_PER_REQUEST = 128  # the service accepts up to 256 …
_CHARACTERS_PER_REQUEST = 400_000  # … of up to 500,000 characters in all
_GENERATION_TIMEOUT = httpx.Timeout(None, connect=5.0)  # a long text may take any time to generate
_RECONNECT_SECONDS = 120.0  # a service that fails starts again within a minute, on an idle machine
_COMES_BACK = (
    httpx.codes.TOO_MANY_REQUESTS,
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
)
_PAUSE_SECONDS = 0.5
KEY_VARIABLE = "CHAINFED_API_KEY"
_KEY = re.compile(r"[!-~]+")


JsonObject = dict[str, Any]


class ServiceClient:
    """A client of the service at ``address``, such as ``http://127.0.0.1:8000``, with an API key.

    Without ``key``, the key is the one in ``CHAINFED_API_KEY``, if there is one.

    Every method raises ``AccessDenied`` if the service refuses the key, ``ServiceUnavailable`` if no service answers, and
    ``ServiceFailed`` if the service answers with an error of its own. Documents are the JSON objects of the REST API
    (``docs/api.md``).
    """

    def __init__(self, address: str, key: str | None = None) -> None:
        self._address = address.rstrip("/")
        headers = key_header(key)
        try:
            self._http = httpx.Client(base_url=self._address, headers=headers, timeout=_TIMEOUT, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise ServiceUnavailable(address, str(error)) from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self, but: Collection[str] = ()) -> JsonObject:
        """The health of each part of the service. Raises ``ServiceUnavailable`` unless every part ``but`` these works."""
        try:
            health: JsonObject = self._http.get("/readyz").json()
            wrong = [
                f"{part}: {state}" for part, state in health["checks"].items() if state != "ok" and part not in but
            ]
        except httpx.TransportError as error:
            raise ServiceUnavailable(self._address, _words(error)) from None
        except (ValueError, KeyError, TypeError):
            raise ServiceUnavailable(self._address, "no part of it answers") from None
        if wrong:
            raise ServiceUnavailable(self._address, "; ".join(wrong))
        return health

    def submit(self, document: JsonObject, listen: Listener = no_listener) -> JsonObject:
        """Let the service check the job ``document``, and queue it. Returns the queued job.

        Raises:
            InvalidJob: the job cannot run.
        """
        Reporter(f"waiting for the service to check the job (at most {format_seconds(_CHECK_SECONDS)})", listen).begin()
        return self._ask("POST", "/v1/jobs", json=document)

    def plan(self, document: JsonObject) -> JsonObject:
        """The forecast of the job ``document``, from a dry run.

        Raises:
            InvalidJob: the job cannot run, whichever clients join.
        """
        return self._ask("POST", "/v1/plan", json=document, timeout=_PLAN_TIMEOUT)

    def jobs(self, limit: int = 50, states: Sequence[str] = (), labels: Sequence[str] = ()) -> list[JsonObject]:
        """At most ``limit`` jobs, the newest first: those in one of the ``states``, and with every label ``name=value``.

        Raises:
            InvalidJob: there is no such state, or a label has no value.
        """
        asked = {"limit": limit, "state": list(states), "label": list(labels)}
        jobs: list[JsonObject] = self._ask("GET", "/v1/jobs", params=asked)["jobs"]
        return jobs

    def job(self, job: str) -> JsonObject:
        """The job with the id ``job``.

        Raises:
            JobNotFound: there is no such job.
        """
        return self._ask("GET", f"/v1/jobs/{job}", about=job)

    def pause(self, job: str) -> JsonObject:
        """Pause a job. One that runs is ``pausing`` until its present round is committed.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: the job is over.
        """
        return self._ask("POST", f"/v1/jobs/{job}/pause", about=job)

    def resume(self, job: str) -> JsonObject:
        """Let a paused job go on.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: the job is over.
        """
        return self._ask("POST", f"/v1/jobs/{job}/resume", about=job)

    def cancel(self, job: str) -> JsonObject:
        """Cancel a job.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: the job is over.
        """
        return self._ask("POST", f"/v1/jobs/{job}/cancel", about=job)

    def retry(self, job: str) -> JsonObject:
        """Try a job again that failed or was cancelled.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: the job has not failed and was not cancelled, or its noise cannot go on.
        """
        return self._ask("POST", f"/v1/jobs/{job}/retry", about=job)

    def clone(self, job: str, changes: JsonObject) -> JsonObject:
        """Queue a new job with the document of another one and ``changes``, a JSON merge patch. Returns the new job.

        Raises:
            JobNotFound: there is no such job.
            InvalidJob: the new job cannot run.
        """
        return self._ask("POST", f"/v1/jobs/{job}/clone", about=job, json=changes)

    def delete(self, job: str) -> None:
        """Delete a job that is over, with its files and its model.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: the job is not over, or an alias stands for its model.
        """
        self._answer("DELETE", f"/v1/jobs/{job}", about=job)

    def models(self) -> list[JsonObject]:
        """Every served model."""
        models: list[JsonObject] = self._ask("GET", "/v1/models")["models"]
        return models

    def classify(self, model: str, texts: list[str]) -> JsonObject:
        """Classify any number of texts. Many texts are split over several requests.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: there are no texts, or one is too long.
        """
        bodies = ({"model": model, "texts": part} for part in _parts(texts))
        answers = [self._ask("POST", "/v1/classify", json=body, about=model) for body in bodies]
        return {**answers[0], "results": [found for answer in answers for found in answer["results"]]}

    def complete(self, model: str, prompts: list[str], **options: Any) -> JsonObject:
        """Continue prompts with a language model. ``options`` are those of ``POST /v1/completions``, such as ``max_tokens``.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: the model is not a language model, or an option or a prompt is invalid.
        """
        body = {"model": model, "prompt": prompts, **options}
        return self._ask("POST", "/v1/completions", about=model, json=body, timeout=_GENERATION_TIMEOUT)

    def chat(self, model: str, messages: list[JsonObject], **options: Any) -> str:
        """What a language model answers to a chat. ``options`` are those of ``POST /v1/chat/completions``.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: the model is not a language model, or an option or a message is invalid.
        """
        body = {"model": model, "messages": messages, **options}
        answer = self._ask("POST", "/v1/chat/completions", about=model, json=body, timeout=_GENERATION_TIMEOUT)
        text: str = answer["choices"][0]["message"]["content"]
        return text

    def stream(self, model: str, prompts: list[str], **options: Any) -> Iterator[JsonObject]:
        """Like ``complete``, but yields each piece of text as it is generated, in the form of one of its ``choices``.

        Closing the iterator stops the generation.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: the model is not a language model, or an option or a prompt is invalid.
        """
        body = {"model": model, "prompt": prompts, "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/completions", json=body, timeout=_GENERATION_TIMEOUT) as response:
                if response.is_error:
                    response.read()
                    self._fail(response, model)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        request = response.headers.get("x-request-id", "")
                        raise ServiceFailed(self._address, chunk["error"]["message"], request)
                    yield from chunk["choices"]
        except httpx.TransportError as error:
            raise ServiceUnavailable(self._address, _words(error)) from None

    def follow(self, job: str, listen: Listener = no_listener) -> Iterator[JsonObject]:
        """Yield every event of a job, from its first to its last, as they happen.

        Reconnects when the connection breaks, or the service is busy or starts again. Between events, ``listen`` is told what
        the job is doing.

        Raises:
            JobNotFound: there is no such job.
        """
        last, heard = 0, monotonic()
        while True:
            headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
            try:
                with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
                    if response.status_code == httpx.codes.NO_CONTENT:
                        return
                    if response.is_error:
                        response.read()
                        if response.status_code not in _COMES_BACK or monotonic() - heard > _RECONNECT_SECONDS:
                            self._fail(response, job)
                    for line in () if response.is_error else response.iter_lines():
                        heard = monotonic()
                        if line.startswith("data: "):
                            event = json.loads(line.removeprefix("data: "))
                            if event["kind"] == "activity":
                                listen(Activity.model_validate(event["data"]))
                                continue
                            last = event["seq"]
                            yield event
            except httpx.TransportError as error:
                if monotonic() - heard > _RECONNECT_SECONDS:
                    raise ServiceUnavailable(self._address, _words(error)) from None
            sleep(_PAUSE_SECONDS)

    def _ask(self, method: str, path: str, about: str = "", **options: Any) -> JsonObject:
        answer: JsonObject = self._answer(method, path, about, **options).json()
        return answer

    def _answer(self, method: str, path: str, about: str = "", **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServiceUnavailable(self._address, _words(error)) from None
        if response.is_error:
            self._fail(response, about)
        return response

    def _fail(self, response: httpx.Response, about: str) -> NoReturn:
        error = error_of(self._address, response, about)
        if isinstance(error, ModelNotFound):
            whole = (model["name"] for model in self.models() if model.get("layers") is None)
            raise ModelNotFound(about, tuple(whole))
        raise error


def read_key(file: Path | None) -> str | None:
    """The API key in a file; None without a file.

    Raises:
        InvalidSetting: the file cannot be read, or has no key.
    """
    if file is None:
        return None
    try:
        return _checked(file.read_text(encoding="utf-8").strip(), "--key-file")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSetting("--key-file", str(file), f"a file that can be read ({error})") from None


def key_header(key: str | None) -> dict[str, str]:
    """The header with ``key``; without one, with that in ``CHAINFED_API_KEY``; none if there is none.

    Raises:
        InvalidSetting: it is no key.
    """
    key = key or os.environ.get(KEY_VARIABLE)
    return {"Authorization": f"Bearer {_checked(key, KEY_VARIABLE)}"} if key else {}


def _checked(key: str, where: str) -> str:
    if not _KEY.fullmatch(key):  # the error does not show what may be most of a key
        raise InvalidSetting(where, "…", "a key such as cfr_5d1c…_9f80…, in one line")
    return key


def _parts(texts: list[str]) -> Iterator[list[str]]:
    """The texts of each request; one request without texts, if there are none."""
    part: list[str] = []
    for text in texts:
        characters = sum(map(len, part)) + len(text)
        if part and (len(part) == _TEXTS_PER_REQUEST or characters > _CHARACTERS_PER_REQUEST):
            yield part
            part = []
        part.append(text)
    yield part


def _words(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
