"""Whether the process lives, and whether the service works."""

import asyncio

from fastapi import APIRouter, Response

from chainfed_ray.api.rest.schemas import Health
from chainfed_ray.api.rest.service import WithService

router = APIRouter(tags=["health"])

_PATIENCE_SECONDS = 5.0


@router.get("/healthz")
async def healthz() -> Health:
    """The process lives."""
    return Health(status="ok", checks={})


@router.get("/readyz", responses={503: {"model": Health}})
async def readyz(response: Response, service: WithService) -> Health:
    """Every part works: the database, the controller and inference; with 503 the parts that do not say why."""
    checks = {}
    for name, alive in service.parts.items():
        try:
            await asyncio.wait_for(alive(), _PATIENCE_SECONDS)
        except TimeoutError:
            checks[name] = f"no answer within {_PATIENCE_SECONDS:g} s"
        except Exception as error:  # a part may fail in any way, and the others are still to be asked
            checks[name] = f"{type(error).__name__}: {error}"
        else:
            checks[name] = "ok"
    works = all(said == "ok" for said in checks.values())
    response.status_code = 200 if works else 503
    return Health(status="ok" if works else "unavailable", checks=checks)
