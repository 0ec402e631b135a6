"""The Ray Serve application of the service: one deployment for the routes, one for inference."""

from collections.abc import AsyncGenerator, Mapping
from functools import partial
from threading import Thread
from typing import Any

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from ray import serve
from ray.serve.handle import DeploymentHandle

from chainfed_ray.api.rest.service import Service, listed_in
from chainfed_ray.api.serve.access import AccessRules
from chainfed_ray.api.serve.app import create_app
from chainfed_ray.api.serve.asking import Together, shared, written
from chainfed_ray.api.serve.inference import Inference
from chainfed_ray.cluster.access.audit import AuditLog
from chainfed_ray.cluster.access.first_answers import FirstAnswers
from chainfed_ray.cluster.access.keyring import KeyRing
from chainfed_ray.cluster.access.keys import KeyStore
from chainfed_ray.cluster.access.rates import Rates
from chainfed_ray.cluster.draining import Drain
from chainfed_ray.cluster.files.uploads import UploadStore
from chainfed_ray.cluster.jobs.coordinators import ensure_controller, keep_controller_answering
from chainfed_ray.cluster.jobs.preflight import Preflight
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.local_ray import hear_at_own_address
from chainfed_ray.cluster.resources import api_options, inference_options
from chainfed_ray.cluster.sites.mailbox import Mailbox
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.cluster.structured_logs import log_as_asked
from chainfed_ray.cluster.tracing import begin_tracing, carried, check_tracing, flush, trace_requests
from chainfed_ray.errors import PartUnavailable
from chainfed_ray.serving.messages import Embedding, ModelKey, Piece, Prompt, Question, Sampling

_AT_ONCE = 16  # requests that a process with models answers together; more are a reason for another process
_IDLE_SECONDS = 600  # without a request, until the last such process ends, where none need be there
_RETRY_SECONDS = 60  # until a request may find the service started again
_NO_ROOM = "s to be scheduled"  # what Ray Serve says of a process that no machine has had room for in half a minute


@serve.deployment(
    name="Api",
    num_replicas=2,  # requests go to the other one while Serve makes one again
    ray_actor_options=api_options(),
    max_ongoing_requests=1000,
    health_check_period_s=1,  # a replica that is gone is noticed as soon
    health_check_timeout_s=10,  # one that hangs is noticed after three of them, and another made; a busy machine takes seconds
)
@serve.ingress()
class Api:
    """Serves the routes. Each replica makes sure that the cluster has a controller of jobs."""

    def __init__(self, settings: Settings, inference: DeploymentHandle[Any]) -> None:
        log_as_asked()
        hear_at_own_address()
        begin_tracing()
        self._settings, self._inference = settings, inference
        self._writing: Any = inference.options(stream=True)
        is_one = settings.serving_replicas == 1  # of several, each question goes to the one that has its stack
        # Where a process is there all the time, Serve makes it anew, and has its own time for that.
        self._check = None if settings.least_serving_replicas else shared(check_start)
        self._classifying = Together(lambda questions: inference.classify.remote(questions), is_one, self._check)
        self._embedding = Together(lambda questions: inference.embed.remote(questions), is_one, self._check)
        self._store = JobStore(settings.storage.database, existing=True)
        self._keys = KeyStore(settings.storage.database, existing=True)
        self._audit = AuditLog(settings.storage.database, existing=True)
        self._answers = FirstAnswers(settings.storage.database, existing=True)
        self._uploads = UploadStore(settings.storage)
        self._preflight = Preflight(
            settings.client_slots,
            rules=settings.reading,
            uploads=self._uploads.files,
            near=settings.storage.url is not None,
        )
        self._preflight.prepare()
        ensure_controller(settings)
        Thread(target=keep_controller_answering, daemon=True).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        parts = {"database": self._database, "storage": self._storage, "controller": self._controller}
        settings, storage = self._settings, self._settings.storage
        # Where none need be there, to ask one would make one.
        parts["inference"] = self._check or self._inference_alive
        service = Service(
            store=self._store,
            check=self._preflight.check,
            plan=self._preflight.plan,
            classify=self._classify,
            embed=self._embed,
            write=self._write,
            parts=parts,
            clients=listed_in(storage.committed),
            sites=Mailbox(storage),
            audit=self._audit,
            most_queued=settings.queued_jobs,
            uploads=self._uploads,
            upload_bytes=settings.upload_bytes,
            stored_bytes=settings.stored_bytes,
            folder_of=partial(storage.committed, at_once=True),
            most_uploads=settings.most_uploads,
            most_aliases=settings.most_aliases,
            drains=Drain(storage.root).has_begun,
            client_memory=settings.client_memory,
            client_slots=settings.client_slots,
        )
        rates = Rates(settings.requests_per_minute)
        access = AccessRules(KeyRing(self._keys), settings.without_keys, rates, self._audit)
        app = create_app(service, settings.allowed_hosts, access, self._answers, service.drains)
        trace_requests(app)
        return app

    def __del__(self) -> None:
        """Export the last spans. Serve calls this when everybody was answered."""
        flush()

    async def _classify(self, model: ModelKey, texts: list[str]) -> list[list[float]]:
        probabilities: list[list[float]] = await self._classifying.answer(Question(model, texts, carried()))
        return probabilities

    async def _embed(self, model: ModelKey, texts: list[str]) -> list[Embedding]:
        embeddings: list[Embedding] = await self._embedding.answer(Question(model, texts, carried()))
        return embeddings

    def _write(
        self, model: ModelKey, prompt: Prompt, sampling: Sampling, in_pieces: bool
    ) -> AsyncGenerator[Piece, None]:
        asked = carried()
        return written(lambda: self._writing.write.remote(model, prompt, sampling, in_pieces, asked), self._check)

    async def _database(self) -> None:
        await run_in_threadpool(self._store.check)

    async def _storage(self) -> None:
        await run_in_threadpool(self._settings.storage.check)

    async def _controller(self) -> None:
        await ensure_controller(self._settings).ping.remote()

    async def _inference_alive(self) -> None:
        await self._inference.alive.remote()


