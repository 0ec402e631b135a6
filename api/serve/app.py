"""Builds the REST API as a FastAPI application."""

from collections.abc import Callable, Sequence
from importlib.metadata import version

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from chainfed_ray.api.jobs import artifacts, control, logs, routes, uploads
from chainfed_ray.api.rest import completions, embeddings, events, models, monitoring, sites
from chainfed_ray.api.rest.errors import handle_errors
from chainfed_ray.api.rest.service import Service
from chainfed_ray.api.schemas.problems import ProblemDetails
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.document import describe, operation_id
from chainfed_ray.api.serve.front_door import add_front_door
from chainfed_ray.cluster.access.first_answers import FirstAnswers


def create_app(
    service: Service,
    allowed_hosts: Sequence[str] = (),
    access: AccessRules | None = None,
    answers: FirstAnswers | None = None,
    drains: Callable[[], bool] | None = None,
) -> FastAPI:
    """The application with every route, error handler and health check, on top of ``service``.

    Besides addresses and ``localhost``, it answers to ``allowed_hosts``. Without ``access``, no request needs a key. In
    ``answers`` are those to requests that may be sent again. Once the service ``drains``, every further request is refused.
    """
    app = FastAPIOffline(  # /docs with scripts of our own, and of no other host
        redoc_url=None,
        title="chainfed-ray",
        version=version("chainfed-ray"),
        summary="Federated fine-tuning of language models for fleets of unequal machines",
        responses={"4XX": {"model": ProblemDetails}},
        redirect_slashes=False,
        generate_unique_id_function=operation_id,
    )
    app.state.service = service
    handle_errors(app)
    for part in (routes, control, events, models, completions, embeddings, monitoring, sites, uploads, artifacts, logs):
        app.include_router(part.router)
    add_front_door(app, allowed_hosts, access, answers, drains)
    describe(app, with_keys=access is not None)
    return app
