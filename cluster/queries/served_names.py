"""The names under which models are served: two bases of one last name have two."""

from hashlib import sha256

from sqlalchemy import select
from sqlalchemy.orm import Session

from chainfed_ray.cluster.tables import JobRow
from chainfed_ray.spec.job import JobSpec

_LOOKED_AT = 100  # jobs, the newest whose names begin alike
_DIGITS = 6


def served_name(session: Session, tenant: str, spec: JobSpec) -> str:
    """The name under which the model of a job of ``tenant`` is served.

    That is ``spec.model_name``, such as ``llama:support``; or ``llama-3f2a1b:support``, with digits that follow from the base
    model, if the newest of the tenant's jobs whose names begin with ``llama:`` is on another base of that last name. A base
    that was marked so before stays so.
    """
    stem, _, name = spec.model_name.partition(":")
    base = _repository(spec.model.base)
    marked = f"{stem}-{sha256(base.encode()).hexdigest()[:_DIGITS]}"
    if _base_of_newest(session, tenant, marked) == base:
        return f"{marked}:{name}"
    before = _base_of_newest(session, tenant, stem)
    return f"{stem if before in (None, base) else marked}:{name}"


def _base_of_newest(session: Session, tenant: str, stem: str) -> str | None:
    """The base model of the newest job of a tenant whose model's name begins with ``stem``; None if there is none."""
    alike = (JobRow.tenant == tenant, JobRow.deleted_at.is_(None), JobRow.model.startswith(f"{stem}:", autoescape=True))
    columns = select(JobRow.model, JobRow.spec).where(*alike).order_by(JobRow.number.desc()).limit(_LOOKED_AT)
    for model, document in session.execute(columns):
        # SQLite compares without regard to case. A document that cannot be read is the trouble of its own job.
        if model.partition(":")[0] == stem and isinstance(document, dict):
            return _repository(str(document["model"]["base"]))
    return None


def _repository(base: str) -> str:
    """A base model without its revision: another revision of it is served in place of the one before."""
    return base.partition("@")[0] if base.startswith("hf:") else base
