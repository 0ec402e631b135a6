"""The calls of the REST API, each described once: what is sent, and the model of the answer, which is the route's own.

The models are imported when the first answer is looked at: a program that takes answers as JSON (``Client.json``) does not wait
for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from urllib.parse import quote

from pydantic import BaseModel

if TYPE_CHECKING:
    from chainfed_ray.api.schemas.artifacts import ArtifactList
    from chainfed_ray.api.schemas.completions import ChatCompletion, Completion
    from chainfed_ray.api.schemas.events import EventPage, LogPage
    from chainfed_ray.api.schemas.jobs import ClientPage, JobPage, JobResource
    from chainfed_ray.api.schemas.models import AliasList, AliasResource, ClassifyResponse, ModelList, ServedModel
    from chainfed_ray.api.schemas.monitoring import AuditPage, Health
    from chainfed_ray.api.schemas.uploads import UploadPage, UploadResource
    from chainfed_ray.records.forecast import Forecast

Answer = TypeVar("Answer", bound=BaseModel | None)
Json = dict[str, Any]
_SECONDS = 330.0  # the longest call is a dry run, which times training steps
_CLASSIFY_SECONDS = 150.0


@dataclass(frozen=True)
class Model(Generic[Answer]):
    """The model of an answer: a class of a module, which is not imported before an answer is looked at."""

    module: str
    name: str

    def of(self, document: Any) -> Answer:
        """The answer that a JSON ``document`` is.

        Raises:
            ValidationError: it is none.
        """
        if not self.module:
            return cast("Answer", None)
        model = getattr(import_module(f"chainfed_ray.{self.module}"), self.name)
        return cast("Answer", model.model_validate(document))


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request: the ``operation`` of the OpenAPI document, with the model of its answer.

    ``about`` is what errors name: a job, a model or an upload. ``content`` are the bytes of a body that is not JSON. An answer
    with the status ``also`` has the model, too. ``seconds`` may pass without a byte of the answer; None: any time.
    """

    operation: str
    method: str
    path: str
    answer: Model[Answer]
    about: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    body: Json | None = None
    content: Iterator[bytes] | None = None
    also: int | None = None
    seconds: float | None = _SECONDS


_NO_BODY: Model[None] = Model("", "")
_JOB: Model[JobResource] = Model("api.schemas.jobs", "JobResource")
_JOBS: Model[JobPage] = Model("api.schemas.jobs", "JobPage")
_CLIENTS: Model[ClientPage] = Model("api.schemas.jobs", "ClientPage")
_FORECAST: Model[Forecast] = Model("records.forecast", "Forecast")
_EVENTS: Model[EventPage] = Model("api.schemas.events", "EventPage")
_LOGS: Model[LogPage] = Model("api.schemas.events", "LogPage")
_ARTIFACTS: Model[ArtifactList] = Model("api.schemas.artifacts", "ArtifactList")
_MODELS: Model[ModelList] = Model("api.schemas.models", "ModelList")
_MODEL: Model[ServedModel] = Model("api.schemas.models", "ServedModel")
_ALIASES: Model[AliasList] = Model("api.schemas.models", "AliasList")
_ALIAS: Model[AliasResource] = Model("api.schemas.models", "AliasResource")
_LABELS: Model[ClassifyResponse] = Model("api.schemas.models", "ClassifyResponse")
_COMPLETION: Model[Completion] = Model("api.schemas.completions", "Completion")
_CHAT: Model[ChatCompletion] = Model("api.schemas.completions", "ChatCompletion")
_UPLOADS: Model[UploadPage] = Model("api.schemas.uploads", "UploadPage")
UPLOAD: Model[UploadResource] = Model("api.schemas.uploads", "UploadResource")
_HEALTH: Model[Health] = Model("api.schemas.monitoring", "Health")
_AUDIT: Model[AuditPage] = Model("api.schemas.monitoring", "AuditPage")


