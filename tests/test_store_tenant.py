"""A tenant owns its schemas and can neither read, block nor see into those of another."""

import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlalchemy.exc import ProgrammingError
from stores import Postgres

from perennial.errors import BadInput, Unavailable
from perennial.ledger import Ledger
from perennial.store import rollouts, tenant
from perennial.store.engine import make_engine, migrating, open_engine, reading
from perennial.store.migrate import migrate
from perennial.store.schema import VERSION_TABLE

pytestmark = pytest.mark.stores

INSUFFICIENT_PRIVILEGE = "42501"


@pytest.fixture
def two(postgres):
    """Engines of two tenants with their tables."""
    found = []
    for name in ("first", "second"):
        url = postgres.tenant(name)
        bare = open_engine(url)
        migrate(bare)
        bare.dispose()
        found.append(make_engine(url))
    yield found
    for engine in found:
        engine.dispose()


@pytest.mark.parametrize(
    "statement",
    [
        'SELECT * FROM "{other}".ledger',
        'SELECT * FROM "{other}_mlflow".anything',
        'INSERT INTO "{other}".serving (project, rollout_id) VALUES (1, 1)',
        'CREATE TABLE "{other}".mine (x INTEGER)',
        'LOCK TABLE "{other}".perennial_version IN SHARE ROW EXCLUSIVE MODE',
        "CREATE TABLE public.mine (x INTEGER)",
        "CREATE TEMPORARY TABLE mine (x INTEGER)",
        "CREATE SCHEMA mine",
        "CREATE ROLE mine",
        'SET ROLE "{other}"',
        "SELECT * FROM pg_authid",
    ],
)
def test_a_tenant_cannot(postgres, two, statement):
    first, _ = two

    with pytest.raises(ProgrammingError) as told, migrating(first) as connection:
        connection.exec_driver_sql(statement.format(other=f"{postgres.name}-second"))

    assert told.value.orig.sqlstate == INSUFFICIENT_PRIVILEGE


def test_the_same_code_keeps_two_tenants_apart(two):
    first, second = two

    rollouts.set_serving(first, "churn", 7)

    with reading(second) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM serving").scalar() == 0


def test_a_tenant_that_holds_its_locks_does_not_stop_another(two):
    first, second = two

    with first.begin() as greedy:
        greedy.exec_driver_sql("SELECT pg_advisory_lock(n) FROM generate_series(1, 99) AS n")
        began = time.monotonic()
        rollouts.set_serving(second, "churn", 1)
        Ledger(second).verify()

    assert time.monotonic() - began < 5


# By number, by the name of whatever is theirs, by a pair: all that a migration could ask for.
ADVISORY = """
SELECT pg_advisory_lock(key) FROM (
    SELECT n::bigint AS key FROM generate_series(0, 99) AS n
    UNION SELECT hashtext(name)::bigint FROM unnest(%(names)s::text[]) AS name
    UNION SELECT hashtextextended(name, 0) FROM unnest(%(names)s::text[]) AS name
) AS keys
"""
PAIRS = """
SELECT pg_advisory_lock(a, b) FROM generate_series(0, 9) AS a,
    (SELECT n AS b FROM generate_series(0, 9) AS n
     UNION SELECT hashtext(name) FROM unnest(%(names)s::text[]) AS name) AS seconds
"""


@pytest.mark.parametrize("made", [Postgres.tenant, Postgres.migrated], ids=["first", "later"])
def test_a_neighbour_that_holds_every_advisory_lock_holds_no_migration_up(postgres, made):
    role = f"{postgres.name}-second"
    of_role = [role, f'"{role}"', f"{role}.{VERSION_TABLE}", f'"{role}".{VERSION_TABLE}']
    names = [postgres.name, VERSION_TABLE, "perennial", "alembic", "alembic_version", *of_role]
    engine = open_engine(made(postgres, "second"))
    neighbour = postgres.tenant("first").replace("+psycopg", "").replace(" ", "%20")
    greedy = psycopg.connect(neighbour)
    for statement in (ADVISORY, PAIRS):
        greedy.execute(statement, {"names": names})
    began = time.monotonic()

    with closing(greedy):
        migrate(engine)

    assert time.monotonic() - began < 10
    engine.dispose()


def test_making_a_tenant_again_keeps_its_tables_and_sets_its_password(postgres, two):
    role = f"{postgres.name}-first"
    rollouts.set_serving(two[0], "churn", 1)

    tenant.make(postgres.admin_url, role, "another secret")

    engine = make_engine(tenant.state_url(postgres.admin_url, role, "another secret"))
    with reading(engine) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM serving").scalar() == 1
    engine.dispose()
    with pytest.raises(Unavailable, match="password authentication failed"):
        make_engine(tenant.state_url(postgres.admin_url, role, f"secret of {role}"))


def test_mlflow_of_a_tenant_has_a_schema_of_its_own(postgres, two):
    engine = create_engine(postgres.tracking_uri("first"))

    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT current_schema()").scalar()

    assert found == f"{postgres.name}-first_mlflow"
    engine.dispose()


def test_a_password_may_hold_any_character(postgres, two):
    role, odd = f"{postgres.name}-first", "p@ss:/%20? #&ü+'\""

    tenant.make(postgres.admin_url, role, odd)

    make_engine(tenant.state_url(postgres.admin_url, role, odd)).dispose()


@pytest.mark.parametrize("name", ["postgres", "pg_tenant", "Team", "a;b", "", "x" * 60])
def test_a_name_that_is_no_tenants_is_refused(postgres, name):
    with pytest.raises(BadInput, match="no tenant|cannot be called"):
        tenant.make(postgres.admin_url, name, "secret")


def test_the_command_makes_a_tenant_from_a_password_file(postgres, tmp_path: Path):
    role = f"{postgres.name}-told"
    postgres.roles.add(role)
    (tmp_path / "password").write_text("from-file\n")
    command = [sys.executable, "-m", "perennial.store.tenant", role, "--password-file"]
    env = {"PATH": os.environ["PATH"], "PERENNIAL_STATE_URL": postgres.admin_url}

    good, bad = (
        subprocess.run(
            [*command, str(tmp_path / name)], env=env, capture_output=True, text=True, check=False
        )
        for name in ("password", "none")
    )

    assert good.stdout == f"tenant {role} has the schemas {role} and {role}_mlflow\n", good.stderr
    assert (bad.returncode, "No such file" in bad.stderr) == (2, True)
    with psycopg.connect(
        tenant.state_url(postgres.admin_url, role, "from-file").replace("+psycopg", "")
    ) as connection:
        assert connection.execute("SELECT current_user").fetchone() == (role,)
