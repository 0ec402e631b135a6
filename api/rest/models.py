"""Routes of served models: list them, give them other names, and classify texts."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import choices
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from chainfed_ray.api.rest.job_file import StrictRoute
from chainfed_ray.api.rest.served_models import exit_of, of_base, of_job, of_round
from chainfed_ray.api.rest.service import Caller, Jobs, WithService, while_connected
from chainfed_ray.api.schemas.bodies import LONGEST_NAME
from chainfed_ray.api.schemas.models import (
    AliasList,
    AliasResource,
    AliasTargets,
    ClassifyRequest,
    ClassifyResponse,
    Label,
    ModelEntry,
    ModelList,
    ModelTask,
    ServedModel,
)
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.jobs.versions import ModelName, exits_of, name_of_exit, trained
from chainfed_ray.cluster.tables import JobRecord
from chainfed_ray.errors import InvalidJob, JobNotFound, ModelNotFound
from chainfed_ray.serving.messages import ModelKey
from chainfed_ray.spec.sections import ModelSpec

router = APIRouter(prefix="/v1", tags=["models"], route_class=StrictRoute)

_MOST_COMPARED = 1000  # names, to find those that are like one that does not exist; jobs on a base model of one name
_ROUTES: dict[ModelTask, str] = {
    "sequence-classification": "POST /v1/classify and POST /v1/embeddings",
    "causal-lm": "POST /v1/completions and POST /v1/chat/completions",
}


Limit = Annotated[int | None, Query(ge=1, le=1000, description="the most models to list; without it, all are listed")]
After = Annotated[
    str | None, Query(max_length=500, description="list those after the one with this `id`, the last of a page")
]


@dataclass(frozen=True)
class Found:
    """A model by its name: how it stands in the list of models, and its name for the process that answers with it.

    It is served as long as ``needs``, a job, is there.
    """

    model: ServedModel
    key: ModelKey
    needs: str


@router.get("/models")
def list_models(jobs: Jobs, limit: Limit = None, after: After = None) -> ModelList:
    """Every served model, or a page of them. A job's model is served once the job has succeeded, and so are its early exits."""
    found = list(_listed(jobs, after, None if limit is None else limit + 1))
    page = found[:limit]
    return ModelList(
        models=page,
        data=[ModelEntry.model_validate(model, from_attributes=True) for model in page],
        has_more=len(found) > len(page),
    )


def _listed(jobs: JobStore, after: str | None, limit: int | None) -> Iterator[ServedModel]:
    """At least ``limit`` models, if there are as many: the bases, and models with their exits, in the order of the list."""
    stem, _, layers = ModelName.of(after or "")
    if ":" not in stem:
        yield from (of_base(record) for record in jobs.bases() if record.model.partition(":")[0] > stem)
    first = stem if ":" in stem else None
    for record in jobs.models(first, None if limit is None else limit + 1):
        known = (layers or 0) if record.model == first else -1  # of its exits, those up to here were listed before
        yield from (model for model in _with_exits(record) if (model.layers or 0) > known)


@router.get("/models/{name:path}")  # a name may begin with its tenant's, and a slash
def get_model(name: str, jobs: Jobs) -> ServedModel:
    """A served model."""
    return _find(jobs, name, None).model


_ALIAS = r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?"
AliasName = Annotated[str, Path(pattern=f"^{_ALIAS}$", description="such as `support`")]
SeenAlias = Annotated[
    str, Path(pattern=f"^({_ALIAS}/)?{_ALIAS}$", description="such as `support`; of another tenant, `alice/support`")
]


@router.get("/aliases")
def list_aliases(jobs: Jobs) -> AliasList:
    """Every alias: a name under which callers ask for a model, whichever it is today."""
    return AliasList(aliases=[AliasResource(name=name, targets=shares) for name, shares in jobs.aliases.all().items()])


@router.put("/aliases/{alias}")
def set_alias(alias: AliasName, body: AliasTargets, jobs: Jobs, service: WithService, caller: Caller) -> AliasResource:
    """Let an alias stand for a model, or for several with a share of the requests each. Requests that run go on."""
    jobs = jobs.seen_by(caller.tenant, everything=False)  # whoever uses the alias sees no more
    if jobs.on_base(alias, 1):
        raise InvalidJob.at("alias", alias, "a name that no base model has")
    if others := jobs.aliases.all().keys() & body.targets.keys():
        raise InvalidJob.at("targets", sorted(others), "names of models, not of aliases")
    own = f"{caller.tenant}/"
    targets = {name.removeprefix(own): share for name, share in body.targets.items()}
    if len(targets) < len(body.targets):
        raise InvalidJob.at("targets", sorted(body.targets), "each model once")
    most = service.most_aliases if caller.key else None
    while True:
        found = [_find(jobs, name, None) for name in targets]
        if len({one.model.task for one in found}) > 1:
            raise InvalidJob.at("targets", sorted(body.targets), "models of one task")
        with suppress(JobNotFound):  # one was deleted meanwhile: another may be served under its name, or none
            jobs.aliases.set(alias, targets, {one.needs for one in found}, most)
            return AliasResource(name=alias, targets=targets)


@router.post("/aliases/{alias:path}/rollback")
def roll_back(alias: SeenAlias, jobs: Jobs) -> AliasResource:
    """Return an alias to what it stood for before."""
    tenant, slash, _ = alias.rpartition("/")  # it stands for models of its tenant, by the names that they have there
    if (shares := jobs.aliases.roll_back(alias, lambda name: _is_served(jobs, f"{tenant}{slash}{name}"))) is None:
        raise ModelNotFound(f"{alias}, with something to return to", tuple(jobs.aliases.all()))
    return AliasResource(name=alias, targets=shares)


