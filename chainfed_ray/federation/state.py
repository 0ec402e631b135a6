"""What a round hands to the next: it is committed with the round's record, so that a restart goes on where it was."""

from typing import NamedTuple, Self

from chainfed_ray.aggregation.server_optimizer import ServerOptimizer
from chainfed_ray.federation.stages import Movement
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.spec.sections import AggregationSpec

_STACK, _MOVEMENT, _SERVER, _BEST = "stack/", "movement/", "server/", "best/"


class ChainState(NamedTuple):
    """The stack, how far the window moved, and the server's optimizer.

    ``best`` are the tensors that the stage trains, as they were where its exit had the least held-out loss; none if it was
    not judged yet.
    """

    stack: AdapterStack
    movement: Movement
    server: ServerOptimizer
    best: Tensors

    @classmethod
    def new(cls, stack: AdapterStack, spec: AggregationSpec) -> Self:
        """Before the first round."""
        return cls(stack, Movement(), ServerOptimizer(spec), {})

    @classmethod
    def of(cls, tensors: Tensors, spec: AggregationSpec) -> Self:
        """From the tensors that were committed."""
        server = ServerOptimizer(spec, _below(tensors, _SERVER))
        return cls(stack_of(tensors), Movement(_below(tensors, _MOVEMENT)), server, _below(tensors, _BEST))

    def tensors(self) -> Tensors:
        """All of it, by name."""
        parts = {
            _STACK: self.stack.tensors(),
            _MOVEMENT: self.movement.tensors,
            _SERVER: self.server.tensors,
            _BEST: self.best,
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def stack_of(tensors: Tensors) -> AdapterStack:
    """The stack alone, from the tensors that were committed."""
    return AdapterStack.from_tensors(_below(tensors, _STACK))


def _below(tensors: Tensors, prefix: str) -> Tensors:
    """Those whose names begin with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
