"""Coordinators and the controller as detached, named Ray actors: they outlive whoever made them, and come back when killed."""

import logging
import os
from threading import Event, Thread
from typing import Any

import ray

from chainfed_ray.cluster.jobs.controller import Controller
from chainfed_ray.cluster.jobs.run import run_job
from chainfed_ray.cluster.jobs.store import JobStore
from chainfed_ray.cluster.offload.engine import server_evaluation
from chainfed_ray.cluster.pool.ray_pool import RayPool
from chainfed_ray.cluster.resources import of_controller, of_coordinator
from chainfed_ray.cluster.storage import Settings

NAMESPACE = "chainfed"
_CONTROLLER, _COORDINATOR = "controller", "coordinator-"
_log = logging.getLogger(__name__)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class CoordinatorActor:
    """A process that runs one job. Killed, it is made again by Ray, and goes on from the job's commits."""

    def __init__(self, job: str, settings: Settings) -> None:
        # A thread, and not a method that somebody calls: nobody need be alive for it to go on after a restart.
        Thread(target=self._run, args=(job, settings), daemon=True).start()

    def ping(self) -> int:
        """The id of this process."""
        return os.getpid()

    def _run(self, job: str, settings: Settings) -> None:
        try:
            run_job(
                job,
                settings.storage,
                lambda made, note: RayPool(made.base, settings.client_slots, note),
                server_evaluation,
            )
        except Exception:
            _log.exception("the coordinator of %s ends without a verdict; Ray starts it again", job)
            os._exit(1)


@ray.remote(max_restarts=-1, max_task_retries=-1)
class ControllerActor:
    """The process of the cluster's one controller."""

    def __init__(self, settings: Settings) -> None:
        Thread(target=self._run, args=(settings,), daemon=True).start()

    def ping(self) -> int:
        """The id of this process."""
        return os.getpid()

    def _run(self, settings: Settings) -> None:
        try:
            Controller(settings, JobStore(settings.storage.database), RayCoordinators(settings)).run(Event())
        except Exception:
            _log.exception("the controller ends; Ray starts it again")
            os._exit(1)


class RayCoordinators:
    """Coordinators as detached named actors."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def alive(self) -> set[str]:
        """The jobs that have a coordinator, or will have one as soon as there is room for it."""
        actors = ray.util.list_named_actors(all_namespaces=True)
        names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
        return {name.removeprefix(_COORDINATOR) for name in names if name.startswith(_COORDINATOR)}

    def ensure(self, job: str) -> None:
        """Make a job's coordinator, unless there is one."""
        actor_class: Any = CoordinatorActor  # ray.remote gives it `options`, which its type does not show
        actor_class.options(
            name=_COORDINATOR + job, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, **of_coordinator()
        ).remote(job, self._settings)

    def end(self, job: str) -> None:
        """End a job's coordinator. Ray ends the actors of its clients, since it made them."""
        try:
            actor = ray.get_actor(_COORDINATOR + job, NAMESPACE)
        except ValueError:
            return
        ray.kill(actor)


def ensure_controller(settings: Settings) -> Any:
    """The cluster's controller, made if there is none."""
    actor_class: Any = ControllerActor
    return actor_class.options(
        name=_CONTROLLER, namespace=NAMESPACE, lifetime="detached", get_if_exists=True, **of_controller()
    ).remote(settings)