async def check_start() -> None:
    """Check that processes with models can start, where none need be there.

    Raises:
        PartUnavailable: none runs, and no machine has had room for one for half a minute. Or the last one did not start, try
            after try. If none ever did, Ray Serve tries no more.
    """
    application = serve.get_replica_context().app_name
    found = (await run_in_threadpool(serve.status)).applications[application].deployments["Inference"]
    # One that ends may still answer. The names of states are strings, whatever the type says.
    if any(count for state, count in found.replica_states.items() if state != "STARTING"):
        return
    if found.status_trigger.name == "REPLICA_STARTUP_FAILED":
        reason = (
            "cannot start; its log says why. If it never has, it is tried again only when the service is started again"
        )
        raise PartUnavailable("the process of the models", reason, _RETRY_SECONDS)
    if _NO_ROOM in found.message:
        reason = (
            "waits for a machine with as much free memory as CHAINFED_SERVING_MEMORY; clients that train may hold it"
        )
        raise PartUnavailable("the process of the models", reason, _RETRY_SECONDS)


def build(arguments: Mapping[str, str]) -> serve.Application:
    """Build the Serve application, for ``import_path: chainfed_ray.api.serve.deployment:build``.

    The settings come from the environment; Serve requires ``arguments``, and nothing in them is used.
    """
    settings = Settings.from_environment()
    check_tracing()
    JobStore(
        settings.storage.database
    ).close()  # makes the tables; a replica that starts later does not make a lost file anew
    api: Any = Api  # serve.deployment adds `bind`, which the types do not show
    inference: Any = Inference
    # Whoever was let in is answered, as long as that takes no longer than the service may take to end.
    ending = {"graceful_shutdown_timeout_s": settings.grace_seconds, "graceful_shutdown_wait_loop_s": 0.5}
    api = api.options(**ending)
    inference = inference.options(ray_actor_options=inference_options(settings.serving_bytes), **ending)
    if settings.serving_replicas > 1 or not settings.least_serving_replicas:
        scaling = {
            "min_replicas": settings.least_serving_replicas,
            "max_replicas": settings.serving_replicas,
            "target_ongoing_requests": _AT_ONCE,
            "downscale_to_zero_delay_s": _IDLE_SECONDS,
        }
        inference = inference.options(autoscaling_config=scaling)
    application: serve.Application = api.bind(settings, inference.bind(settings))
    return application
