"""Tables are made step by step, end as the code describes them, and are made once."""

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from launchers import eventually
from sqlalchemy import Engine

from perennial.errors import BadInput, Unavailable
from perennial.store import engine as engines
from perennial.store import rollouts, schema, tables
from perennial.store.engine import make_engine, migrating, open_engine, reading
from perennial.store.migrate import await_tables, migrate

COMMAND = [sys.executable, "-m", "perennial.store.migrate"]

# What the first release made on one machine, word for word where later changes build on it.
FIRST = """
CREATE TABLE rollouts (
    id INTEGER NOT NULL PRIMARY KEY, project TEXT NOT NULL, version INTEGER NOT NULL,
    digest TEXT NOT NULL, bundle_uri TEXT NOT NULL, run_id TEXT NOT NULL, phase TEXT NOT NULL,
    step INTEGER NOT NULL, weight INTEGER NOT NULL, reason TEXT NOT NULL,
    UNIQUE (project, run_id, digest));
CREATE TABLE serving (
    seq INTEGER NOT NULL PRIMARY KEY, project TEXT NOT NULL, rollout_id INTEGER NOT NULL);
INSERT INTO rollouts VALUES
    (1, 'churn', 1, 'sha256:1', 'file:///b', 'run-1', 'promoted', 0, 100, 'took all traffic');
INSERT INTO serving VALUES (1, 'churn', 1);
PRAGMA user_version = 1;
"""


def run_migrate(url: str) -> "subprocess.CompletedProcess[str]":
    env = {"PATH": os.environ["PATH"], "PERENNIAL_STATE_URL": url}
    return subprocess.run(COMMAND, env=env, capture_output=True, text=True, check=False)


def default_differs(_context, _seen, _wanted, seen_default, _plain, wanted_default) -> bool:
    """Alembic's own comparison takes '' on SQLite for no default at all."""

    def bare(text: str | None) -> str | None:
        return None if text is None else text.split("::")[0].strip("()'")

    return bare(seen_default) != bare(wanted_default)


def test_migrated_tables_are_those_of_the_code(engine: Engine):
    options = {"compare_type": True, "compare_server_default": default_differs}
    with reading(engine) as connection:
        context = MigrationContext.configure(
            connection, opts={**options, "version_table": schema.VERSION_TABLE}
        )
        differences = compare_metadata(context, tables.metadata)

    assert differences == []


def test_the_newest_migration_is_the_version_that_the_code_wants():
    script = ScriptDirectory(str(schema.MIGRATIONS))

    assert script.get_heads() == [f"{tables.SCHEMA:04d}"]
    assert len(list(script.walk_revisions())) == tables.SCHEMA


def test_a_state_of_the_first_release_is_changed_and_keeps_what_it_knows(tmp_path: Path):
    database = tmp_path / "state.db"
    with sqlite3.connect(database) as old:
        old.executescript(FIRST)
    old.close()

    engine = make_engine(f"sqlite:///{database}")

    serving = rollouts.serving(engine, "churn")
    assert serving is not None
    assert (serving.digest, serving.limits) == ("sha256:1", "{}")
    with reading(engine) as connection:
        assert schema.version(connection) == tables.SCHEMA


def test_a_change_that_fails_half_way_changes_nothing(tmp_path: Path):
    database = tmp_path / "state.db"
    with sqlite3.connect(database) as old:
        old.executescript(FIRST + "CREATE TABLE edge_files (in_the_way INTEGER);")
    old.close()

    with pytest.raises(Exception, match="edge_files already exists"):
        make_engine(f"sqlite:///{database}")

    with sqlite3.connect(database) as found:
        columns = [row[1] for row in found.execute("PRAGMA table_info(rollouts)")]
    found.close()
    assert "limits" not in columns


@pytest.mark.stores
def test_the_command_makes_the_tables_once_and_says_their_version(postgres):
    url = postgres.tenant("migrated")

    first, second = run_migrate(url), run_migrate(url)

    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.endswith(f" have version {tables.SCHEMA}\n")
    assert "secret" not in first.stdout + first.stderr
    make_engine(url).dispose()


