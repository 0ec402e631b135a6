"""Pages of jobs: where one begins, and which jobs are on it."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Collection, Iterable
from typing import NamedTuple

from sqlalchemy import ColumnElement, Select, or_, select

from chainfed_ray.cluster.queries.lines import JobLine
from chainfed_ray.cluster.tables import JobRecord, JobRow, LabelRow
from chainfed_ray.errors import InvalidJob
from chainfed_ray.records.states import Status

Label = tuple[str, str]
"""A label's name and its value."""


class Place(NamedTuple):
    """A place in a list, of jobs or of uploads: after the one with an id, which was made at a time. It may be gone."""

    at: str
    id: str

    @classmethod
    def after(cls, record: JobRecord | JobLine) -> "Place":
        """The place after a job."""
        return cls(record.submitted_at, record.id)

    @classmethod
    def parse(cls, cursor: str) -> "Place":
        """The place that a ``cursor`` of ours means.

        Raises:
            InvalidJob: it is none of ours.
        """
        try:
            at, _, after = urlsafe_b64decode(cursor.encode()).decode().partition(" ")
        except ValueError:
            at = after = ""
        if not at or not after or "\0" in at + after:
            raise InvalidJob.at("cursor", cursor, "the `next` of an earlier page")
        return cls(at, after)

    def cursor(self) -> str:
        """The place as a text for callers. It tells no number of a row: that would tell how many jobs others have."""
        return urlsafe_b64encode(f"{self.at} {self.id}".encode()).decode()

    def older(self, seen: ColumnElement[bool]) -> ColumnElement[bool]:
        """The condition that a job is older: than the job of this place or, if that is not ``seen``, than its time."""
        number = select(JobRow.number).where(seen, JobRow.id == self.id).scalar_subquery()
        return or_(JobRow.number < number, number.is_(None) & (JobRow.submitted_at < self.at))


def page_of(
    seen: ColumnElement[bool],
    limit: int,
    after: Place | None,
    status: Status | Collection[Status] | None,
    labels: Iterable[Label],
) -> Select[JobRow]:
    """The query for at most ``limit`` jobs of those that are ``seen``, the newest first.

    They are ``after`` a place, in a state of ``status``, and have every one of the ``labels``.
    """
    query = select(JobRow).where(seen)
    if status is not None:
        query = query.where(JobRow.status.in_([status] if isinstance(status, str) else status))
    for key, value in labels:
        having = select(LabelRow.job).where(LabelRow.name == key, LabelRow.value == value)
        query = query.where(JobRow.id.in_(having))
    if after is not None:
        query = query.where(after.older(seen))
    return query.order_by(JobRow.number.desc()).limit(limit)
