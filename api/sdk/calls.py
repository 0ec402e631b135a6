"""The calls of the REST API, each described once: what is sent, and the model of the answer, which is the route's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from chainfed_ray.api.jobs.resources import JobPage, JobResource
from chainfed_ray.api.jobs.routes import ClientPage
from chainfed_ray.api.rest.monitoring import AuditPage
from chainfed_ray.api.rest.openai_schemas import ChatCompletion, Completion
from chainfed_ray.api.rest.schemas import (
    AliasList,
    AliasResource,
    ClassifyResponse,
    EventPage,
    Health,
    ModelList,
    ServedModel,
)
from chainfed_ray.api.storage.artifacts import ArtifactList
from chainfed_ray.api.storage.logs import LogPage
from chainfed_ray.api.storage.uploads import UploadPage, UploadResource
from chainfed_ray.records.forecast import Forecast

Answer = TypeVar("Answer", bound=BaseModel | None)
Json = dict[str, Any]


@dataclass(frozen=True)
class Call(Generic[Answer]):
    """A request: the ``operation`` of the OpenAPI document, with the model of its answer; None if the answer has no body.

    ``about`` is what errors name: a job, a model or an upload.
    """

    operation: str
    method: str
    path: str
    answer: type[Answer]
    about: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    body: Json | None = None


_NO_BODY = type(None)


def plan_job(document: Json) -> Call[Forecast]:
    """Forecast a job by a dry run."""
    return Call("plan_job", "POST", "/v1/plan", Forecast, body=document)


def submit_job(document: Json) -> Call[JobResource]:
    """Let the service check a job, and queue it."""
    return Call("submit_job", "POST", "/v1/jobs", JobResource, body=document)


def list_jobs(
    limit: int = 50, cursor: str | None = None, state: Sequence[str] = (), label: Sequence[str] = ()
) -> Call[JobPage]:
    """A page of jobs, the newest first. ``cursor`` is the ``next`` of the page before."""
    asked = {"limit": limit, "cursor": cursor, "state": list(state), "label": list(label)}
    return Call("list_jobs", "GET", "/v1/jobs", JobPage, parameters=asked)


def get_job(job: str) -> Call[JobResource]:
    """A job, with its progress and its result."""
    return _of_job("get_job", "GET", job, "", JobResource)


def delete_job(job: str) -> Call[None]:
    """Delete a job that is over, with its files and its model."""
    return _of_job("delete_job", "DELETE", job, "", _NO_BODY)


def pause_job(job: str) -> Call[JobResource]:
    """Pause a job after its present round."""
    return _of_job("pause_job", "POST", job, "/pause", JobResource)


def resume_job(job: str) -> Call[JobResource]:
    """Let a paused job go on."""
    return _of_job("resume_job", "POST", job, "/resume", JobResource)


def cancel_job(job: str) -> Call[JobResource]:
    """Cancel a job."""
    return _of_job("cancel_job", "POST", job, "/cancel", JobResource)


def retry_job(job: str) -> Call[JobResource]:
    """Try a job again that failed or was cancelled."""
    return _of_job("retry_job", "POST", job, "/retry", JobResource)


def clone_job(job: str, changes: Json) -> Call[JobResource]:
    """Queue a new job with the document of another one and ``changes``, a JSON merge patch."""
    return _of_job("clone_job", "POST", job, "/clone", JobResource, body=changes)


def list_clients(job: str, after: int = 0, limit: int = 100) -> Call[ClientPage]:
    """A page of a job's clients."""
    return _of_job("list_clients", "GET", job, "/clients", ClientPage, {"after": after, "limit": limit})


def list_events(job: str, after: int = 0, limit: int = 1000) -> Call[EventPage]:
    """The events of a job with numbers above ``after``."""
    return _of_job("list_events", "GET", job, "/events", EventPage, {"after": after, "limit": limit})