@pytest.mark.stores
def test_several_that_migrate_at_once_all_succeed(postgres):
    url = postgres.tenant("crowd")
    found: list[int] = []

    def one() -> None:
        engine = open_engine(url)
        found.append(migrate(engine))
        engine.dispose()

    threads = [threading.Thread(target=one) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == [tables.SCHEMA] * 5


@pytest.mark.stores
@pytest.mark.parametrize("first_fails", [False, True], ids=["succeeds", "fails"])
def test_who_migrates_an_empty_schema_waits_for_the_other_that_does_and(postgres, first_fails):
    url = postgres.tenant("pair")
    engine = open_engine(url)
    found: list[int] = []
    second = threading.Thread(target=lambda: found.append(migrate(engine)))

    with suppress(Interrupted), migrating(engine) as first:
        second.start()
        assert eventually(lambda: waits_for_a_lock(postgres))
        schema.upgrade(first)
        if first_fails:
            raise Interrupted
    second.join()

    assert found == [tables.SCHEMA]
    engine.dispose()
    make_engine(url).dispose()


class Interrupted(Exception):
    """A migration ends half way."""


def waits_for_a_lock(postgres) -> bool:
    query = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    with psycopg.connect(postgres.admin_url) as connection:
        return connection.execute(query).fetchone() == (1,)


@pytest.mark.stores
def test_a_migration_that_waits_too_long_for_another_is_told_to_try_again(postgres, monkeypatch):
    begin = engines._BEGIN["postgresql"]
    monkeypatch.setitem(begin, "migrate", begin["migrate"].replace("'30s'", "'200ms'"))
    engine = open_engine(postgres.tenant("held"))

    for _ in ("the table of the versions is not there yet", "it is"):
        told = "cannot be used now: another writer or migration of this role did not end"
        with migrating(engine), pytest.raises(Unavailable, match=told):
            migrate(engine)
    engine.dispose()


@pytest.mark.stores
def test_readers_do_not_wait_for_a_migration(postgres):
    url = postgres.migrated("read")
    engine = open_engine(url)

    with migrating(engine):
        make_engine(url).dispose()
    engine.dispose()


@pytest.mark.stores
def test_a_role_without_a_schema_is_told_what_makes_one(postgres):
    url = postgres.tenant("homeless")
    postgres.run(f'DROP SCHEMA "{postgres.name}-homeless"')
    engine = open_engine(url)

    with pytest.raises(BadInput, match="'python -m perennial.store.tenant' makes one"):
        migrate(engine)
    engine.dispose()


@pytest.mark.stores
def test_a_change_on_postgresql_is_whole_or_absent(postgres):
    engine = open_engine(postgres.tenant("half"))
    with migrating(engine) as connection:
        connection.exec_driver_sql("CREATE TABLE edge_files (in_the_way INTEGER)")

    with pytest.raises(BadInput, match="edge_files.*already exists"):
        migrate(engine)

    with reading(engine) as connection:
        assert schema.version(connection) == 0
    engine.dispose()


@pytest.mark.slow
def test_a_database_that_starts_later_is_awaited_and_a_missing_one_is_told(tmp_path: Path):
    short = (
        "import sys; from perennial.store import migrate\nmigrate.WAIT_S = 3.0\n"
        "sys.exit(migrate.main())"
    )
    env = {
        "PATH": os.environ["PATH"],
        "PERENNIAL_STATE_URL": "postgresql://role:hidden@127.0.0.1:9/db",
    }

    done = subprocess.run(
        [sys.executable, "-c", short], env=env, capture_output=True, text=True, check=False
    )

    assert done.returncode == 3
    assert done.stderr.count("trying again") >= 2
    assert "hidden" not in done.stderr


@pytest.mark.stores
def test_tables_that_come_later_are_awaited_and_missing_ones_are_told(postgres):
    url = postgres.tenant("early")
    with pytest.raises(Unavailable, match="have version 0, wanted"):
        await_tables(url, wait_s=0)

    def make() -> None:
        engine = open_engine(url)
        migrate(engine)
        engine.dispose()

    later = threading.Timer(1.5, make)
    later.start()

    await_tables(url, wait_s=30)

    make_engine(url).dispose()
    later.join()


def test_without_a_url_there_is_nothing_to_migrate_by_hand():
    done = run_migrate("")

    assert done.returncode == 2
    assert "PERENNIAL_STATE_URL is empty" in done.stderr
