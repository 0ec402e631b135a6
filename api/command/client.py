"""The service as a Python object: what the command line, and a user's own program, calls it by."""

import json
from collections.abc import Iterator
from time import monotonic, sleep
from typing import Any, NoReturn

import httpx

from chainfed_ray.activity import Activity, Listener, Reporter, no_listener
from chainfed_ray.errors import (
    InvalidJob,
    JobConflict,
    JobNotFound,
    ModelNotFound,
    Problem,
    ServiceFailed,
    ServiceUnavailable,
)
from chainfed_ray.units import format_seconds

_CHECK_SECONDS = 150.0  # the checks before a job is accepted read its data
_TIMEOUT = httpx.Timeout(_CHECK_SECONDS, connect=5.0)
_TEXTS_PER_REQUEST = 128  # of the 256 that the service takes
_WRITING = httpx.Timeout(None, connect=5.0)  # a text takes the time that it takes
_RECONNECT_SECONDS = 60.0
_PAUSE_SECONDS = 0.5

Document = dict[str, Any]


class ServiceClient:
    """The service at ``address``, such as ``http://127.0.0.1:8000``. Every method raises ``ServiceUnavailable``
    where no service answers and ``ServiceFailed`` where it answers with an error that is not the caller's.
    """

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")
        try:
            self._http = httpx.Client(base_url=self._address, timeout=_TIMEOUT, trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise ServiceUnavailable(address, str(error)) from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def ready(self) -> Document:
        """The health of every part of a service that works."""
        return self._ask("GET", "/readyz")

    def submit(self, document: Document, listen: Listener = no_listener) -> Document:
        """Queue a job, once the service has checked it.

        Raises:
            InvalidJob: it cannot run.
        """
        Reporter(f"waiting for the service to check the job (at most {format_seconds(_CHECK_SECONDS)})", listen).begin()
        return self._ask("POST", "/v1/jobs", json=document)

    def plan(self, document: Document) -> Document:
        """The dry run of a job.

        Raises:
            InvalidJob: it cannot run with any clients.
        """
        return self._ask("POST", "/v1/plan", json=document)

    def jobs(self, limit: int = 50) -> list[Document]:
        """The newest jobs."""
        jobs: list[Document] = self._ask("GET", "/v1/jobs", params={"limit": limit})["jobs"]
        return jobs

    def job(self, job: str) -> Document:
        """One job.

        Raises:
            JobNotFound: there is no such job.
        """
        return self._ask("GET", f"/v1/jobs/{job}", about=job)

    def cancel(self, job: str) -> Document:
        """End a job.

        Raises:
            JobNotFound: there is no such job.
            JobConflict: it is over.
        """
        return self._ask("POST", f"/v1/jobs/{job}/cancel", about=job)

    def models(self) -> list[Document]:
        """Every model that answers."""
        models: list[Document] = self._ask("GET", "/v1/models")["models"]
        return models

    def classify(self, model: str, texts: list[str]) -> Document:
        """Classify any number of texts, in as many requests as that takes.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: there are none, or one is too long.
        """
        parts = [texts[first : first + _TEXTS_PER_REQUEST] for first in range(0, len(texts), _TEXTS_PER_REQUEST)] or [
            []
        ]
        bodies = ({"model": model, "texts": part} for part in parts)
        answers = [self._ask("POST", "/v1/classify", json=body, about=model) for body in bodies]
        return {**answers[0], "results": [found for answer in answers for found in answer["results"]]}

    def complete(self, model: str, prompts: list[str], **options: Any) -> Document:
        """What a language model makes of prompts; ``options`` are those of ``POST /v1/completions``, such as ``max_tokens``.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: it is no language model, or an option or a prompt is wrong.
        """
        body = {"model": model, "prompt": prompts, **options}
        return self._ask("POST", "/v1/completions", about=model, json=body, timeout=_WRITING)

    def stream(self, model: str, prompts: list[str], **options: Any) -> Iterator[Document]:
        """The same in pieces, as they are written: a choice of ``complete`` each. Closed early, nothing more is written.

        Raises:
            ModelNotFound: no such model is served.
            InvalidJob: it is no language model, or an option or a prompt is wrong.
        """
        body = {"model": model, "prompt": prompts, "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/completions", json=body, timeout=_WRITING) as response:
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

    def follow(self, job: str, listen: Listener = no_listener) -> Iterator[Document]:
        """Every event of a job from its first to its last, as they happen; a broken connection is taken up again.

        In between ``listen`` is told what the job is busy with.

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
                        self._fail(response, job)
                    for line in response.iter_lines():
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

    def _ask(self, method: str, path: str, about: str = "", **options: Any) -> Document:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise ServiceUnavailable(self._address, _words(error)) from None
        if response.is_error:
            self._fail(response, about)
        answer: Document = response.json()
        return answer

    def _fail(self, response: httpx.Response, about: str) -> NoReturn:
        try:
            problem = response.json()
            kind = str(problem["type"]).rpartition(":")[2]
        except (ValueError, KeyError, TypeError):
            raise ServiceUnavailable(self._address, f"it answers {response.status_code}, not as ours would") from None
        match kind:
            case "invalid-job" | "invalid-request":
                raise InvalidJob(tuple(Problem.from_document(found) for found in problem["errors"]))
            case "job-not-found":
                raise JobNotFound(about)
            case "job-conflict":
                raise JobConflict(about, self.job(about)["status"], "be cancelled")
            case "model-not-found":
                raise ModelNotFound(about, tuple(model["name"] for model in self.models()))
        raise ServiceFailed(self._address, problem["detail"], problem["request_id"])


def _words(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
