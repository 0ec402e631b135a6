"""Every error the project raises on purpose.

::

    ChainFedError
    ├── InvalidJob         (ValueError)    a job, or a request, that cannot be accepted: the fields, their values, what would do
    ├── UnsupportedModel   (ValueError)    a base model that cannot be run layer by layer
    ├── InvalidUpdate      (ValueError)    a client's update that must not be averaged (NaN, wrong shape, wrong name)
    ├── BudgetExceeded     (MemoryError)   a client's turn that would have taken more memory than it may
    ├── QuorumLost         (RuntimeError)  too few clients answered, several rounds in a row
    ├── EvaluationFailed   (RuntimeError)  the whole model could not be judged; the job goes on
    ├── OpsNotBuilt        (RuntimeError)  DeepSpeed's libraries could not be compiled
    ├── CorruptCommit      (RuntimeError)  a commit whose bytes are not those that were written
    ├── CoordinatorLost    (RuntimeError)  a coordinator died again and again without finishing a round
    ├── PackageMissing     (ImportError)   a package is not installed that an extra would bring
    ├── InvalidSetting     (ValueError)    an environment variable or option of the service that is wrong
    ├── StorageInUse       (RuntimeError)  another service works on the same storage
    ├── ServiceNotStarted  (RuntimeError)  a service did not come up
    ├── ServiceUnavailable (RuntimeError)  no service answers at the address given
    ├── ServiceFailed      (RuntimeError)  the service answers with an error that is not the caller's
    ├── JobFailed          (RuntimeError)  a job that was followed ended without a model
    ├── JobNotFound        (LookupError)   no such job
    ├── JobConflict        (RuntimeError)  the job is not in a state that allows what was asked
    └── ModelNotFound      (LookupError)   no such served model

Each is also a standard-library error, so that plain Python code may catch it, and each survives pickling, since Ray
carries errors between processes: the arguments of the constructor are the arguments of the exception.
"""

from typing import Any, NamedTuple

from chainfed_ray.units import format_bytes


class ChainFedError(Exception):
    """The root of the tree."""

    def document(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"type": type(self).__name__, "message": str(self)}


class Problem(NamedTuple):
    """One thing wrong with an input: the field's path, the value found there and what would have done."""

    field: str
    value: Any
    expected: str

    def __str__(self) -> str:
        found = "is missing" if self.value is MISSING else f"is {_shown(self.value)}"
        return f"{self.field} {found}; expected {self.expected}"

    def document(self) -> dict[str, str | None]:
        """The problem as JSON; the value in Python's notation, None where it is missing."""
        value = None if self.value is MISSING else _shown(self.value)
        return {"field": self.field, "value": value, "expected": self.expected}

    @classmethod
    def from_document(cls, document: dict[str, Any]) -> "Problem":
        """What ``document()`` was called on, in another process; the value is kept as it was shown."""
        value = document["value"]
        return cls(str(document["field"]), MISSING if value is None else _Shown(value), str(document["expected"]))


class _Shown(str):
    """A value of which only Python's notation is known."""

    def __repr__(self) -> str:
        return str(self)


class _Missing:
    """The value of a field that was not given (a class of its own, since ``None`` is a value)."""

    def __repr__(self) -> str:
        return "(missing)"

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


class InvalidJob(ChainFedError, ValueError):
    """A job or request that cannot be accepted; ``problems`` says why, a field at a time."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    @classmethod
    def at(cls, field: str, value: Any, expected: str) -> "InvalidJob":
        """The common case of a single problem."""
        return cls((Problem(field, value, expected),))

    def document(self) -> dict[str, Any]:
        """The error as JSON, field by field."""
        return super().document() | {"problems": [problem.document() for problem in self.problems]}

    def __str__(self) -> str:
        return "; ".join(str(problem) for problem in self.problems)


class UnsupportedModel(ChainFedError, ValueError):
    """A base model that cannot be run as embed → layers → head."""

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    def __str__(self) -> str:
        return f"{self.model}: {self.reason}"


class InvalidUpdate(ChainFedError, ValueError):
    """A client's update that must not be averaged."""

    def __init__(self, client: str, reason: str) -> None:
        super().__init__(client, reason)
        self.client, self.reason = client, reason

    def __str__(self) -> str:
        return f"update of {self.client} refused: {self.reason}"


class BudgetExceeded(ChainFedError, MemoryError):
    """A turn was stopped at ``cap`` bytes during ``part``, though ``planned`` were said to do.

    ``peak`` is what was measured, where the turn was stopped at its end; None where an allocation was refused.
    """

    def __init__(self, planned: int, cap: int, peak: int | None, part: str) -> None:
        super().__init__(planned, cap, peak, part)
        self.planned, self.cap, self.peak, self.part = planned, cap, peak, part

    def __str__(self) -> str:
        took = "more" if self.peak is None else format_bytes(self.peak)
        return (
            f"it was planned to take {format_bytes(self.planned)}, was allowed {format_bytes(self.cap)}, and would have taken "
            f"{took} while {self.part}"
        )


