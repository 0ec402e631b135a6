"""Routes of health checks: the process is alive, and every part of the service works."""

import asyncio
import logging

from fastapi import APIRouter, Response

from chainfed_ray.api.rest.schemas import Health
from chainfed_ray.api.rest.service import WithService

router = APIRouter(tags=["health"])

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 5.0


@router.get("/healthz")
async def healthz() -> Health:
    """Answer that the process is alive."""
    return Health(status="ok", checks={})


@router.get("/readyz", responses={503: {"model": Health}})
async def readyz(response: Response, service: WithService) -> Health:
    """Check the database, the controller and inference. If one fails, the status is 503 and `checks` says why."""
    checks = {}
    for name, alive in service.parts.items():
        try:
            await asyncio.wait_for(alive(), _PATIENCE_SECONDS)
        except TimeoutError:
            checks[name] = f"no answer within {_PATIENCE_SECONDS:g} s"
        except Exception as error:  # whatever one part raises, the others are still checked
            _log.warning("%s does not work", name, exc_info=error)
            checks[name] = f"{type(error).__name__}; the service's log says more"
        else:
            checks[name] = "ok"
    works = all(state == "ok" for state in checks.values())
    response.status_code = 200 if works else 503
    return Health(status="ok" if works else "unavailable", checks=checks)
