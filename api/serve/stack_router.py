"""Sends requests for one stack to the same replica, so that each replica holds a part of the stacks and loads each once."""

from hashlib import blake2b
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from chainfed_ray.serving.messages import ModelKey, Question


class StackRouter(RequestRouter):  # type: ignore[misc]  # Ray's class has no types
    """Orders the replicas by a hash of the stack and the replica (rendezvous hashing: Thaler and Ravishankar, 1998).

    A request goes to the first replica that takes one. So a stack that is asked for much is also answered by the next ones, and
    where a replica comes or goes, only its own stacks move.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Each replica as a rank of its own, the first choice first."""
        model = _model_of(pending_request)
        return [[replica] for replica in sorted(candidate_replicas, key=lambda replica: _place(model, replica))]


def _model_of(request: PendingRequest | None) -> str:
    """What the model of a request is known by: its job, whatever the round, or the base model alone.

    Of several questions it is the first one's.
    """
    given: Any = request.args[0] if request and request.args else None
    if isinstance(given, list) and given and isinstance(given[0], Question):
        given = given[0].model
    return str(given.job or given.base) if isinstance(given, ModelKey) else ""


def _place(model: str, replica: RunningReplica) -> bytes:
    return blake2b(f"{model} {replica.replica_id.unique_id}".encode(), digest_size=8).digest()
