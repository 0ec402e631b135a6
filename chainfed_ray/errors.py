"""Every error that the project raises on purpose.

::

    ChainFedError
    ├── InvalidJob         (ValueError)    a job or a request is not acceptable; says which fields are wrong
    ├── UnsupportedModel   (ValueError)    a base model cannot be run layer by layer
    ├── InvalidUpdate      (ValueError)    a client's update must not be averaged (NaN, wrong shape, wrong name)
    ├── BudgetExceeded     (MemoryError)   a client's turn needed more memory than it was allowed
    ├── QuorumLost         (RuntimeError)  too few clients answered, several rounds in a row
    ├── EvaluationFailed   (RuntimeError)  the whole model could not be evaluated; the job goes on
    ├── OpsNotBuilt        (RuntimeError)  DeepSpeed's libraries could not be compiled
    ├── CorruptCommit      (RuntimeError)  the bytes of a commit are not the ones that were written
    ├── CommitConflict     (RuntimeError)  another process has committed what this one was to commit
    ├── CoordinatorLost    (RuntimeError)  a coordinator died several times without finishing a round
    ├── DiskFailed         (RuntimeError)  a file or folder could not be read or written
    ├── PackageMissing     (ImportError)   a package is not installed; one of our extras installs it
    ├── InvalidSetting     (ValueError)    an environment variable or option of the service is wrong
    ├── StorageInUse       (RuntimeError)  another service uses the same storage
    ├── ServiceNotStarted  (RuntimeError)  the service, or Ray, did not start
    ├── ServiceUnavailable (RuntimeError)  no service answers at the address given
    ├── AccessDenied       (RuntimeError)  the service does not accept the API key, or not for this
    ├── ServiceFailed      (RuntimeError)  the service answered with an internal error
    ├── ServiceBusy        (RuntimeError)  the service does as much of this at once as it can
    ├── LimitReached       (RuntimeError)  a tenant has as much of something as its limit allows
    ├── PartUnavailable    (RuntimeError)  a process of the service ended, or took too long
    ├── SiteRefused        (RuntimeError)  the service refuses a site: its key, its version, or it has joined twice
    ├── TurnNotTaken       (RuntimeError)  a site refused a turn, or could not take it
    ├── SiteSuperseded     (RuntimeError)  another process of the same site has joined
    ├── OrderWithdrawn     (RuntimeError)  a site has an order that is not wanted any more
    ├── AnswerRefused      (RuntimeError)  a site's answer is not what the order allows
    ├── JobFailed          (RuntimeError)  a job finished without a model
    ├── JobNotFound        (LookupError)   the job does not exist
    ├── JobConflict        (RuntimeError)  the job's status does not allow what was requested
    ├── PreconditionFailed (RuntimeError)  the job is another by now than it was when it was looked at
    ├── KeyNotFound        (LookupError)   no API key has this id
    ├── ModelNotFound      (LookupError)   the model is not served
    ├── UploadNotFound     (LookupError)   no upload has this id
    ├── UploadConflict     (RuntimeError)  the upload's state, or a job that reads it, does not allow what was requested
    └── ArtifactNotFound   (LookupError)   the job has no artifact of this name

Each class is also a standard-library error, so that plain Python code can catch it. Each survives pickling, because Ray carries
errors between processes: the exception's ``args`` are the arguments of its constructor.
"""

from difflib import get_close_matches
from typing import Any

from chainfed_ray.problem import Problem, shown, some_of
from chainfed_ray.units import format_bytes


class ChainFedError(Exception):
    """The base class of the project's errors."""

    def document(self) -> dict[str, Any]:
        """The error as JSON."""
        return {"type": type(self).__name__, "message": str(self)}


