"""Version 0003: how many jobs each tenant has in each state is kept and not counted again, and indexes for requests.

Triggers keep the counts, so no program that changes jobs can forget it, one of the version before included.
"""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0003", "0002"

_MORE = (
    "insert into job_counts (tenant, status, jobs) select new.tenant, new.status, 1 where new.deleted_at is null "
    "on conflict (tenant, status) do update set jobs = job_counts.jobs + 1"
)
_FEWER = (
    "update job_counts set jobs = jobs - 1 where old.deleted_at is null and tenant = old.tenant and status = old.status"
)
_CHANGED = "(old.tenant, old.status, old.deleted_at is null) <> (new.tenant, new.status, new.deleted_at is null)"


def keeping(more: str, fewer: str, changed: str, columns: str) -> dict[str, tuple[str, ...]]:
    """The triggers of each database that keep what is counted of the jobs, if their ``columns`` have ``changed``."""
    return {
        "sqlite": (
            f"create trigger jobs_added after insert on jobs begin {more}; end",
            f"create trigger jobs_moved after update of {columns} on jobs when {changed} begin {fewer}; {more}; end",
            f"create trigger jobs_removed after delete on jobs begin {fewer}; end",
        ),
        # Two that move jobs at the same time change the counts in the same order, so neither waits for the other in a circle.
        "postgresql": (
            "create or replace function count_jobs() returns trigger language plpgsql as $$ begin "
            f"if tg_op = 'INSERT' then {more}; "
            f"elsif tg_op = 'DELETE' then {fewer}; "
            f"elsif not {changed} then null; "
            f"elsif (old.tenant, old.status) < (new.tenant, new.status) then {fewer}; {more}; "
            f"else {more}; {fewer}; end if; return null; end $$",
            f"create trigger jobs_counted after insert or delete or update of {columns} on jobs "
            "for each row execute function count_jobs()",
        ),
    }


KEEP = keeping(_MORE, _FEWER, _CHANGED, "tenant, status, deleted_at")
STOP = {
    "sqlite": ("drop trigger jobs_added", "drop trigger jobs_moved", "drop trigger jobs_removed"),
    "postgresql": ("drop trigger jobs_counted on jobs", "drop function count_jobs()"),
}
_DELETED = sa.text("deleted_at is not null")


def upgrade() -> None:
    """Count the jobs once, and keep the counts from now on."""
    op.create_table(
        "job_counts",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("status", sa.String, primary_key=True),
        sa.Column("jobs", sa.BigInteger, nullable=False),
    )
    op.execute(
        "insert into job_counts (tenant, status, jobs) "
        "select tenant, status, count(*) from jobs where deleted_at is null group by tenant, status"
    )
    for statement in KEEP.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
    op.drop_index("ix_jobs_deleted_at", "jobs")  # it led to nearly every row
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"], sqlite_where=_DELETED, postgresql_where=_DELETED)
    op.create_index("ix_jobs_tenant_model", "jobs", ["tenant", "model", "status", "number"])
    op.create_index("ix_jobs_tenant_status", "jobs", ["tenant", "status", "number"])


def downgrade() -> None:
    """Count no more."""
    for statement in STOP.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
    op.drop_index("ix_jobs_tenant_status", "jobs")
    op.drop_index("ix_jobs_tenant_model", "jobs")
    op.drop_index("ix_jobs_deleted_at", "jobs")
    op.create_index("ix_jobs_deleted_at", "jobs", ["deleted_at"])
    op.drop_table("job_counts")
