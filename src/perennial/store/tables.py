"""Which tables the one database has; moments are ISO 8601 text in UTC, bodies canonical JSON."""

from sqlalchemy import (
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

# Number of the newest change in migrations/versions; each change of a table wants one there.
SCHEMA = 4

metadata = MetaData()

ledger = Table(
    "ledger",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("at", Text, nullable=False),
    Column("event_time", Text),
    Column("kind", Text, nullable=False),
    Column("project", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("body", Text, nullable=False),
    Column("previous", Text, nullable=False, unique=True),  # so the chain can never fork
    Column("digest", Text, nullable=False, unique=True),
    Index("ledger_subject", "project", "kind", "subject"),
)

# Without the head, cutting off the newest entries would leave a chain that looks whole.
ledger_head = Table(
    "ledger_head",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("digest", Text, nullable=False),
)

inbox = Table(
    "inbox",
    metadata,
    Column("source", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("seq", Integer, nullable=False, unique=True),
    Column("type", Text, nullable=False),
    Column("subject", Text, nullable=False),
    Column("time", Text, nullable=False),
    Column("data", Text, nullable=False),
    Column("state", Text, nullable=False),  # pending, settled or dead
    Column("attempts", Integer, nullable=False),
    Column("outcome", Text, nullable=False),
    Index("inbox_state", "state", "seq"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", Text, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("expires", Float, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("project", Text, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("digest", Text, nullable=False),
    Column("run_id", Text, nullable=False),
    Column("as_of", Text, nullable=False),
    UniqueConstraint("project", "digest"),
)

rollouts = Table(
    "rollouts",
    metadata,
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
    Column("limits", Text, nullable=False, server_default="{}"),  # JSON of project.Rollout
    # What a cluster was first told to run for it; a rollback says the same words again.
    Column("manifest", Text, nullable=False, server_default=""),
    UniqueConstraint("project", "run_id", "digest"),
)

serving = Table(
    "serving",
    metadata,
    Column("seq", Integer, primary_key=True),
    Column("project", Text, nullable=False, index=True),
    Column("rollout_id", Integer, nullable=False),
)

edge_files = Table(
    "edge_files",
    metadata,
    Column("project", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("version", Text, nullable=False),
    Column("body", Text, nullable=False),
)

accepted = Table(
    "accepted",
    metadata,
    Column("project", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("as_of", Text, nullable=False),
    Column("at", Text, nullable=False),
    Column("rows", Integer, nullable=False),
    Column("observed", Text, nullable=False),  # JSON: what each expectation saw
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("project", Text, primary_key=True),
    Column("id", Text, primary_key=True),
    Column("state", Text, nullable=False),  # held, renewed, replayed or dropped
    Column("at", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("snapshot", Text, nullable=False),
    Column("digest", Text, nullable=False),  # of the file with the rows
    Column("rows", Integer, nullable=False),
    Column("rules", Text, nullable=False),  # JSON: rows by the rule that they break
    Column("told", Text, nullable=False),  # why it is replayed, renewed or dropped
)

feature_quality = Table(
    "feature_quality",
    metadata,
    Column("project", Text, primary_key=True),
    Column("feature", Text, primary_key=True),
    Column("moment", Text, primary_key=True),  # up to which features were materialized
    Column("at", Text, nullable=False),
    Column("run", Text, nullable=False),
    Column("verdict", Text, nullable=False),  # good, warn or bad
    Column("reason", Text, nullable=False),
    Column("drift", Float),  # population stability index; none without a reference
    Column("profile", Text, nullable=False),  # JSON of features.quality.Profile
)
