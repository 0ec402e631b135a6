"""Whether Ray works on this machine. A process of Ray's that hangs and does not end is noticed by nobody else."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import Event, Lock, Thread, Timer
from time import monotonic

import psutil

from chainfed_ray.units import format_seconds

ASK_SECONDS = 5.0  # between two questions to Ray
_LOOK_SECONDS = 1.0  # between two looks at its processes
PATIENCE_SECONDS = 45.0  # without an answer; Ray itself makes most of its processes again within 15 s
_END_SECONDS = 120.0  # to end; on a busy machine it takes a quarter of a minute
_CORE = ("gcs_server", "raylet")  # Ray's processes that nothing makes again


def core_processes() -> dict[str, int]:
    """The ids of the processes without which the Ray that this process has started ends, by their names."""
    children = psutil.Process().children()
    return {child.name(): child.pid for child in children if child.name() in _CORE}


def hears_of_machine() -> bool:
    """Ask Ray's GCS whether it hears of every machine, whose raylets are processes of their own. It may hang, as Ray does."""
    import ray  # nothing may import it before it is started

    return all(machine["Alive"] for machine in ray.nodes())  # type: ignore[no-untyped-call]


class RayWatch:
    """What is known of Ray: its processes, by the ids in ``core``, and when it has answered."""

    def __init__(self, core: Mapping[str, int]) -> None:
        self._core = dict[str, psutil.Process | None]()
        for name, pid in core.items():
            try:
                self._core[name] = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self._core[name] = None
        self._looked = monotonic()
        self._silent = 0.0
        self._hears_of_machine = True

    def hear(self, hears_of_machine: bool) -> None:
        """Note that Ray has answered, and what."""
        self._hears_of_machine = hears_of_machine
        self._silent = 0.0

    def failure(self) -> str | None:
        """What has failed, if anything has. It is asked each second.

        Time in which it was not asked counts little: this process was stopped, or had no processor, and so it may be with Ray.
        """
        now = monotonic()
        self._silent += min(now - self._looked, 2 * _LOOK_SECONDS)
        self._looked = now
        for name, process in self._core.items():
            if process is None or not runs(process):
                return f"Ray's {name} has ended"
        if not self._hears_of_machine:
            return "Ray's raylet does not answer Ray's GCS"
        return f"Ray has not answered for {format_seconds(self._silent)}" if self._silent > PATIENCE_SECONDS else None


@contextmanager
def watching_ray(tell: Callable[[str], None], start: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let a Ray run while a block runs, which ``start`` starts and ends, and ``tell`` if it fails meanwhile, or does not end.

    ``tell`` is called in a thread of its own: whoever runs the block may wait for Ray, for ever.
    """
    late = Timer(_END_SECONDS, tell, ["Ray does not end"])
    late.daemon = True
    try:
        with start():
            try:
                with _watching(tell):
                    yield
            finally:
                late.start()
    finally:
        late.cancel()


@contextmanager
def _watching(tell: Callable[[str], None]) -> Iterator[None]:
    watch, over, telling = RayWatch(core_processes()), Event(), Lock()

    def ask() -> None:
        while not over.wait(ASK_SECONDS):
            with suppress(Exception):  # Ray's own time for an answer is over
                watch.hear(hears_of_machine())

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            failure = watch.failure()
            with telling:  # what is done by now has not failed
                if failure and not over.is_set():
                    tell(failure)
                    return

    for work in (ask, look):
        Thread(target=work, name="ray watch", daemon=True).start()
    try:
        yield
    finally:
        with telling:
            over.set()


def runs(process: psutil.Process) -> bool:
    """Whether a process runs. One that its parent has not asked for is listed after its end."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
