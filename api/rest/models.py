"""Routes of served models: list them, and classify texts."""

from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.schemas import ClassifyRequest, ClassifyResponse, Label, ModelList, ModelTask, ServedModel
from chainfed_ray.api.rest.service import Service, WithService
from chainfed_ray.cluster.jobs.store import JobRecord
from chainfed_ray.errors import InvalidJob, ModelNotFound

router = APIRouter(prefix="/v1", tags=["models"])

_ROUTES: dict[ModelTask, str] = {
    "sequence-classification": "POST /v1/classify",
    "causal-lm": "POST /v1/completions and POST /v1/chat/completions",
}


@router.get("/models")
def models(service: WithService) -> ModelList:
    """Every served model. A job's model is served as soon as the job has succeeded."""
    return ModelList(models=[ServedModel.of(record) for record in service.store.models()])


@router.post("/classify")
async def classify(body: ClassifyRequest, service: WithService) -> ClassifyResponse:
    """Classify texts with a model."""
    job = await served(service, body.model, "sequence-classification")
    classes = ServedModel.of(job).classes
    answers = await service.classify(job, body.texts)
    results = []
    for probabilities in answers:
        scores = dict(zip(classes, probabilities, strict=True))
        best = max(scores, key=scores.__getitem__)
        results.append(Label(label=best, score=scores[best], scores=scores))
    return ClassifyResponse(model=body.model, job=job.id, results=results)


async def served(service: Service, name: str, task: ModelTask) -> JobRecord:
    """The newest job whose model is called ``name``.

    Raises:
        ModelNotFound: there is no such model.
        InvalidJob: the model is not for ``task``.
    """
    found = {record.model: record for record in await run_in_threadpool(service.store.models)}
    if name not in found:
        raise ModelNotFound(name, tuple(found))
    own = ServedModel.of(found[name]).task
    if own != task:
        raise InvalidJob.at("model", name, f"a model for {task}; this one is for {own}, and answers {_ROUTES[own]}")
    return found[name]
