"""Pools on a Ray cluster of this process alone, for as long as a block runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from chainfed_ray.activity import Listener, Note, no_listener
from chainfed_ray.client.pool import ClientPool, MakePool
from chainfed_ray.cluster.local_ray import local_ray
from chainfed_ray.cluster.pool.ray_watch import watching_ray
from chainfed_ray.cluster.storage import Settings
from chainfed_ray.model.source import ModelSource


@contextmanager
def on_local_ray(
    settings: Settings,
    listen: Listener = no_listener,
    memories: Sequence[int] = (),
    embedded: bool = True,
    failed: Callable[[str], None] | None = None,
) -> Iterator[MakePool]:
    """Give what makes a ``RayPool``. It starts Ray when it is first called, so that a job that cannot run starts nothing.

    Nothing may have imported Ray before (see ``local_ray``). ``memories`` are those of the job's classes of clients, in bytes:
    one that this machine can never give is an ``InvalidJob``. With ``embedded`` Ray's processes import modules beside this
    program, such as that of an objective, and standard output is left alone. If Ray hangs, or ends, ``failed`` is told once, in
    words, in a thread of its own.
    """
    with ExitStack() as until_done:
        started = False

        def make(source: ModelSource, note: Note) -> ClientPool:
            nonlocal started
            if not started:
                if failed:
                    until_done.enter_context(watching_ray(failed, partial(local_ray, settings, {}, listen, embedded)))
                else:
                    until_done.enter_context(local_ray(settings, {}, listen, embedded))
                started = True
            from chainfed_ray.cluster.pool.placement import check_memories
            from chainfed_ray.cluster.pool.ray_pool import RayPool

            check_memories(memories)
            return RayPool(source, settings.client_slots, note)

        yield make
