"""The names under which models are served: two bases of one last name have two."""

from collections.abc import Iterator
from hashlib import sha256
from typing import Any

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import EventRow, JobRow
from chainfed_ray.records.states import Status

_LOOKED_AT = 100  # jobs whose names begin alike
_DIGITS = 6
_CHECKED: tuple[Status, ...] = ("running", "succeeded")  # a job gets there by its start alone
_GOES_ON: tuple[Status, ...] = ("queued", "validating", "pausing", "paused", "cancelling")  # if it has started
# Looked up for such a job alone: PostgreSQL might read all events to tell whether one ``exists``.
_START = select(EventRow.seq).where(EventRow.job == JobRow.id, EventRow.key == "started").scalar_subquery()
STARTED = (
    or_(JobRow.status.in_(_CHECKED), and_(JobRow.status.in_(_GOES_ON), _START.is_not(None))),
    JobRow.deleted_at.is_(None),
)
"""The conditions that a job has started, so it has been checked, and has neither failed nor been cancelled since.

``started_at`` says when it began to be validated, which may have failed.
"""


def served_name(session: Session, job: JobRow, base: str) -> str:
    """The name under which the model of a new ``job`` is served, which trains on ``base``.

    That is the one that the job asks for, such as ``llama:support``; or ``llama-3f2a1b:support``, with digits that follow from
    the base model, if the oldest of the tenant's other jobs whose names begin with ``llama:`` is on another base of that last
    name. A model keeps the name under which its base was trained before, and a base that was marked stays so.
    """
    stem, _, name = job.model.partition(":")
    base = _repository(base)
    marked = f"{stem}-{sha256(base.encode()).hexdigest()[:_DIGITS]}"
    others = select(JobRow.model, JobRow.spec).where(
        JobRow.tenant == job.tenant, JobRow.deleted_at.is_(None), JobRow.id != job.id
    )
    before = others.where(JobRow.model.in_((f"{stem}:{name}", f"{marked}:{name}"))).order_by(JobRow.number.desc())
    for model, known in _with_bases(session, before):
        if known == base:
            return model

    def owner(prefix: str) -> str | None:
        """The base model of the oldest job whose model's name begins with ``prefix``; None if there is none."""
        alike = others.where(JobRow.model.startswith(f"{prefix}:", autoescape=True)).order_by(JobRow.number)
        found = _with_bases(session, alike)
        # SQLite compares without regard to case.
        return next((known for model, known in found if model.partition(":")[0] == prefix), None)

    if owner(marked) == base:
        return f"{marked}:{name}"
    return f"{stem if owner(stem) in (None, base) else marked}:{name}"


def rows_on_base(
    session: Session, tenant: str | None, name: str, limit: int, have_succeeded: bool = False
) -> list[JobRow]:
    """At most ``limit`` jobs of ``tenant`` that have started or succeeded on a base model of this name, the newest first.

    Or only those that ``have_succeeded``: no other is sure to stay one of them.
    """
    prefix = f"{name}:"
    alike = JobRow.model.startswith(prefix, autoescape=True)  # of which SQLite compares the case no further
    same = func.substr(JobRow.model, 1, len(prefix)) == prefix
    query = select(JobRow).where(JobRow.tenant == tenant, alike, same, *STARTED)
    if have_succeeded:
        query = query.where(JobRow.status == "succeeded")
    return list(session.scalars(query.order_by(JobRow.number.desc()).limit(limit)))


def _with_bases(session: Session, query: Select[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """The names of jobs' models, and their base models, as far as documents can be read."""
    for model, document in session.execute(query.limit(_LOOKED_AT)):
        if (base := _base_of(document)) is not None:
            yield model, base


def _base_of(document: object) -> str | None:
    """The base model of a job's document. None if it has none: that is the trouble of its own job."""
    model = document.get("model") if isinstance(document, dict) else None
    base = model.get("base") if isinstance(model, dict) else None
    return _repository(base) if isinstance(base, str) else None


def _repository(base: str) -> str:
    """A base model without its revision: another revision of it is served in place of the one before."""
    return base.partition("@")[0] if base.startswith("hf:") else base
