"""Routes of served models: which there are, and what they say."""

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from api.schemas import ClassifyRequest, ClassifyResponse, Label, ModelList, ServedModel
from api.service import WithService
from chainfed_ray.errors import ModelNotFound

router = APIRouter(prefix="/v1", tags=["models"])


@router.get("/models")
def models(service: WithService) -> ModelList:
    """Every model that answers. A job's model is one as soon as the job has succeeded."""
    return ModelList(models=[ServedModel.of(record) for record in service.store.models()])


@router.post("/classify")
async def classify(body: ClassifyRequest, service: WithService) -> ClassifyResponse:
    """Classify texts with a model."""
    served = {record.model: record for record in await run_in_threadpool(service.store.models)}
    if body.model not in served:
        raise ModelNotFound(body.model, tuple(served))
    job = served[body.model]
    classes = ServedModel.of(job).classes
    answers = await service.classify(job, body.texts)
    results = []
    for probabilities in answers:
        scores = dict(zip(classes, probabilities, strict=True))
        best = max(scores, key=scores.__getitem__)
        results.append(Label(label=best, score=scores[best], scores=scores))
    return ClassifyResponse(model=body.model, job=job.id, results=results)