def plan_job(document: Json) -> Call[Forecast]:
    """Forecast a job by a dry run."""
    return Call("plan_job", "POST", "/v1/plan", _FORECAST, body=document)


def submit_job(document: Json) -> Call[JobResource]:
    """Let the service check a job, and queue it."""
    return Call("submit_job", "POST", "/v1/jobs", _JOB, body=document)


def list_jobs(
    limit: int = 50, cursor: str | None = None, state: Sequence[str] = (), label: Sequence[str] = ()
) -> Call[JobPage]:
    """A page of jobs, the newest first. ``cursor`` is the ``next`` of the page before."""
    asked = {"limit": limit, "cursor": cursor, "state": list(state), "label": list(label)}
    return Call("list_jobs", "GET", "/v1/jobs", _JOBS, parameters=asked)


def get_job(job: str) -> Call[JobResource]:
    """A job, with its progress and its result."""
    return _of_job("get_job", "GET", job, "", _JOB)


def delete_job(job: str) -> Call[None]:
    """Delete a job that is over, with its files and its model."""
    return _of_job("delete_job", "DELETE", job, "", _NO_BODY)


def pause_job(job: str) -> Call[JobResource]:
    """Pause a job after its present round."""
    return _of_job("pause_job", "POST", job, "/pause", _JOB)


def resume_job(job: str) -> Call[JobResource]:
    """Let a paused job go on."""
    return _of_job("resume_job", "POST", job, "/resume", _JOB)


def cancel_job(job: str) -> Call[JobResource]:
    """Cancel a job."""
    return _of_job("cancel_job", "POST", job, "/cancel", _JOB)


def retry_job(job: str) -> Call[JobResource]:
    """Try a job again that failed or was cancelled."""
    return _of_job("retry_job", "POST", job, "/retry", _JOB)


def clone_job(job: str, changes: Json) -> Call[JobResource]:
    """Queue a new job with the document of another one and ``changes``, a JSON merge patch."""
    return _of_job("clone_job", "POST", job, "/clone", _JOB, body=changes)


def list_clients(job: str, after: int = 0, limit: int = 100) -> Call[ClientPage]:
    """A page of a job's clients."""
    return _of_job("list_clients", "GET", job, "/clients", _CLIENTS, {"after": after, "limit": limit})


def list_events(job: str, after: int = 0, limit: int = 1000) -> Call[EventPage]:
    """The events of a job with numbers above ``after``."""
    return _of_job("list_events", "GET", job, "/events", _EVENTS, {"after": after, "limit": limit})


def get_logs(job: str, after: int = 0, limit: int = 1000, wait: int = 0) -> Call[LogPage]:
    """Lines of a job's log. With ``wait``, the service waits so many seconds for the next one."""
    return _of_job("get_logs", "GET", job, "/logs", _LOGS, {"after": after, "limit": limit, "wait": wait})


def list_artifacts(job: str) -> Call[ArtifactList]:
    """What a job has left."""
    return _of_job("list_artifacts", "GET", job, "/artifacts", _ARTIFACTS)


def list_models(limit: int | None = None, after: str | None = None) -> Call[ModelList]:
    """Every served model, or a page of ``limit``. ``after`` is the last ``id`` of the page before."""
    return Call("list_models", "GET", "/v1/models", _MODELS, parameters={"limit": limit, "after": after})


def get_model(name: str) -> Call[ServedModel]:
    """A served model."""
    return Call("get_model", "GET", f"/v1/models/{quote(name)}", _MODEL, name)


def list_aliases() -> Call[AliasList]:
    """Every alias."""
    return Call("list_aliases", "GET", "/v1/aliases", _ALIASES)


def set_alias(alias: str, targets: Mapping[str, float]) -> Call[AliasResource]:
    """Let an alias stand for models, each with its share of the requests."""
    body = {"targets": dict(targets)}
    return Call("set_alias", "PUT", f"/v1/aliases/{quote(alias, safe='')}", _ALIAS, alias, body=body)


