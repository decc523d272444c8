"""What did the first release keep: ledger, inbox, leases, versions, rollouts and what serves."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy import Column, Float, Integer, Text

revision = "0001"
down_revision = None

_REFUSAL = "the ledger is append-only"


def upgrade() -> None:
    """Make the first tables; the database itself guards the ledger."""
    _make_ledger()
    _make_inbox()
    _make_models()
    op.create_table(
        "leases",
        Column("name", Text, primary_key=True),
        Column("holder", Text, nullable=False),
        Column("fence", Integer, nullable=False),
        Column("expires", Float, nullable=False),
    )
    if op.get_bind().dialect.name == "sqlite":
        _guard_sqlite()
    else:
        _guard_postgres()


def _make_ledger() -> None:
    op.create_table(
        "ledger",
        Column("seq", Integer, primary_key=True),
        Column("at", Text, nullable=False),
        Column("event_time", Text),
        Column("kind", Text, nullable=False),
        Column("project", Text, nullable=False),
        Column("subject", Text, nullable=False),
        Column("body", Text, nullable=False),
        Column("previous", Text, nullable=False, unique=True),
        Column("digest", Text, nullable=False, unique=True),
    )
    op.create_index("ledger_subject", "ledger", ["project", "kind", "subject"])
    op.create_table(
        "ledger_head",
        Column("id", Integer, primary_key=True),
        Column("seq", Integer, nullable=False),
        Column("digest", Text, nullable=False),
    )


def _make_inbox() -> None:
    op.create_table(
        "inbox",
        Column("source", Text, primary_key=True),
        Column("id", Text, primary_key=True),
        Column("seq", Integer, nullable=False, unique=True),
        Column("type", Text, nullable=False),
        Column("subject", Text, nullable=False),
        Column("time", Text, nullable=False),
        Column("data", Text, nullable=False),
        Column("state", Text, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("outcome", Text, nullable=False),
    )
    op.create_index("inbox_state", "inbox", ["state", "seq"])


def _make_models() -> None:
    op.create_table(
        "versions",
        Column("project", Text, primary_key=True),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("digest", Text, nullable=False),
        Column("run_id", Text, nullable=False),
        Column("as_of", Text, nullable=False),
        sa.UniqueConstraint("project", "digest"),
    )
    op.create_table(
        "rollouts",
        Column("id", Integer, primary_key=True),
        Column("project", Text, nullable=False, index=True),
        Column("version", Integer, nullable=False),
        Column("digest", Text, nullable=False),
        Column("bundle_uri", Text, nullable=False),
        Column("run_id", Text, nullable=False),
        Column("phase", Text, nullable=False),
        Column("step", Integer, nullable=False),
        Column("weight", Integer, nullable=False),
        Column("reason", Text, nullable=False),
        sa.UniqueConstraint("project", "run_id", "digest"),
    )
    op.create_table(
        "serving",
        Column("seq", Integer, primary_key=True),
        Column("project", Text, nullable=False, index=True),
        Column("rollout_id", Integer, nullable=False),
    )


def _guard_sqlite() -> None:
    for change in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER ledger_no_{change.lower()} BEFORE {change} ON ledger"
            f" BEGIN SELECT RAISE(ABORT, '{_REFUSAL}'); END"
        )


def _guard_postgres() -> None:
    op.execute(
        "CREATE FUNCTION ledger_refuses() RETURNS trigger LANGUAGE plpgsql AS $$"
        f" BEGIN RAISE EXCEPTION '{_REFUSAL}' USING ERRCODE = 'restrict_violation'; END $$"
    )
    op.execute(
        "CREATE TRIGGER ledger_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger"
        " FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuses()"
    )
