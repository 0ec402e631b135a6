"""Alembic runs this file for every command: it runs the steps on the connection that ``cluster/schema.py`` has opened."""

from alembic import context

# A caller holds the transaction, so a process that is killed leaves the tables as they were. SQLite can do that as well.
# The table with the version has a name of ours: others who use Alembic may have theirs in the same database.
context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
