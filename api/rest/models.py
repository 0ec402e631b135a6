"""Routes of served models: list them, and classify texts."""

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.callers import while_connected
from chainfed_ray.api.rest.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    Label,
    ModelEntry,
    ModelList,
    ModelTask,
    ServedModel,
)
from chainfed_ray.api.rest.service import Service, WithService
from chainfed_ray.cluster.jobs.store import JobRecord
from chainfed_ray.errors import InvalidJob, ModelNotFound

router = APIRouter(prefix="/v1", tags=["models"])

_NAMED_MODELS = 20  # in the error that there is no such model
_ROUTES: dict[ModelTask, str] = {
    "sequence-classification": "POST /v1/classify",
    "causal-lm": "POST /v1/completions and POST /v1/chat/completions",
}


@router.get("/models")
def list_models(service: WithService) -> ModelList:
    """Every served model. A job's model is served as soon as the job has succeeded."""
    served_models = [ServedModel.of(record) for record in service.store.models()]
    return ModelList(
        models=served_models, data=[ModelEntry.model_validate(model, from_attributes=True) for model in served_models]
    )


@router.get("/models/{name}")
def get_model(name: str, service: WithService) -> ServedModel:
    """A served model."""
    return ServedModel.of(_newest(service, name))


@router.post("/classify")
async def classify(body: ClassifyRequest, request: Request, service: WithService) -> ClassifyResponse:
    """Classify texts with a model."""
    job = await served(service, body.model, "sequence-classification")
    classes = ServedModel.of(job).classes
    answers = await while_connected(request, service.classify(job, body.texts))
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
    found = await run_in_threadpool(_newest, service, name)
    own = ServedModel.of(found).task
    if own != task:
        raise InvalidJob.at("model", name, f"a model for {task}; this one is for {own}, and answers {_ROUTES[own]}")
    return found


def _newest(service: Service, name: str) -> JobRecord:
    found = service.store.model(name)
    if found is None:
        raise ModelNotFound(name, tuple(service.store.model_names(_NAMED_MODELS)))
    return found