@router.delete("/aliases/{alias:path}", status_code=204, response_class=Response)
def delete_alias(alias: SeenAlias, jobs: Jobs) -> None:
    """Delete an alias. The models stay."""
    if not jobs.aliases.delete(alias):
        raise ModelNotFound(alias, tuple(jobs.aliases.all()))


@router.post("/classify")
async def classify(body: ClassifyRequest, request: Request, service: WithService, jobs: Jobs) -> ClassifyResponse:
    """Classify texts with a model."""
    found = await served(jobs, body.model, "sequence-classification")
    job, classes = found.model.job, found.model.classes
    if job is None:
        raise InvalidJob.at("model", body.model, "a model that a job trained; a base model alone has no classes")
    answers = await while_connected(request, service.classify(found.key, body.texts))
    results = []
    for probabilities in answers:
        ordered = sorted(zip(classes, probabilities, strict=True), key=lambda pair: -pair[1])
        best, score = ordered[0]
        results.append(Label(label=best, score=score, scores=dict(ordered[: body.top_k])))
    return ClassifyResponse(model=found.model.id, job=job, results=results)


async def served(jobs: JobStore, name: str, task: ModelTask) -> Found:
    """The model called ``name``: of the newest job with that model, or a base model alone.

    Raises:
        ModelNotFound: there is no such model.
        InvalidJob: the model is not for ``task``.
    """
    found = await run_in_threadpool(_find, jobs, name, task)
    own = found.model.task
    if own != task:
        raise InvalidJob.at("model", name, f"a model for {task}; this one is for {own}, and answers {_ROUTES[own]}")
    return found


def _find(jobs: JobStore, name: str, task: ModelTask | None) -> Found:
    """The model called ``name``. Of base models with that name, one that has been used for ``task``, if there is any."""
    if len(name) > LONGEST_NAME:  # no model is called so, and databases do not look for every length
        raise _not_found(jobs, name)
    stem, wanted, layers = ModelName.of(name)
    if layers is not None:
        return _exit(jobs, name)
    if wanted is not None and (found := trained(jobs, stem, wanted)):
        key = _key(found.record.spec["model"], found.record.id)._replace(
            round=found.stack.index, moving=None if isinstance(wanted, int) else wanted
        )
        return Found(of_round(found), key, found.record.id)
    if ":" in name and (record := jobs.model(name)):
        return Found(of_job(record), _key(record.spec["model"], record.id), record.id)
    if ":" not in name and (records := jobs.on_base(name, _MOST_COMPARED)):
        record = next((record for record in records if record.spec["model"]["task"] == task), records[0])
        return Found(of_base(record), _key(record.spec["model"], None), record.id)
    if ":" not in name and (shares := jobs.aliases.get(name)):
        tenant, slash, _ = name.rpartition("/")
        target = f"{tenant}{slash}{choices(list(shares), list(shares.values()))[0]}"
        try:
            return _find(jobs, target, task)
        except ModelNotFound as error:  # its job had not succeeded when the alias was made, and is over since
            served = tuple(other for other in error.served if other != name)
            raise ModelNotFound(target, served, name) from None
    raise _not_found(jobs, name)


def _exit(jobs: JobStore, name: str) -> Found:
    """The early exit called ``name``: of the newest job that has succeeded, or with ``@latest`` of one that may still train.

    Raises:
        ModelNotFound: there is no such job.
        InvalidJob: there is, and it has no such exit.
    """
    stem, version, layers = ModelName.of(name)
    if ":" not in stem:
        _find(jobs, stem, None)
        raise InvalidJob.at(
            "model", name, "no #layers: only a model that a job trained has early exits, no base and no alias"
        )
    if version not in (None, "latest"):
        expected = "@latest or nothing before #layers: of an early exit the newest stack is kept, and no other"
        raise InvalidJob.at("model", name, expected)
    if version == "latest":
        training = trained(jobs, stem, version)
        whole = of_round(training).model_copy(update={"name": f"{stem}@latest"}) if training else None
        record, scores = (training.record, training.exits) if training else (None, ())
    else:
        record = jobs.model(stem)
        whole, scores = (of_job(record), exits_of(record)) if record else (None, [])
    if record is None or whole is None:
        raise _not_found(jobs, name)
    if score := next((score for score in scores if score.layers == layers), None):
        return Found(exit_of(whole, score), _key(record.spec["model"], record.id)._replace(layers=layers), record.id)
    there = " or ".join(name_of_exit(whole.name, score.layers) for score in scores)
    expected = f"{there}, or without #layers the whole model" if there else "no #layers: this model has no early exits"
    raise InvalidJob.at("model", name, expected)


def _with_exits(record: JobRecord) -> list[ServedModel]:
    """The model of a job that has succeeded, and its early exits."""
    whole = of_job(record)
    return [whole, *(exit_of(whole, score) for score in exits_of(record))]


def _not_found(jobs: JobStore, name: str) -> ModelNotFound:
    names = jobs.model_names(_MOST_COMPARED)
    names += sorted({model.partition(":")[0] for model in names} | jobs.aliases.all().keys())
    return ModelNotFound(name, tuple(names))


def _is_served(jobs: JobStore, name: str) -> bool:
    try:
        _find(jobs, name, None)
    except (ModelNotFound, InvalidJob):
        return False
    return True


def _key(model: dict[str, str], job: str | None) -> ModelKey:
    spec = ModelSpec.model_validate(model)
    return ModelKey(spec.weights, spec.dtype, job)
