"""Clients as a model of their time, memory and failure: a pool that answers at once, so that only the coordinator works."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter, process_time

import numpy as np
import torch

from chainfed_ray.client.messages import Client, Training, TurnOrder, Update
from chainfed_ray.client.objective import trained_names
from chainfed_ray.client.pool import ClientPool, Failure, Foresee, Outcome
from chainfed_ray.device.peak import status
from chainfed_ray.seeds import derive

_SECONDS, _SPREAD = 20.0, 0.5  # a turn's median, and the deviation of its logarithm
_FAILED, _EXCEEDED = 0.02, 0.005  # the shares of turns that fail, and that take more memory than their plan
_LEAST_PEAK = 0.7  # of a plan


class ModelledPool:
    """A ``ClientPool`` without clients. A turn takes log-normal seconds, and turns answer in the order in which they end.

    Some fail, some exceed their plan, and the others send the tensors of their window with a small change. ``cpu_seconds`` is
    what all this took here: it is the clients' part of the benchmark, not the coordinator's.
    """

    def __init__(self) -> None:
        self.cpu_seconds = 0.0

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``."""
        assert isinstance(order, Training), "nothing else is modelled"
        began = process_time()
        first = clients[0].name if clients else ""
        random = np.random.default_rng(derive(order.seed, "modelled", len(clients), first))
        seconds = random.lognormal(np.log(_SECONDS), _SPREAD, len(clients))
        fate, peaks, sizes = (
            random.random(len(clients)),
            random.uniform(_LEAST_PEAK, 1, len(clients)),
            random.random(len(clients)),
        )
        change = {name: torch.full_like(tensor, 1e-3) for name, tensor in order.tensors.items()}
        for place in np.argsort(seconds).tolist():
            client = clients[place]
            if fate[place] < _EXCEEDED:
                outcome = Outcome(place, Failure("BudgetExceeded: modelled", exceeded=True))
            elif fate[place] < _EXCEEDED + _FAILED:
                outcome = Outcome(place, Failure("its process died (modelled)"))
            else:
                names = trained_names(order.tensors, client.plan.window, order.global_weight, order.global_trains)
                size = float(sizes[place])
                tensors = {name: torch.add(order.tensors[name], change[name], alpha=size) for name in names}
                peak = int(client.plan.planned_bytes * peaks[place])
                taken = float(seconds[place]) / client.speed
                outcome = Outcome(place, Update(tensors, len(client.examples), 1.0, 1, taken, taken, peak))
                del tensors
            self.cpu_seconds += process_time() - began
            yield outcome
            del outcome
            began = process_time()
        self.cpu_seconds += process_time() - began

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""

    def close(self) -> None:
        """Do nothing: the pool holds nothing."""


@dataclass
class RoundSeen:
    """A round as it is seen from the pool: turns, CPU seconds until the next order, seconds until it, and the peak in bytes.

    ``stored_bytes`` went through the object store.
    """

    turns: int
    cpu_seconds: float = 0.0
    to_next_order: float = 0.0
    peak_bytes: int = 0
    stored_bytes: int = 0


@dataclass
class MeteredPool:
    """Another pool, in which it is measured what the coordinator does between one order and the next.

    ``store`` tells how many bytes have gone through the object store so far.
    """

    pool: ClientPool
    store: Callable[[], int] | None = None
    rounds: list[RoundSeen] = field(default_factory=list)
    _order: TurnOrder | None = None
    _began: float = 0.0
    _answered: float = 0.0
    _stored: int = 0
    _metering: float = 0.0  # CPU seconds of the meter itself

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """See ``ClientPool``. Second turns belong to the round of the first ones."""
        if order is not self._order:
            self.end_round()
            self._stored = self._stored_so_far()
            self._order, self._began = order, self._cpu()
            self.rounds.append(RoundSeen(0))
        self.rounds[-1].turns += len(clients)
        for outcome in self.pool.run(clients, order, deadline):
            self._answered = perf_counter()
            yield outcome
            del outcome
            self._look()

    def end_round(self) -> None:
        """The next order is there, or there is none: note what the round took."""
        if self._order is not None:
            seen = self.rounds[-1]
            seen.cpu_seconds = self._cpu() - self._began
            seen.to_next_order = perf_counter() - self._answered
            seen.stored_bytes = self._stored_so_far() - self._stored
            self._look()
        self._order = None

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self.pool.expect(foresee)

    def close(self) -> None:
        """See ``ClientPool``."""
        self.pool.close()

    def _look(self) -> None:
        """Note how much is resident. The kernel's own mark is of no use: an evaluation resets it to measure itself."""
        began = process_time()
        seen = self.rounds[-1]
        seen.peak_bytes = max(seen.peak_bytes, status("VmRSS"))
        self._metering += process_time() - began

    def _stored_so_far(self) -> int:
        began = process_time()
        stored = self.store() if self.store else 0
        self._metering += process_time() - began
        return stored

    def _cpu(self) -> float:
        """The CPU seconds of this process so far, without those of modelled clients and of the meter."""
        modelled = self.pool.cpu_seconds if isinstance(self.pool, ModelledPool) else 0.0
        return process_time() - modelled - self._metering
