"""Version 0005: how many bytes are kept of each tenant's jobs is kept beside their counts, and not added up again.

Triggers keep it, as they keep the counts.
"""

import sqlalchemy as sa
from alembic import op

from chainfed_ray.cluster.migrations.versions.r0003_counts import KEEP, STOP, keeping

revision, down_revision = "0005", "0004"

_MORE = (
    "insert into job_counts (tenant, status, jobs, bytes) "
    "select new.tenant, new.status, 1, coalesce(new.kept_bytes, 0) where new.deleted_at is null "
    "on conflict (tenant, status) do update set jobs = job_counts.jobs + 1, bytes = job_counts.bytes + excluded.bytes"
)
_FEWER = (
    "update job_counts set jobs = jobs - 1, bytes = bytes - coalesce(old.kept_bytes, 0) "
    "where old.deleted_at is null and tenant = old.tenant and status = old.status"
)
_CHANGED = (
    "(old.tenant, old.status, old.deleted_at is null, coalesce(old.kept_bytes, 0)) <> "
    "(new.tenant, new.status, new.deleted_at is null, coalesce(new.kept_bytes, 0))"
)
# Who changes a job locks its row, and then its count by a trigger. To wait for those first, and let no other in, keeps
# changes of tables out of a circle, and no bytes are noted between the sums and the triggers that keep them.
_ALONE = {"postgresql": ("lock table jobs in access exclusive mode",)}
_KEEP = keeping(_MORE, _FEWER, _CHANGED, "tenant, status, deleted_at, kept_bytes")


def upgrade() -> None:
    """Add up the bytes once, and keep the sums from now on."""
    dialect = op.get_bind().dialect.name
    for statement in _ALONE.get(dialect, ()):
        op.execute(statement)
    op.add_column("job_counts", sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.execute(
        "update job_counts set bytes = (select coalesce(sum(kept_bytes), 0) from jobs where deleted_at is null "
        "and jobs.tenant = job_counts.tenant and jobs.status = job_counts.status)"
    )
    for statement in (*STOP.get(dialect, ()), *_KEEP.get(dialect, ())):
        op.execute(statement)


def downgrade() -> None:
    """Keep the counts alone."""
    dialect = op.get_bind().dialect.name
    for statement in (*_ALONE.get(dialect, ()), *STOP.get(dialect, ()), *KEEP.get(dialect, ())):
        op.execute(statement)
    op.drop_column("job_counts", "bytes")
