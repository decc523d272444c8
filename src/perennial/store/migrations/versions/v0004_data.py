"""What did accepted data and features show, and which rows are kept aside?"""

from alembic import op
from sqlalchemy import Column, Float, Integer, Text

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the tables of accepted snapshots, quarantined rows and the quality of features."""
    op.create_table(
        "accepted",
        Column("project", Text, primary_key=True),
        Column("digest", Text, primary_key=True),
        Column("as_of", Text, nullable=False),
        Column("at", Text, nullable=False),
        Column("rows", Integer, nullable=False),
        Column("observed", Text, nullable=False),
    )
    op.create_table(
        "quarantine",
        Column("project", Text, primary_key=True),
        Column("id", Text, primary_key=True),
        Column("state", Text, nullable=False),
        Column("at", Text, nullable=False),
        Column("run", Text, nullable=False),
        Column("snapshot", Text, nullable=False),
        Column("digest", Text, nullable=False),
        Column("rows", Integer, nullable=False),
        Column("rules", Text, nullable=False),
        Column("told", Text, nullable=False),
    )
    op.create_table(
        "feature_quality",
        Column("project", Text, primary_key=True),
        Column("feature", Text, primary_key=True),
        Column("moment", Text, primary_key=True),
        Column("at", Text, nullable=False),
        Column("run", Text, nullable=False),
        Column("verdict", Text, nullable=False),
        Column("reason", Text, nullable=False),
        Column("drift", Float),
        Column("profile", Text, nullable=False),
    )
