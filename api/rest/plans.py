"""The route of the dry run."""

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.report.pictures import check_drawing
from chainfed_ray.api.rest.job_file import BODY, SubmittedJob
from chainfed_ray.api.rest.service import WithService
from chainfed_ray.records.forecast import Forecast

router = APIRouter(prefix="/v1/plan", tags=["jobs"])

_PNG = "image/png"


@router.post("", response_model=Forecast, openapi_extra=BODY, responses={200: {"content": {_PNG: {}}}})
async def plan(spec: SubmittedJob, request: Request, service: WithService) -> Forecast | Response:
    """Forecast a job without training it: which clients join, memory, network, time, and what one change would gain."""
    with_picture = _PNG in request.headers.get("accept", "")
    if with_picture:
        check_drawing()
    forecast = await service.plan(spec)
    if with_picture:
        from chainfed_ray.api.report.forecast_picture import png  # imports matplotlib, which is an optional extra

        return Response(await run_in_threadpool(png, forecast), media_type=_PNG)
    return forecast
