"""Runs coordinators and the controller as Ray actors, detached and named.

They outlive the process that made them, and Ray starts them again when they are killed.
"""

import logging
import os
from collections.abc import Collection, Sequence
from contextlib import closing, suppress
from functools import partial
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, NamedTuple

import ray
from ray._private.state import actors  # the public one needs a dashboard

from chainfed_ray.cluster.database import NO_ANSWER
from chainfed_ray.cluster.files.upload_bytes import upload_files
from chainfed_ray.cluster.files.upload_expiry import remove_old_uploads
from chainfed_ray.cluster.jobs.cleanup import has_died_too_often
from chainfed_ray.cluster.jobs.controller import Controller
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.occupancy import is_free
from chainfed_ray.cluster.resources import controller_options, coordinator_options
from chainfed_ray.cluster.scratch import Occupants, delete_everywhere, on_every_machine
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.cluster.structured_logs import log_as_asked
from chainfed_ray.cluster.tracing import begin_tracing
from chainfed_ray.records.states import AT_WORK

NAMESPACE = "chainfed"
_CONTROLLER, _COORDINATOR = "controller", "coordinator-"
_RETRY_SECONDS = 5.0  # until a database is asked again
_ASK_SECONDS = 10.0  # between two questions to an actor whether it answers
_SILENCE_SECONDS = 300.0  # without an answer of a coordinator, which may compute something long
_SILENCE_OF_CONTROLLER_SECONDS = 120.0
_log = logging.getLogger(__name__)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class CoordinatorActor:
    """A process that runs one job. If it is killed, Ray starts it again, and it resumes from the job's commits."""

    def __init__(self, job: str, settings: Settings) -> None:
        log_as_asked()
        # A process in place of one that died counts that first: whatever of the job comes next may be what kills it.
        if ray.get_runtime_context().was_current_actor_reconstructed and _is_given_up(job, settings):
            return
        # The work runs in a thread, not in a method: after a restart by Ray, no caller may be left to call a method.
        Thread(target=self._run, args=(job, settings), daemon=True).start()

    def ping(self) -> int:
        """The id of this process."""
        return os.getpid()

    def _run(self, job: str, settings: Settings) -> None:
        # The coordinator alone needs torch. The controller and the API import this file too, and start sooner without.
        from chainfed_ray.device.lean_imports import load_models

        load_models()
        from chainfed_ray.cluster.jobs.run import publish_unmet, run_queued_job
        from chainfed_ray.cluster.offload.door import make_disk_evaluator
        from chainfed_ray.cluster.pool.ray_pool import RayPool
        from chainfed_ray.cluster.sites.desk import Desk
        from chainfed_ray.federation.evaluation import server_evaluation

        desk, tell = Desk(job, settings.storage), partial(publish_unmet, job, settings.storage)
        try:
            begin_tracing()
            run_queued_job(
                job,
                settings.storage,
                lambda source, note: RayPool(
                    source,
                    settings.client_slots,
                    note,
                    at_site=desk.lease,
                    tell=tell,
                ),
                partial(server_evaluation, on_disk=make_disk_evaluator),
                desk,
                rules=settings.reading,
            )
        except Exception:
            _log.exception("the coordinator of job %s failed before the job was over; Ray starts it again", job)
            os._exit(1)


def _is_given_up(job: str, settings: Settings) -> bool:
    """Count a death of the job's coordinator, if it is at work. True if it has failed of that.

    It waits for the database and the storage.
    """
    while True:
        try:
            with closing(JobStore(settings.storage.database, existing=True)) as store:
                at_work = store.states([job]).get(job) in AT_WORK
                return at_work and has_died_too_often(job, store, settings.storage)
        except (*NO_ANSWER, OSError) as error:
            _log.warning("the database or the storage does not answer (%s); job %s waits for it", error, job)
            sleep(_RETRY_SECONDS)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class ControllerActor:
    """The process of the cluster's one controller."""

    def __init__(self, settings: Settings) -> None:
        log_as_asked()
        Thread(target=self._run, args=(settings,), daemon=True).start()
        unused = partial(_drop_unused_everywhere, settings.storage)
        Thread(target=remove_old_uploads, args=(settings.storage, Event(), unused), daemon=True).start()

    def ping(self) -> int:
        """The id of this process."""
        return os.getpid()

    def _run(self, settings: Settings) -> None:
        try:
            Controller(settings, JobStore(settings.storage.database, existing=True), RayCoordinators(settings)).run(
                Event()
            )
        except Exception:
            _log.exception("the controller failed; Ray starts it again")
            os._exit(1)


