"""What the service's answers mean that are errors: the same exceptions that the service itself raises."""

import re
from typing import Any

import httpx

from chainfed_ray.errors import (
    AccessDenied,
    ArtifactNotFound,
    ChainFedError,
    InvalidJob,
    JobConflict,
    JobNotFound,
    ModelNotFound,
    ServiceFailed,
    ServiceUnavailable,
    UploadConflict,
    UploadNotFound,
)
from chainfed_ray.problem import Problem

_OURS = "urn:chainfed:problem:"
_OF_ALIAS = re.compile(r"there is no model (['\"])(.+?)\1, for which the alias '([^']+)' stands\b.*", re.DOTALL)
_CONFLICT = re.compile(r"job (\S+) is (\S+); it cannot (.+)")


def error_of(address: str, response: httpx.Response, about: str) -> ChainFedError:
    """The error that a ``response`` of the service at ``address`` means. The request was ``about`` a job, a model or a file."""
    try:
        return _error_of(address, response.json(), about)
    except Exception:  # another program answers, with whatever it answers
        return ServiceUnavailable(address, f"its answer {response.status_code} is not one of chainfed")


def _error_of(address: str, problem: dict[str, Any], about: str) -> ChainFedError:
    """The error that problem details mean.

    Raises:
        Exception: they are none of ours.
    """
    match problem["type"].removeprefix(_OURS):
        case "invalid-job" | "invalid-request":
            return InvalidJob(tuple(Problem.from_document(found) for found in problem["errors"]))
        case "job-not-found":
            return JobNotFound(about)
        case "job-conflict":
            if refused := _CONFLICT.fullmatch(problem["detail"]):
                return JobConflict(*refused.groups())
        case "model-not-found":
            if behind := _OF_ALIAS.fullmatch(problem["detail"]):
                _, model, alias = behind.groups()
                return ModelNotFound(model, (), alias)
            return ModelNotFound(about, ())
        case "artifact-not-found":
            return ArtifactNotFound(*about.split("/", 1))
        case "upload-not-found":
            return UploadNotFound(about)
        case "upload-conflict":
            return UploadConflict(about, problem["detail"].partition(": ")[2])
        case "key-missing" | "key-invalid" | "scope-missing":
            return AccessDenied(address, problem["detail"])
    if not problem["type"].startswith(_OURS):
        raise ValueError("another program's")
    return ServiceFailed(address, problem["detail"], problem["request_id"])
