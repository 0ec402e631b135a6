"""What crosses the boundary between the service and a site: orders and answers, as JSON, with tensors as safetensors files.

The documents that cross this boundary are the wire, for which this room is named.
Both sides check what they receive against these classes, and nothing is pickled. The classes need no torch: the API and the
process that talks to it pass the contents on, and ``codec.py`` reads them. docs/sites.md lists what crosses.
"""

import json
from hashlib import sha256
from pathlib import Path
from re import fullmatch
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

PROTOCOL = 2
"""The version of these documents. A site of another version is refused, with both numbers."""

MOST_CHARACTERS = 1_000_000  # of an answer's JSON
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
JOB = "^[a-z0-9-]{1,100}$"
JobId = Annotated[str, Field(pattern=JOB)]
OrderId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
Session = Annotated[str, Field(pattern="^[0-9a-f]{32}$", description="a random name of the process at the site")]
KEY = r"^[a-z_.\[\]0-9]{1,100}$"
# The phases of a turn. No other words cross: words of a library or an error may quote rows.
PHASE = (
    "^(getting ready|loading the window|training|profiling the layers|fitting the head|working|evaluating"
    "|clipping the update( and adding noise)?|running the layers (below|up to) layer [0-9]{1,5})$"
)
Kind = Literal["survey", "profiling", "training", "fitting", "evaluating", "calibrating"]
Reason = Literal["budget", "job", "model", "refused", "classes", "plan", "changed", "error"]


def phase_of(words: str) -> str:
    """The phase of a turn as it may cross the boundary: ``words``, if they are known."""
    return words if fullmatch(PHASE, words) else "working"


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HashedFile(_Message):
    """A file, by the digest of its bytes and their number."""

    sha256: Digest
    size: int = Field(ge=0, lt=2**50)

    @classmethod
    def of(cls, file: Path) -> "HashedFile":
        """The description of ``file``."""
        digest, size = sha256(), 0
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
                size += len(block)
        return cls(sha256=digest.hexdigest(), size=size)


class JobDocument(_Message):
    """What all orders of a job have in common. A site fetches it once, by its digest, and keeps it.

    ``spec`` is the job as it was submitted. ``memory`` is that of the base model's parts, and ``classes`` are the names of the
    job's classes; neither is known before the job is planned.
    """

    spec: dict[str, Any]
    memory: dict[str, Any] | None = None
    classes: tuple[str, ...] = Field((), strict=False)

    def content(self) -> bytes:
        """The bytes of its file. The same document has the same ones whenever it is made."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()

    def described(self) -> HashedFile:
        """The description of its file."""
        content = self.content()
        return HashedFile(sha256=sha256(content).hexdigest(), size=len(content))

    @classmethod
    def read(cls, file: Path) -> "JobDocument":
        """The document that ``file`` has.

        Raises:
            ValueError: it has none.
        """
        return cls.model_validate_json(file.read_bytes())


class Order(_Message):
    """What a site is asked. ``document`` describes the file of its job's document, and ``tensors`` that of its own tensors.

    ``base_digest`` is that of the base model's files. The same order has the same ``id`` whenever it is given, so its answer is
    known again. ``most_bytes`` is the most that the tensors of the answer may have.
    """

    protocol: int = PROTOCOL
    id: OrderId
    job: JobId
    name: str = Field(max_length=100, description="the name of the job")
    kind: Kind
    document: HashedFile
    base_digest: Digest
    content: dict[str, Any]
    tensors: HashedFile | None
    most_bytes: int


class NextOrder(_Message):
    """The next ``order``, if there is one, and those of the site's jobs that are over: it deletes their caches."""

    order: Order | None = None
    over: tuple[str, ...] = Field((), strict=False)


class Done(_Message):
    """An order was carried out. ``content`` has the result, and ``tensors`` describes the file that was sent with it."""

    outcome: Literal["done"] = "done"
    content: dict[str, Any]
    tensors: HashedFile | None = None


class NotDone(_Message):
    """An order was not carried out. Words of an error stay at the site, since they may quote rows: only a reason is sent.

    ``numbers`` are bytes or counts that belong to the reason; ``phase`` is the part of the turn that exceeded its budget.
    """

    outcome: Literal["not-done"] = "not-done"
    reason: Reason
    key: str | None = Field(None, pattern=KEY, description="the key of the job that it is about")
    kind: str | None = Field(None, pattern="^[A-Za-z_]{1,60}$", description="the name of the error's class")
    phase: str | None = Field(None, pattern=PHASE)
    numbers: tuple[Annotated[float, Field(ge=0, lt=2**60)], ...] = Field((), max_length=3, strict=False)

    @classmethod
    def about(cls, reason: Reason, key: str) -> "NotDone":
        """An order that was not carried out because of the value of ``key``."""
        return cls(reason=reason, key=key if fullmatch(KEY, key) else None)


Answer = Annotated[Done | NotDone, Field(discriminator="outcome")]
KEPT_ANSWER: TypeAdapter[Done | NotDone] = TypeAdapter(Answer)
"""Reads an answer from JSON."""


class AnswerMessage(_Message):
    """An answer, and the process that sends it."""

    session: Session
    answer: Answer


class Joining(_Message):
    """A process that begins to take the orders of ``site``. Older ones do not say which: it is the key's."""

    protocol: int
    session: Session
    version: str = Field(pattern=r"^[A-Za-z0-9.+!-]{1,50}$", description="the version of chainfed-ray at the site")
    site: str | None = Field(None, max_length=100)


class Asking(_Message):
    """A process at a site that asks for its next order, and waits for one at most ``wait`` seconds.

    ``running`` are the orders that it has. It is given again what it was given before and does not have: the answer was lost.
    ``jobs`` are those whose caches the site keeps. ``protocol`` is the version that the site speaks: one that joined before
    its service was upgraded goes on to ask. Version 1 does not say it.
    """

    session: Session
    protocol: int = 1
    running: tuple[OrderId, ...] = Field((), max_length=1000, strict=False)
    jobs: tuple[JobId, ...] = Field((), max_length=1000, strict=False)
    wait: float = Field(0.0, ge=0, le=25, strict=False)


class Heartbeat(_Message):
    """How far a turn at a site is: what it does, of how many parts how many are done, and how many seconds it has worked."""

    session: Session
    doing: str = Field(pattern=PHASE)
    done: int = Field(0, ge=0, lt=2**53)
    total: int | None = Field(None, ge=0, lt=2**53)
    unit: str | None = Field(None, pattern="^[a-z ]{1,20}$")
    worked: float = Field(ge=0, lt=2**40, strict=False)


class Leaving(_Message):
    """A process at a site that ends. Orders that it has taken are given back."""

    session: Session


class Received(_Message):
    """How many bytes of an answer's tensors have arrived: a transfer that was cut off goes on from there."""

    received: int


class Accepted(_Message):
    """What was sent is taken."""

    accepted: Literal[True] = True


class Welcome(_Message):
    """The name under which the service knows the site that the key belongs to."""

    site: str
