"""Which routes and weights does the operator give to the edge's pods?"""

from alembic import op
from sqlalchemy import Column, Text

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Make the table that every replica of the operator serves the edge from."""
    op.create_table(
        "edge_files",
        Column("project", Text, primary_key=True),
        Column("name", Text, primary_key=True),
        Column("version", Text, nullable=False),
        Column("body", Text, nullable=False),
    )
