"""How does Alembic reach the database? By the connection that its caller holds open."""

from alembic import context

from perennial.store import tables
from perennial.store.schema import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=tables.metadata,
    version_table=VERSION_TABLE,
)
context.run_migrations()