def get_logs(job: str, after: int = 0, limit: int = 1000, wait: int = 0) -> Call[LogPage]:
    """Lines of a job's log. With ``wait``, the service waits so many seconds for the next one."""
    return _of_job("get_logs", "GET", job, "/logs", LogPage, {"after": after, "limit": limit, "wait": wait})


def list_artifacts(job: str) -> Call[ArtifactList]:
    """What a job has left."""
    return _of_job("list_artifacts", "GET", job, "/artifacts", ArtifactList)


def list_models() -> Call[ModelList]:
    """Every served model."""
    return Call("list_models", "GET", "/v1/models", ModelList)


def get_model(name: str) -> Call[ServedModel]:
    """A served model."""
    return Call("get_model", "GET", f"/v1/models/{quote(name)}", ServedModel, name)


def list_aliases() -> Call[AliasList]:
    """Every alias."""
    return Call("list_aliases", "GET", "/v1/aliases", AliasList)


def set_alias(alias: str, targets: Mapping[str, float]) -> Call[AliasResource]:
    """Let an alias stand for models, each with its share of the requests."""
    body = {"targets": dict(targets)}
    return Call("set_alias", "PUT", f"/v1/aliases/{quote(alias, safe='')}", AliasResource, alias, body=body)


def roll_back(alias: str) -> Call[AliasResource]:
    """Return an alias to what it stood for before."""
    return Call("roll_back", "POST", f"/v1/aliases/{quote(alias, safe='')}/rollback", AliasResource, alias)


def delete_alias(alias: str) -> Call[None]:
    """Delete an alias."""
    return Call("delete_alias", "DELETE", f"/v1/aliases/{quote(alias, safe='')}", _NO_BODY, alias)


def classify(model: str, texts: Sequence[str], **options: Any) -> Call[ClassifyResponse]:
    """Classify up to 256 texts."""
    return _of_model("classify", "/v1/classify", ClassifyResponse, model, {"texts": list(texts), **options})


def completions(model: str, prompts: Sequence[str], **options: Any) -> Call[Completion]:
    """Continue prompts with a language model. ``options`` are those of the route, such as ``max_tokens``."""
    return _of_model("completions", "/v1/completions", Completion, model, {"prompt": list(prompts), **options})


def chat_completions(model: str, messages: Sequence[Json], **options: Any) -> Call[ChatCompletion]:
    """Let a language model answer a chat."""
    body = {"messages": list(messages), **options}
    return _of_model("chat_completions", "/v1/chat/completions", ChatCompletion, model, body)


def list_uploads(limit: int = 50, cursor: str | None = None) -> Call[UploadPage]:
    """A page of uploads, the newest first."""
    return Call("list_uploads", "GET", "/v1/uploads", UploadPage, parameters={"limit": limit, "cursor": cursor})


def get_upload(upload: str) -> Call[UploadResource]:
    """An upload, with how many of its bytes have arrived."""
    return Call("get_upload", "GET", f"/v1/uploads/{quote(upload, safe='')}", UploadResource, upload)


def delete_upload(upload: str) -> Call[None]:
    """Delete an upload."""
    return Call("delete_upload", "DELETE", f"/v1/uploads/{quote(upload, safe='')}", _NO_BODY, upload)


def readyz() -> Call[Health]:
    """The health of each part of the service."""
    return Call("readyz", "GET", "/readyz", Health)


def list_audit(limit: int = 100, before: int | None = None) -> Call[AuditPage]:
    """A page of the audit log."""
    return Call("list_audit", "GET", "/v1/audit", AuditPage, parameters={"limit": limit, "before": before})


def _of_job(
    operation: str,
    method: str,
    job: str,
    part: str,
    answer: type[Answer],
    parameters: Mapping[str, Any] | None = None,
    body: Json | None = None,
) -> Call[Answer]:
    return Call(operation, method, f"/v1/jobs/{quote(job, safe='')}{part}", answer, job, parameters or {}, body)


def _of_model(operation: str, path: str, answer: type[Answer], model: str, body: Json) -> Call[Answer]:
    return Call(operation, "POST", path, answer, model, body={"model": model, **body})
