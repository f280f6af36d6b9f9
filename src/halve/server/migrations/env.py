"""Alembic's way in: runs over the connection that `Store` gives."""

from alembic import context

from halve.server.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
