"""Builds the REST API as a FastAPI application."""

from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from chainfed_ray.api.rest import completions, events, health, jobs, metrics, models, plans
from chainfed_ray.api.rest.errors import RequestIds, handle_errors
from chainfed_ray.api.rest.schemas import ProblemDetails
from chainfed_ray.api.rest.service import Service
from chainfed_ray.spec.job import JobSpec

_LARGEST_BODY = 32 * 2**20  # bytes of a request


def create_app(service: Service) -> FastAPI:
    """The application with every route, error handler and health check, on top of ``service``."""
    app = FastAPI(
        title="chainfed-ray",
        version=version("chainfed-ray"),
        summary="Federated fine-tuning of language models for fleets of unequal machines",
        responses={"4XX": {"model": ProblemDetails}, "5XX": {"model": ProblemDetails}},
        max_body_size=_LARGEST_BODY,
    )
    app.state.service = service
    app.add_middleware(RequestIds)
    handle_errors(app)
    for part in (jobs, plans, events, models, completions, health, metrics):
        app.include_router(part.router)
    _describe_job_files(app)
    return app


def _describe_job_files(app: FastAPI) -> None:
    """Add the schema of a job file to the OpenAPI document, where ``BODY`` in job_file.py refers to it."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        schema = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
        parts = document["components"]["schemas"]
        parts.update(schema.pop("$defs"))
        parts["JobSpec"] = schema
        return document

    app.openapi = described  # type: ignore[method-assign]
