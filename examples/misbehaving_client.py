"""A client that misbehaves: a pool of your own reverses the updates of one client, and the median withstands them.

Run it with ``python -m examples.misbehaving_client``, from a checkout.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from chainfed_ray.activity import Note
from chainfed_ray.aggregation.robust import median
from chainfed_ray.client.messages import Client, Training, TurnOrder, Update
from chainfed_ray.client.pool import ClientPool, Foresee, LocalPool, Outcome
from chainfed_ray.federation.run import run_job
from chainfed_ray.model.source import ModelSource
from examples.own_job import a_job


class Reversing:
    """A pool in which the client called ``name`` sends the opposite of its update, ten times as large."""

    def __init__(self, pool: ClientPool, name: str) -> None:
        self._pool, self._name = pool, name

    def run(self, clients: Sequence[Client], order: TurnOrder, deadline: float) -> Iterator[Outcome]:
        """Run the turns in the other pool, and alter one client's updates (see ``ClientPool``)."""
        for place, result in self._pool.run(clients, order, deadline):
            if clients[place].name == self._name and isinstance(result, Update) and isinstance(order, Training):
                tensors = {
                    name: order.tensors[name] - 10 * (tensor - order.tensors[name])
                    for name, tensor in result.tensors.items()
                }
                result = replace(result, tensors=tensors)
            yield Outcome(place, result)

    def expect(self, foresee: Foresee) -> None:
        """See ``ClientPool``."""
        self._pool.expect(foresee)

    def close(self) -> None:
        """Close the other pool."""
        self._pool.close()


def with_a_liar(source: ModelSource, note: Note) -> ClientPool:
    """A pool in this process in which the client phone-0 misbehaves."""
    return Reversing(LocalPool(source), "phone-0")


if __name__ == "__main__":
    # A fitted head is made of plain sums, which one client can spoil. So the head starts at zero.
    job = a_job("misbehaving", chain={"head": "zero", "start": 4})
    for record in run_job(job, Path("chainfed-python/misbehaving"), pool=with_a_liar, aggregation=median):
        print(record, flush=True)
