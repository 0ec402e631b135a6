"""Why a site did not carry out an order, in words."""

from chainfed_ray.units import format_bytes, format_seconds
from chainfed_ray.wire.envelope import NotDone


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
