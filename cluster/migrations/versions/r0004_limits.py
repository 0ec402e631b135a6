"""Version 0004: how many bytes are kept of each job that is over, and how many requests a minute each key may send."""

import sqlalchemy as sa
from alembic import op

revision, down_revision = "0004", "0003"


def upgrade() -> None:
    """Add the columns. Of jobs from before, and of keys, nothing is known: they count nothing, and have no limit."""
    op.add_column("jobs", sa.Column("kept_bytes", sa.BigInteger))
    op.add_column("keys", sa.Column("requests_per_minute", sa.Integer))


def downgrade() -> None:
    """Delete the columns. The version before lets keys send any number of requests."""
    op.drop_column("keys", "requests_per_minute")
    op.drop_column("jobs", "kept_bytes")
