"""The state that a round hands to the next.

The state is committed with the round's record, so that a coordinator that was killed continues from it.
"""

from typing import NamedTuple, Self

from chainfed_ray.aggregation.server_optimizer import ServerOptimizer
from chainfed_ray.federation.stages import Movement
from chainfed_ray.model.adapters import AdapterStack, Tensors
from chainfed_ray.spec.sections import AggregationSpec

_STACK, _MOVEMENT, _SERVER, _BEST = "stack/", "movement/", "server/", "best/"


class ChainState(NamedTuple):
    """The stack, how far the window has moved, and the server's optimizer.

    ``best`` has the tensors that the stage trains, with the values that they had when the stage's early exit had its least
    held-out loss. It is empty before the stage's first evaluation.
    """

    stack: AdapterStack
    movement: Movement
    server: ServerOptimizer
    best: Tensors

    @classmethod
    def new(cls, stack: AdapterStack, spec: AggregationSpec) -> Self:
        """The state before the first round."""
        return cls(stack, Movement(), ServerOptimizer(spec), {})

    @classmethod
    def of(cls, tensors: Tensors, spec: AggregationSpec) -> Self:
        """The state of a commit's ``tensors``, the inverse of the method ``tensors``."""
        server = ServerOptimizer(spec, _below(tensors, _SERVER))
        return cls(stack_of(tensors), Movement(_below(tensors, _MOVEMENT)), server, _below(tensors, _BEST))

    def tensors(self) -> Tensors:
        """All tensors of the state, by name, as they are committed."""
        parts = {
            _STACK: self.stack.tensors(),
            _MOVEMENT: self.movement.tensors,
            _SERVER: self.server.tensors,
            _BEST: self.best,
        }
        return {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.items()}


def stack_of(tensors: Tensors) -> AdapterStack:
    """The stack alone, from the tensors of a commit."""
    return AdapterStack.from_tensors(_below(tensors, _STACK))


def _below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin with ``prefix``, named without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
