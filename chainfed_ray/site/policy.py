"""What a site refuses, whatever the service asks: models, memory, hours, and jobs without privacy."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from chainfed_ray.errors import InvalidJob
from chainfed_ray.site.envelope import NotDone, Order
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.spec.parse import parse_job
from chainfed_ray.units import format_bytes, format_seconds


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


def in_words(answer: NotDone) -> str:
    """Why a site did not carry out an order, for the record of the job. All words are ours: a site sends none."""
    numbers = answer.numbers
    match answer.reason, answer.key:
        case "refused", "model.base":
            return "it does not allow this base model"
        case "refused", "fleet.clients.memory" if len(numbers) == 2:
            asked, most = map(int, numbers)
            return f"it gives a client at most {format_bytes(most)}; the job asks for {format_bytes(asked)}"
        case "refused", "hours" if len(numbers) == 2:
            return (
                f"it allows a job {format_seconds(3600 * numbers[1])}; this one has taken {format_seconds(numbers[0])}"
            )
        case "refused", "privacy.epsilon" if len(numbers) == 2:
            return f"it allows an ε of at most {numbers[0]:g}; the job's is {numbers[1]:g}"
        case "refused", "privacy.epsilon" if len(numbers) == 1:
            return f"it takes part only with privacy, and an ε of at most {numbers[0]:g}"
        case "refused", _:
            return "it refuses the job"
        case "job", _:
            return f"its rows do not fit the job's {answer.key or 'keys'}; the log at the site has the details"
        case "classes", _:
            return "it does not tell the names of its labels; list the classes in data.classes"
        case "plan", _:
            return "the order does not fit the job, or the site's own plan for its rows is another one"
        case "changed", _:
            return "its rows have changed since the job began"
        case "model", _:
            return "its copy of the base model is another one"
        case _:
            return f"its process ended with {answer.kind or 'an error'}; the log at the site has the details"