class InvalidJob(ChainFedError, ValueError):
    """A job or request that cannot be accepted. ``problems`` has an entry for each field that is wrong."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(problems)
        self.problems = problems

    @classmethod
    def at(cls, field: str, value: Any, expected: str) -> "InvalidJob":
        """An error with a single problem."""
        return cls((Problem(field, value, expected),))

    def document(self) -> dict[str, Any]:
        """The error as JSON, with its problems one by one."""
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
        return f"the update of {self.client} was refused: {self.reason}"


class BudgetExceeded(ChainFedError, MemoryError):
    """A client's turn was stopped during ``phase``, because it needed more than ``cap`` bytes; its plan had said ``planned``.

    ``peak`` is the measured peak in bytes, if the turn was stopped at its end. It is None if an allocation was refused.
    """

    def __init__(self, planned: int, cap: int, peak: int | None, phase: str) -> None:
        super().__init__(planned, cap, peak, phase)
        self.planned, self.cap, self.peak, self.phase = planned, cap, peak, phase

    def __str__(self) -> str:
        took = "more" if self.peak is None else format_bytes(self.peak)
        return (
            f"the turn was planned to take {format_bytes(self.planned)}, was allowed {format_bytes(self.cap)}, "
            f"and would have taken {took} while {self.phase}"
        )


class QuorumLost(ChainFedError, RuntimeError):
    """Too few clients answered in ``rounds``, which are named in words.

    ``reasons`` says why in the last of them, for each client that did not answer.
    """

    def __init__(self, rounds: str, quorum: int, reasons: dict[str, str]) -> None:
        super().__init__(rounds, quorum, reasons)
        self.rounds, self.quorum, self.reasons = rounds, quorum, reasons

    def __str__(self) -> str:
        causes = some_of((f"{client}: {reason}" for client, reason in self.reasons.items()), "; ")
        return f"{self.rounds}: fewer than {self.quorum} clients answered ({causes})"


class EvaluationFailed(ChainFedError, RuntimeError):
    """The whole model could not be evaluated. The job goes on without this evaluation."""

    def __str__(self) -> str:
        return f"the evaluation by {self.args[0]} failed: {self.args[1]}"


class OpsNotBuilt(ChainFedError, RuntimeError):
    """DeepSpeed's libraries could not be compiled into ``folder``."""

    def __str__(self) -> str:
        return (
            f"DeepSpeed's libraries could not be compiled into {self.args[0]}: {self.args[1]}; `chainfed doctor` says what is "
            "missing"
        )


class CorruptCommit(ChainFedError, RuntimeError):
    """The bytes of a commit on disk are not the ones that were written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class CommitConflict(ChainFedError, RuntimeError):
    """Another process has made commit ``number`` of the job whose objects are below ``prefix``."""

    def __init__(self, prefix: str, number: int) -> None:
        super().__init__(prefix, number)
        self.prefix, self.number = prefix, number

    def __str__(self) -> str:
        return f"another process has made commit {self.number} of {self.prefix}; this one goes on from there"


class CoordinatorLost(ChainFedError, RuntimeError):
    """A job's coordinator died ``deaths`` times in a row without finishing a round."""

    def __str__(self) -> str:
        return (
            f"the coordinator of {self.args[0]} died {self.args[1]} times without finishing a round in between; Ray's log of "
            "its actor says why (often: the machine has too little memory)"
        )


class DiskFailed(ChainFedError, RuntimeError):
    """A file or folder at ``path`` could not be read or written, for a ``reason`` of the operating system's."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.args[1]}; what was committed before is kept, and the same command goes on from there"


class PackageMissing(ChainFedError, ImportError):
    """A feature needs a package that is not installed. ``extra`` is the extra of chainfed-ray that installs it."""

    def __init__(self, wanted: str, package: str, extra: str) -> None:
        super().__init__(wanted, package, extra)
        self.wanted, self.package, self.extra = wanted, package, extra

    def __str__(self) -> str:
        return f"{self.wanted} needs {self.package}, which is not installed: {how_to_get(self.extra)}"


def how_to_get(extra: str) -> str:
    """The command that installs the packages of an extra of chainfed-ray."""
    return f"pip install 'chainfed-ray[{extra}]'"


class InvalidSetting(ChainFedError, ValueError):
    """An environment variable or option of the service has a wrong value."""

    def __init__(self, name: str, value: str, expected: str) -> None:
        super().__init__(name, value, expected)
        self.name, self.value, self.expected = name, value, expected

    def __str__(self) -> str:
        return f"{self.name} is {self.value!r}; expected {self.expected}"


class StorageInUse(ChainFedError, RuntimeError):
    """Another service uses the same storage. Two services on one storage would run each job twice."""

    def __str__(self) -> str:
        return f"another chainfed service works in {self.args[0]}; stop it first, or choose another folder"


class ServiceNotStarted(ChainFedError, RuntimeError):
    """The service that should answer at ``address`` did not start; or Ray, for a command that needs no service."""

    def __init__(self, address: str | None, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        what = f"the service did not start at {self.address}" if self.address else "Ray did not start on this machine"
        return f"{what}: {self.reason}"


class ServiceUnavailable(ChainFedError, RuntimeError):
    """No service answers at ``address``."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    def __str__(self) -> str:
        return f"no chainfed service answers at {self.address} ({self.reason}); start one with `chainfed serve`"


class AccessDenied(ChainFedError, RuntimeError):
    """The service at ``address`` does not accept the API key, or not for what was asked, for a ``reason``."""

    def __str__(self) -> str:
        return f"the service at {self.args[0]} refused: {self.args[1]} (a key is in CHAINFED_API_KEY, or in --key-file)"


class ServiceFailed(ChainFedError, RuntimeError):
    """The service at ``address`` answered with an internal error."""

    def __str__(self) -> str:
        return f"the service at {self.args[0]} failed: {self.args[1]} (request {self.args[2]})"


