"""The route that embeds texts, in the format of OpenAI's API."""

from fastapi import APIRouter, Request

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.models import served
from chainfed_ray.api.rest.service import Jobs, WithService, while_connected
from chainfed_ray.api.schemas.embeddings import EmbeddingList, EmbeddingRequest

router = APIRouter(prefix="/v1", tags=["models"], route_class=StrictRoute)


@router.post("/embeddings")
async def embeddings(body: EmbeddingRequest, request: Request, service: WithService, jobs: Jobs) -> EmbeddingList:
    """Embed texts with an encoder, or with a classifier's stack on it. In the format of OpenAI's API."""
    found = await served(jobs, body.model, "sequence-classification")
    answers = await while_connected(request, service.embed(found.key, body.input))
    return EmbeddingList.of(found.model.id, body, answers)