class QuorumLost(ChainFedError, RuntimeError):
    """Too few clients answered in ``rounds``, which are said in words; ``reasons`` are those of the last, by client."""

    def __init__(self, rounds: str, quorum: int, reasons: dict[str, str]) -> None:
        super().__init__(rounds, quorum, reasons)
        self.rounds, self.quorum, self.reasons = rounds, quorum, reasons

    def __str__(self) -> str:
        causes = "; ".join(f"{client}: {reason}" for client, reason in self.reasons.items())
        return f"{self.rounds}: fewer than {self.quorum} clients answered ({causes})"


class EvaluationFailed(ChainFedError, RuntimeError):
    """The whole model could not be judged; the job goes on without that."""

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(engine, reason)
        self.engine, self.reason = engine, reason

    def __str__(self) -> str:
        return f"the evaluation by {self.engine} failed: {self.reason}"


class OpsNotBuilt(ChainFedError, RuntimeError):
    """DeepSpeed's libraries could not be compiled into ``folder``."""

    def __init__(self, folder: str, reason: str) -> None:
        super().__init__(folder, reason)
        self.folder, self.reason = folder, reason

    def __str__(self) -> str:
        return (
            f"DeepSpeed's libraries could not be compiled into {self.folder}: {self.reason}; `chainfed doctor` says what is "
            "missing"
        )


class CorruptCommit(ChainFedError, RuntimeError):
    """A commit whose bytes are not those that were written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class CoordinatorLost(ChainFedError, RuntimeError):
    """A job's coordinator died ``deaths`` times without finishing a round in between."""

    def __init__(self, job: str, deaths: int) -> None:
        super().__init__(job, deaths)
        self.job, self.deaths = job, deaths

    def __str__(self) -> str:
        return (
            f"the coordinator of {self.job} died {self.deaths} times without finishing a round in between; Ray's log of its "
            "actor says why (often: the machine has too little memory)"
        )


class PackageMissing(ChainFedError, ImportError):
    """What was asked for needs a package that is not installed; ``extra`` is that of ours which brings it."""

    def __init__(self, wanted: str, package: str, extra: str) -> None:
        super().__init__(wanted, package, extra)
        self.wanted, self.package, self.extra = wanted, package, extra

    def __str__(self) -> str:
        return f"{self.wanted} needs {self.package}, which is not installed: {how_to_get(self.extra)}"


def how_to_get(extra: str) -> str:
    """The command that installs the packages of one of our extras."""
    return f"pip install 'chainfed-ray[{extra}]'"


class InvalidSetting(ChainFedError, ValueError):
    """An environment variable or option of the service that is wrong."""

    def __init__(self, name: str, value: str, expected: str) -> None:
        super().__init__(name, value, expected)
        self.name, self.value, self.expected = name, value, expected

    def __str__(self) -> str:
        return f"{self.name} is {self.value!r}; expected {self.expected}"


class StorageInUse(ChainFedError, RuntimeError):
    """Another service works on the same storage; two would run each job twice."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.root = root

    def __str__(self) -> str:
        return f"another chainfed service works in {self.root}; stop it first, or choose another folder"


class ServiceNotStarted(ChainFedError, RuntimeError):
    """The service meant to answer at ``address`` did not come up."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"the service did not start at {self.address}: {self.reason}"


class ServiceUnavailable(ChainFedError, RuntimeError):
    """No service answers at ``address``."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"no chainfed service answers at {self.address} ({self.reason}); start one with `chainfed serve`"


class ServiceFailed(ChainFedError, RuntimeError):
    """The service at ``address`` answers with an error that is not the caller's."""

    def __init__(self, address: str, reason: str, request_id: str) -> None:
        super().__init__(address, reason, request_id)
        self.address, self.reason, self.request_id = address, reason, request_id

    def __str__(self) -> str:
        return f"the service at {self.address} failed: {self.reason} (request {self.request_id})"


class JobFailed(ChainFedError, RuntimeError):
    """A job that was followed ended without a model; ``status`` is ``failed`` or ``cancelled``."""

    def __init__(self, job: str, status: str, reason: str) -> None:
        super().__init__(job, status, reason)
        self.job, self.status, self.reason = job, status, reason

    def __str__(self) -> str:
        return f"job {self.job} {self.status}" + (f": {self.reason}" if self.reason else "")


class JobNotFound(ChainFedError, LookupError):
    """No such job."""

    def __init__(self, job: str) -> None:
        super().__init__(job)
        self.job = job

    def __str__(self) -> str:
        return f"no job {self.job!r}; `chainfed list` shows those there are"


class JobConflict(ChainFedError, RuntimeError):
    """The job is not in a state that allows what was asked."""

    def __init__(self, job: str, status: str, asked: str) -> None:
        super().__init__(job, status, asked)
        self.job, self.status, self.asked = job, status, asked

    def __str__(self) -> str:
        return f"job {self.job} is {self.status}; it cannot {self.asked}"


class ModelNotFound(ChainFedError, LookupError):
    """No such served model."""

    def __init__(self, model: str, served: tuple[str, ...]) -> None:
        super().__init__(model, served)
        self.model, self.served = model, served

    def __str__(self) -> str:
        return f"no model {self.model!r}; served now: {', '.join(self.served) or 'none'}"
