"""The Ray actor that runs clients' turns. It only forwards to ``client.turn``, which computes them.

Turns run in one thread of the process, in which ``prepare`` runs before: libraries keep buffers for each thread. Another thread
answers how far the turn is.
"""

import logging
from collections.abc import Mapping
from typing import Any

import ray

from chainfed_ray.client.messages import Client, TurnResult
from chainfed_ray.client.progress import Progress, progress
from chainfed_ray.client.turn import ready, slowed, take_turn
from chainfed_ray.cluster.occupancy import occupy
from chainfed_ray.cluster.pool.orders import receive
from chainfed_ray.cluster.structured_logs import about, log_as_asked
from chainfed_ray.errors import BudgetExceeded
from chainfed_ray.model.source import ModelSource

_log = logging.getLogger(__name__)


def turn_of(client: Client, order: Any, base: ModelSource, told: Mapping[str, str | int]) -> TurnResult:
    """Run a turn, limited to the client's memory budget and slowed to the speed of its machine.

    Lines that are logged meanwhile are about the client, and about what is ``told``, such as the job and the round. One says
    what went wrong in a turn; to the coordinator goes an error alone. ``order`` is Ray's reference to what is to do.
    """
    with about(**told, client=client.name), slowed(client.speed):
        try:
            return take_turn(client, base, lambda: receive(order), capped=True)
        except BudgetExceeded as error:  # the coordinator has a second plan
            _log.info("%s", error)
            raise
        except Exception:
            _log.warning("the turn failed", exc_info=True)
            raise


@ray.remote(concurrency_groups={"asked": 1})  # type: ignore[call-overload]  # its types lack this option
class ClientActor:
    """A process that runs turns for one client at a time, all of one budget class. It keeps nothing between turns."""

    def __init__(self, base: ModelSource) -> None:
        log_as_asked()
        self._base = base
        self._lock = occupy(base.scratch)  # as long as this process lives, it may write there

    def prepare(self) -> None:
        """Get ready for turns: once, before the first."""
        ready(self._base)

    @ray.method(concurrency_group="asked")
    def node(self) -> str:
        """Ray's id of the machine where this process runs."""
        where: str = ray.get_runtime_context().get_node_id()
        return where

    @ray.method(concurrency_group="asked")
    def progress(self) -> Progress:
        """How far the turn is that runs now."""
        return progress()

    def take_turn(self, client: Client, order: list[Any], told: Mapping[str, str | int]) -> TurnResult:
        """Run a turn for ``client``. See ``turn_of``.

        ``order`` is a list with a reference. Ray would fetch a bare reference before the call; in a list, it is fetched within
        the turn, whose memory it belongs to.
        """
        return turn_of(client, order[0], self._base, told)
