"""Version 0001: jobs, their events and the aliases of their models."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0001", None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String, nullable=False, unique=True),
        sa.Column("name", sa.String, nullable=False, index=True),
        sa.Column("model", sa.String, nullable=False, index=True),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("status", sa.String, nullable=False, index=True),
        sa.Column("starts", sa.Integer, nullable=False),
        sa.Column("submitted_at", sa.String, nullable=False),
        sa.Column("started_at", sa.String),
        sa.Column("finished_at", sa.String),
        sa.Column("activity", sa.JSON),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.Column("request_key", sa.String, unique=True),
    )
    op.create_table(
        "events",
        sa.Column("job", sa.String, sa.ForeignKey("jobs.id"), primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("key", sa.String, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("at", sa.String, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.UniqueConstraint("job", "key"),
    )
    op.create_table(
        "aliases",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("targets", sa.JSON, nullable=False),
    )
    made = op.create_table("schema", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.bulk_insert(made, [{"version": 1}])


def downgrade() -> None:
    """Delete the tables, and all that is in them."""
    for table in ("schema", "aliases", "events", "jobs"):
        op.drop_table(table)