def roll_back(alias: str) -> Call[AliasResource]:
    """Return an alias to what it stood for before."""
    return Call("roll_back", "POST", f"/v1/aliases/{quote(alias, safe='')}/rollback", _ALIAS, alias)


def delete_alias(alias: str) -> Call[None]:
    """Delete an alias."""
    return Call("delete_alias", "DELETE", f"/v1/aliases/{quote(alias, safe='')}", _NO_BODY, alias)


def classify(model: str, texts: Sequence[str], **options: Any) -> Call[ClassifyResponse]:
    """Classify up to 256 texts."""
    body = {"texts": list(texts), **options}
    return _of_model("classify", "/v1/classify", _LABELS, model, body, _CLASSIFY_SECONDS)


def completions(model: str, prompts: Sequence[str], **options: Any) -> Call[Completion]:
    """Continue prompts with a language model. ``options`` are those of the route, such as ``max_tokens``."""
    return _of_model("completions", "/v1/completions", _COMPLETION, model, {"prompt": list(prompts), **options})


def chat_completions(model: str, messages: Sequence[Json], **options: Any) -> Call[ChatCompletion]:
    """Let a language model answer a chat."""
    body = {"messages": list(messages), **options}
    return _of_model("chat_completions", "/v1/chat/completions", _CHAT, model, body)


def list_uploads(limit: int = 50, cursor: str | None = None) -> Call[UploadPage]:
    """A page of uploads, the newest first."""
    return Call("list_uploads", "GET", "/v1/uploads", _UPLOADS, parameters={"limit": limit, "cursor": cursor})


def begin_upload(name: str, size: int, sha256: str) -> Call[UploadResource]:
    """Begin an upload of ``size`` bytes, or find the one that was begun. ``exchanges.upload`` sends a whole file."""
    body = {"name": name, "bytes": size, "sha256": sha256}
    return Call("begin_upload", "POST", "/v1/uploads", UPLOAD, body=body)


def put_content(upload: str, offset: int, content: Iterator[bytes]) -> Call[UploadResource]:
    """Send bytes of an upload from ``offset`` on: at most as many as are left of it."""
    path = f"/v1/uploads/{quote(upload, safe='')}/content"
    return Call("put_content", "PUT", path, UPLOAD, upload, {"offset": offset}, content=content)


def get_upload(upload: str) -> Call[UploadResource]:
    """An upload, with how many of its bytes have arrived."""
    return Call("get_upload", "GET", f"/v1/uploads/{quote(upload, safe='')}", UPLOAD, upload)


def delete_upload(upload: str) -> Call[None]:
    """Delete an upload."""
    return Call("delete_upload", "DELETE", f"/v1/uploads/{quote(upload, safe='')}", _NO_BODY, upload)


def readyz() -> Call[Health]:
    """The health of each part of the service, also if one does not work."""
    return Call("readyz", "GET", "/readyz", _HEALTH, also=503)


def list_audit(limit: int = 100, before: int | None = None) -> Call[AuditPage]:
    """A page of the audit log."""
    return Call("list_audit", "GET", "/v1/audit", _AUDIT, parameters={"limit": limit, "before": before})


def _of_job(
    operation: str,
    method: str,
    job: str,
    part: str,
    answer: Model[Answer],
    parameters: Mapping[str, Any] | None = None,
    body: Json | None = None,
) -> Call[Answer]:
    return Call(operation, method, f"/v1/jobs/{quote(job, safe='')}{part}", answer, job, parameters or {}, body)


def _of_model(
    operation: str,
    path: str,
    answer: Model[Answer],
    model: str,
    body: Json,
    seconds: float | None = None,  # a text that is written may take any time
) -> Call[Answer]:
    return Call(operation, "POST", path, answer, model, body={"model": model, **body}, seconds=seconds)
