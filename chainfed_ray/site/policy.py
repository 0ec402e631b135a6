"""What a site refuses, whatever the service asks: models, memory, hours, and jobs without privacy."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from chainfed_ray.errors import InvalidJob
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.wire.envelope import NotDone, Order


@dataclass(frozen=True)
class Policy:
    """What the site allows. None allows everything.

    ``models`` are patterns of ``model.base``, such as ``hf:my-org/*``; by default every model but a ``path:`` of this machine.
    ``memory`` is in bytes, of one client. ``hours`` is how long the turns of one job may take in all. ``epsilon`` is the most
    that a job's privacy may have; without privacy a job is then refused.
    """

    models: tuple[str, ...] | None = None
    memory: int | None = None
    hours: float | None = None
    epsilon: float | None = None

    def refusal(self, order: Order, document: Mapping[str, Any], worked: float) -> NotDone | None:
        """The answer that refuses ``order``, or None.

        Its job has this ``document``, and turns of it have ``worked`` so many seconds at this site.
        """
        try:
            spec = parse_job(dict(document))
        except InvalidJob as error:
            return NotDone.about("job", error.problems[0].field)
        # A folder of this machine is not for a job to name, unless the site's owner names it.
        allowed = self.models if self.models is not None else ("builtin:*", "hf:*")
        if not any(fnmatchcase(spec.model.base, pattern) for pattern in allowed):
            return NotDone(reason="refused", key="model.base")
        if self.memory is not None and (asked := _memory(spec, order)) > self.memory:
            return NotDone(reason="refused", key="fleet.clients.memory", numbers=(asked, self.memory))
        if too_long := self.too_long(worked):
            return too_long
        asked_epsilon = spec.privacy.epsilon if spec.privacy else None
        if self.epsilon is not None and (asked_epsilon is None or asked_epsilon > self.epsilon):
            given = () if asked_epsilon is None else (asked_epsilon,)
            return NotDone(reason="refused", key="privacy.epsilon", numbers=(self.epsilon, *given))
        return None

    def too_long(self, worked: float) -> NotDone | None:
        """The answer if the turns of a job, which have ``worked`` so many seconds, take longer than is allowed; else None."""
        if self.hours is None or worked <= 3600 * self.hours:
            return None
        return NotDone(reason="refused", key="hours", numbers=(worked, self.hours))


def _memory(spec: JobSpec, order: Order) -> int:
    """The memory in bytes that the order may use: what it says itself, and what its class of clients says."""
    client: Mapping[str, Any] = order.content.get("client", {})
    of_class = order.content.get("client_class", client.get("client_class"))
    declared = [group.memory for group in spec.fleet.clients if group.name == of_class]
    return max([*declared, int(client.get("cap_bytes", 0)), int(client.get("budget_bytes", 0))], default=0)
