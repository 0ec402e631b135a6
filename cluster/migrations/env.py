"""Alembic runs this file for every command: it runs the steps on the connection that ``cluster/schema.py`` has opened."""

from alembic import context

# A caller holds the transaction, so a process that is killed leaves the tables as they were. SQLite can do that as well.
context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