def _drop_unused_everywhere(storage: Storage) -> None:
    if storage.url:  # or there is one folder, of which nothing may be lost
        on_every_machine(_drop_unused_uploads, storage)


@ray.remote(num_cpus=0, max_retries=0)
def _drop_unused_uploads(storage: Storage) -> None:
    upload_files(storage).drop_unused()


class _Asked(NamedTuple):
    actor: Any
    answer: Any
    at: float


class Silence:
    """Kills actors that hang, so that Ray starts them again: Ray itself notices only processes that have ended.

    An actor hangs if Ray has made it, and it does not answer for ``seconds``.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._asked: dict[str, _Asked] = {}

    def look(self, names: Collection[str]) -> None:
        """Ask the actors called ``names`` whether they answer, and kill those that hang. It waits for no answer."""
        for gone in self._asked.keys() - set(names):
            del self._asked[gone]
        for name in names:
            asked = self._asked.get(name)
            if asked is None:
                with suppress(ValueError):  # it has ended since
                    actor: Any = ray.get_actor(name, NAMESPACE)
                    self._asked[name] = _Asked(actor, actor.ping.options(max_task_retries=0).remote(), monotonic())
                continue
            waited = monotonic() - asked.at
            if ray.wait([asked.answer], timeout=0)[0]:  # or its process has ended, which Ray has noticed
                if waited > _ASK_SECONDS:
                    del self._asked[name]
            elif waited > self._seconds:
                del self._asked[name]
                if actors(asked.actor._actor_id.hex()).get("State") == "ALIVE":  # others wait for a machine
                    _log.error("%s has not answered for %g s, and is started again", name, waited)
                    ray.kill(asked.actor, no_restart=False)


class RayCoordinators:
    """See ``Coordinators``; each is a detached actor, named after its job. One that hangs is started again."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._occupants, self._silence = settings, Occupants(), Silence(_SILENCE_SECONDS)

    def alive(self) -> set[str]:
        """The ids of the jobs that have a coordinator, even if it still waits for a machine with room."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        coordinators = [name for name in names if name.startswith(_COORDINATOR)]
        self._silence.look(coordinators)
        return {name.removeprefix(_COORDINATOR) for name in coordinators}

    def ensure(self, job: str) -> None:
        """Start a coordinator for ``job``, unless it has one."""
        self._occupants.forget(self._settings.storage.job(job))
        actor_class: Any = CoordinatorActor  # ray.remote adds `options`, which the type does not show
        actor_class.options(
            name=_COORDINATOR + job,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            **coordinator_options(),
        ).remote(job, self._settings)

    def end(self, job: str) -> bool:
        """End the coordinator of ``job``. Ray then ends the actors of its clients, because the coordinator made them."""
        with suppress(ValueError):  # there is none, or it has ended
            ray.kill(ray.get_actor(_COORDINATOR + job, NAMESPACE))
        folder = self._settings.storage.job(job)
        # Machines that share no folder are each asked: a process that goes on might put anew what is deleted in the store.
        return self._occupants.are_gone(folder) if self._settings.storage.url else is_free(folder)

    def clear_copies(self, jobs: Sequence[str]) -> None:
        """See ``Coordinators``."""
        if self._settings.storage.url:
            delete_everywhere([self._settings.storage.copies(job) for job in jobs])

    def clear_scratch(self, jobs: Sequence[str]) -> None:
        """See ``Coordinators``."""
        delete_everywhere([self._settings.storage.scratch(job) for job in jobs])


def ensure_controller(settings: Settings) -> Any:
    """The actor of the cluster's controller. It is started if there is none."""
    actor_class: Any = ControllerActor
    return actor_class.options(
        name=_CONTROLLER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, **controller_options()
    ).remote(settings)


def keep_controller_answering() -> None:
    """Look for ever whether the controller hangs. Each process of the API does so."""
    silence = Silence(_SILENCE_OF_CONTROLLER_SECONDS)
    while True:
        sleep(_ASK_SECONDS)
        with suppress(Exception):  # Ray does not answer: what watches the service notices that
            silence.look([_CONTROLLER])
