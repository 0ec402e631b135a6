"""Version 0002: tenants, keys, the audit log, sites, uploads, repeated requests, labels, priorities and pauses.

What a database has from before is of the tenant ``default``.
"""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0002", "0001"

_NEW = ("job_labels", "tenant_turns", "keys", "sites", "site_orders", "uploads", "answers", "audit")
_COLUMNS = ("reads_anything", "tenant", "version", "deleted_at", "priority")  # of jobs
_APPEND_ONLY = {
    "sqlite": (
        "create trigger audit_update before update on audit begin select raise(abort, 'the audit log is append-only'); end",
        "create trigger audit_delete before delete on audit begin select raise(abort, 'the audit log is append-only'); end",
    ),
    "postgresql": (
        "create or replace function refuse_audit_change() returns trigger language plpgsql as "
        "$$ begin raise exception 'the audit log is append-only'; end $$",
        "create trigger audit_change before update or delete or truncate on audit "
        "for each statement execute function refuse_audit_change()",
    ),
}
# A state that the version before does not have → the one that stands for it there.
_STATES = {"validating": "running", "pausing": "running", "paused": "queued"}


def upgrade() -> None:
    """Give jobs the columns that they lack, and make the tables."""
    for column in (
        sa.Column("reads_anything", sa.Boolean, nullable=False, server_default=sa.true()),
        sa.Column("tenant", sa.String, nullable=False, server_default="default"),
        sa.Column("version", sa.Integer, nullable=False, server_default="1"),
        sa.Column("deleted_at", sa.String),
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    ):
        op.add_column("jobs", column)
    for name in ("tenant", "deleted_at"):
        op.create_index(f"ix_jobs_{name}", "jobs", [name])
    _make_tables_of_jobs()
    _make_tables_of_access()
    _make_tables_of_sites()
    for statement in _APPEND_ONLY.get(op.get_bind().dialect.name, ()):
        op.execute(statement)
    op.execute("update schema set version = 2")  # code from before Alembic reads this, and sees that it is too old


def downgrade() -> None:
    """Delete the tables and columns, and what is in them."""
    deleted = "(select id from jobs where deleted_at is not null)"  # or they would be there again
    for statement in (
        f"delete from job_labels where job in {deleted}",
        f"delete from events where job in {deleted}",
        "delete from jobs where deleted_at is not null",
    ):
        op.execute(statement)
    for state, before in _STATES.items():
        op.execute(
            sa.text("update jobs set status = :before where status = :state").bindparams(before=before, state=state)
        )
    for table in reversed(_NEW):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        op.execute("drop function refuse_audit_change()")
    for name in ("tenant", "deleted_at"):
        op.drop_index(f"ix_jobs_{name}", "jobs")
    for name in _COLUMNS:
        op.drop_column("jobs", name)
    op.execute("update schema set version = 1")


def _make_tables_of_jobs() -> None:
    op.create_table(
        "job_labels",
        sa.Column("job", sa.String, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("value", sa.String, nullable=False),
        sa.Index("ix_job_labels_name_value", "name", "value"),
    )
    op.create_table(
        "tenant_turns",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("turn", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "uploads",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("tenant", sa.String, nullable=False, index=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String, nullable=False),
        sa.Column("complete", sa.Boolean, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.UniqueConstraint("tenant", "name", "sha256"),
    )
    op.create_table(
        "answers",
        sa.Column("tenant", sa.String, primary_key=True),
        sa.Column("key", sa.String, primary_key=True),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("holder", sa.String, nullable=False),
        sa.Column("held_until", sa.Double, nullable=False),
        sa.Column("at", sa.String, nullable=False, index=True),
        sa.Column("status", sa.Integer),
        sa.Column("headers", sa.JSON),
        sa.Column("body", sa.String),
    )


def _make_tables_of_access() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("hash", sa.String, nullable=False),
        sa.Column("owner", sa.String, nullable=False, index=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("scopes", sa.JSON, nullable=False),
        sa.Column("created_at", sa.String, nullable=False),
        sa.Column("expires_at", sa.String),
        sa.Column("revoked_at", sa.String),
        sa.Column("used_at", sa.String),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("at", sa.String, nullable=False),
        sa.Column("tenant", sa.String),
        sa.Column("key", sa.String),
        sa.Column("action", sa.String, nullable=False),
        sa.Column("target", sa.String, nullable=False),
        sa.Column("address", sa.String, nullable=False),
        sa.Column("outcome", sa.String, nullable=False),
        sa.Column("request", sa.String),
    )


def _make_tables_of_sites() -> None:
    op.create_table(
        "sites",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("session", sa.String),
        sa.Column("version", sa.String, nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )
    op.create_table(
        "site_orders",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("order", sa.String, nullable=False, index=True),
        sa.Column("site", sa.String, nullable=False, index=True),
        sa.Column("job", sa.String, nullable=False, index=True),
        sa.Column("document", sa.String, nullable=False),
        sa.Column("tensors", sa.String),
        sa.Column("most_bytes", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("session", sa.String),
        sa.Column("answer", sa.String),
        sa.Column("doing", sa.String),
        sa.Column("worked", sa.Double, nullable=False),
        sa.UniqueConstraint("site", "order"),
    )
