"""What was a rollout told when it was wished: its limits, and what a cluster ran for it."""

from alembic import op
from sqlalchemy import Column, Text

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Give each rollout room for its own limits and its manifest."""
    op.add_column("rollouts", Column("limits", Text, nullable=False, server_default="{}"))
    op.add_column("rollouts", Column("manifest", Text, nullable=False, server_default=""))