class ServiceBusy(ChainFedError, RuntimeError):
    """The service does as much as it can of ``work``; it may be asked again after ``seconds``."""

    def __init__(self, work: str, seconds: int) -> None:
        super().__init__(work, seconds)
        self.work, self.seconds = work, seconds

    def __str__(self) -> str:
        return f"too many {self.work} at once; try again in {self.seconds} s"


class LimitReached(ChainFedError, RuntimeError):
    """A tenant has as much of something as ``limit`` allows, a setting of the service; it may ask again after ``seconds``.

    A key may have a limit of its own, and is then named in place of the tenant.
    """

    def __init__(self, tenant: str, what: str, limit: str, seconds: int) -> None:
        super().__init__(tenant, what, limit, seconds)
        self.tenant, self.what, self.limit, self.seconds = tenant, what, limit, seconds

    def __str__(self) -> str:
        return f"{self.tenant} has {self.what}, as many as {self.limit} allows; try again in {self.seconds} s"


class PartUnavailable(ChainFedError, RuntimeError):
    """A ``part`` of the service that a request needs ended or took too long; it may be asked again after ``seconds``."""

    def __init__(self, part: str, reason: str, seconds: int) -> None:
        super().__init__(part, reason, seconds)
        self.part, self.reason, self.seconds = part, reason, seconds

    def __str__(self) -> str:
        return f"{self.part} {self.reason}; nothing was changed, so the request can be sent again"


class SiteRefused(ChainFedError, RuntimeError):
    """The service refuses a site. The message says why."""


class TurnNotTaken(ChainFedError, RuntimeError):
    """A site did not carry out an order. The message says which site, and why."""


class SiteSuperseded(ChainFedError, RuntimeError):
    """The process of ``site`` takes no more orders: another one has joined since, or this one has left."""

    def __str__(self) -> str:
        return f"another process of site {self.args[0]} has joined since, or this one has left"


class OrderWithdrawn(ChainFedError, RuntimeError):
    """The site does not have ``order`` any more: its job is over, it was withdrawn, or another process has it."""

    def __str__(self) -> str:
        return f"order {self.args[0]} is not wanted any more"


class AnswerRefused(ChainFedError, ValueError):
    """The answer of ``order`` is refused for the ``reason``."""

    def __str__(self) -> str:
        return f"the answer of order {self.args[0]} is refused: {self.args[1]}"


class JobFailed(ChainFedError, RuntimeError):
    """A job finished without a model; ``status`` is ``failed`` or ``cancelled``."""

    def __str__(self) -> str:
        return f"job {self.args[0]} {self.args[1]}" + (f": {self.args[2]}" if self.args[2] else "")


class JobNotFound(ChainFedError, LookupError):
    """No job has this name."""

    def __str__(self) -> str:
        return f"there is no job {shown(self.args[0])}; `chainfed list` shows all jobs"


class JobConflict(ChainFedError, RuntimeError):
    """The job's status does not allow what was requested."""

    def __init__(self, job: str, status: str, asked: str) -> None:
        super().__init__(job, status, asked)
        self.job, self.status, self.asked = job, status, asked

    def __str__(self) -> str:
        return f"job {self.job} is {self.status}; it cannot {self.asked}"


class PreconditionFailed(ChainFedError, RuntimeError):
    """The state of a job has changed since it was looked at."""

    def __str__(self) -> str:
        return f"the state of job {self.args[0]} has changed since it had the ETag in If-Match; nothing was done"


class KeyNotFound(ChainFedError, LookupError):
    """No API key has this id."""

    def __str__(self) -> str:
        return f"there is no key {shown(self.args[0])}; `chainfed keys list` shows the ids of all keys"


class ModelNotFound(ChainFedError, LookupError):
    """No model that is ``served`` has this name. ``alias`` is what was asked for, if that is an alias for the model."""

    def __init__(self, model: str, served: tuple[str, ...], alias: str | None = None) -> None:
        super().__init__(model, served, alias)
        self.model, self.served, self.alias = model, served, alias

    def __str__(self) -> str:
        stands = f", for which the alias {shown(self.alias)} stands" if self.alias else ""
        meant = f"; did you mean {' or '.join(near)}?" if (near := get_close_matches(self.model, self.served)) else "."
        return f"there is no model {shown(self.model)}{stands}{meant} Served now: {some_of(self.served)}"


class UploadNotFound(ChainFedError, LookupError):
    """No upload has this id."""

    def __str__(self) -> str:
        return f"there is no upload {shown(self.args[0])}; `chainfed data list` shows all uploads"


class UploadConflict(ChainFedError, RuntimeError):
    """The state of an upload does not allow what was requested, for a reason."""

    def __str__(self) -> str:
        return f"upload {self.args[0]}: {self.args[1]}"


class ArtifactNotFound(ChainFedError, LookupError):
    """The job has no artifact of this name."""

    def __str__(self) -> str:
        return (
            f"job {self.args[0]} has no artifact {shown(self.args[1])}; `chainfed artifacts {self.args[0]}` lists them"
        )
