"""The database: durable, one writer at a time, readers that see one moment, faults told."""

import json
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import IntegrityError, ProgrammingError

from perennial.errors import BadInput, Unavailable
from perennial.store import engine as engines
from perennial.store import rollouts
from perennial.store.engine import make_engine, open_engine, reading

OPEN = """
import sys
from perennial.store import rollouts
from perennial.store.engine import make_engine
engine = make_engine(sys.argv[1])
for k in range(20):
    rollouts.set_serving(engine, sys.argv[2], k)
"""
ENTRY = "INSERT INTO ledger VALUES (1, 'a', NULL, 'k', 'p', 's', '{}', 'x', 'y')"
SERVES = "INSERT INTO serving (project, rollout_id) VALUES ('p', 1)"
COUNT = "SELECT count(*) FROM serving"
# A cluster that is configured; nobody answers there.
KUBECONFIG = json.dumps(
    {
        "current-context": "a",
        "clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:9"}}],
        "users": [{"name": "a", "user": {}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a", "namespace": "n"}}],
    }
)


def test_a_commit_is_on_the_disk_before_it_returns(tmp_path: Path):
    engine = make_engine(f"sqlite:///{tmp_path}/deep/state.db")

    with engine.connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
        timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()

    assert (mode, synchronous, timeout) == ("wal", 2, 30_000)


def test_a_reader_waits_for_no_writer_and_sees_only_what_is_committed(engine: Engine):
    with engine.begin() as writer, reading(engine) as reader:
        writer.exec_driver_sql(SERVES)
        seen = reader.exec_driver_sql(COUNT).scalar()

    assert seen == 0


def test_a_reader_sees_one_moment_of_all_tables(engine: Engine):
    with reading(engine) as reader:
        before = reader.exec_driver_sql(COUNT).scalar()
        with engine.begin() as writer:
            writer.exec_driver_sql(SERVES)
        after = reader.exec_driver_sql(COUNT).scalar()

    assert (before, after) == (0, 0)


def test_a_second_writer_reads_what_the_first_one_wrote(engine: Engine):
    """Read, wait, write: without a queue both would read 0 and one number would be lost."""
    seen: list[int] = []

    def count_up() -> None:
        for _ in range(5):
            with engine.begin() as connection:
                seen.append(connection.exec_driver_sql(COUNT).scalar_one())
                time.sleep(0.01)
                connection.exec_driver_sql(SERVES)

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(seen) == list(range(20))


def test_processes_that_open_a_new_database_at_once_all_succeed(database_url: str):
    children = [
        subprocess.Popen([sys.executable, "-c", OPEN, database_url, f"p{n}"]) for n in range(4)
    ]
    codes = [child.wait(timeout=120) for child in children]

    engine = make_engine(database_url)
    with reading(engine) as connection:
        rows = connection.exec_driver_sql(COUNT).scalar()
    engine.dispose()

    assert codes == [0, 0, 0, 0]
    assert rows == 80


@pytest.mark.parametrize("change", ["UPDATE ledger SET body = '{}'", "DELETE FROM ledger"])
def test_the_database_itself_refuses_to_change_a_ledger_entry(engine: Engine, change: str):
    with engine.begin() as connection:
        connection.exec_driver_sql(ENTRY)

    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(change)


@pytest.mark.stores
def test_postgresql_refuses_to_empty_the_ledger_too(tenant_url: str):
    engine = make_engine(tenant_url)

    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql("TRUNCATE ledger")
    engine.dispose()


@pytest.mark.stores
def test_a_reader_on_postgresql_cannot_write(tenant_url: str):
    engine = make_engine(tenant_url)

    with pytest.raises(Exception, match="read-only transaction"), reading(engine) as connection:
        connection.exec_driver_sql(SERVES)
    engine.dispose()


@pytest.mark.stores
def test_tables_that_are_not_there_are_told_with_the_command_that_makes_them(postgres):
    url = postgres.tenant("empty")

    with pytest.raises(Unavailable, match="have version 0, wanted .* perennial.store.migrate"):
        make_engine(url)


@pytest.mark.stores
def test_tables_of_an_older_release_are_told_and_newer_ones_are_used(tenant_url, monkeypatch):
    monkeypatch.setattr(engines.tables, "SCHEMA", engines.tables.SCHEMA + 1)
    with pytest.raises(Unavailable, match="perennial.store.migrate"):
        make_engine(tenant_url)

    monkeypatch.setattr(engines.tables, "SCHEMA", 1)
    make_engine(tenant_url).dispose()


@pytest.mark.stores
def test_a_lost_connection_is_unavailable_once_and_mended_then(postgres, tenant_url: str):
    engine = make_engine(tenant_url)
    with pytest.raises(Unavailable, match="cannot be used now: terminating"), reading(engine) as c:
        pid = c.exec_driver_sql("SELECT pg_backend_pid()").scalar()
        postgres.run(f"SELECT pg_terminate_backend({pid})")
        c.exec_driver_sql(COUNT)

    rollouts.set_serving(engine, "p", 1)

    with reading(engine) as connection:
        assert connection.exec_driver_sql(COUNT).scalar() == 1
    engine.dispose()


@pytest.mark.stores
def test_connections_that_died_unused_are_not_noticed_by_a_writer(postgres, tenant_url: str):
    engine = make_engine(tenant_url)
    rollouts.set_serving(engine, "p", 1)
    postgres.run(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name='perennial'"
        " AND datname=current_database()"
    )

    rollouts.set_serving(engine, "p", 2)

    engine.dispose()


@pytest.mark.stores
def test_a_writer_that_waits_too_long_is_told_to_try_again(tenant_url: str, monkeypatch):
    begin = engines._BEGIN["postgresql"]
    monkeypatch.setitem(begin, "write", begin["write"].replace("'30s'", "'200ms'"))
    engine = make_engine(tenant_url)

    with (
        pytest.raises(Unavailable, match="cannot be used now: .*lock timeout"),
        engine.begin(),
        engine.begin(),
    ):
        pass
    engine.dispose()


@pytest.mark.stores
def test_a_mistake_of_ours_is_no_outage(tenant_url: str):
    engine = make_engine(tenant_url)

    with pytest.raises(ProgrammingError), engine.begin() as connection:
        connection.exec_driver_sql("SELECT * FROM no_such_table")
    engine.dispose()


def test_a_database_that_does_not_answer_is_told_without_its_password():
    with pytest.raises(Unavailable, match=r"role:\*\*\*@127.0.0.1:9/db cannot be used") as told:
        make_engine("postgresql://role:hidden@127.0.0.1:9/db")

    assert "hidden" not in str(told.value)


@pytest.mark.parametrize("url", ["mysql://a:hidden@b/c", "no url with hidden", "sqlite://"])
def test_a_database_of_another_kind_is_refused_without_its_password(url: str):
    with pytest.raises(BadInput, match=r"wanted such as postgresql\+psycopg://role:pass") as told:
        open_engine(url)

    assert "hidden" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hidden@host:${PORT}/db", "postgresql://***@host:${PORT}/db"),
        ("postgresql://u:p@host:x/db?password=hidden", "postgresql://***@host:x/db"),
        ("postgresql://u:p@rt:hidden@host/db", "'***'"),
        ("postgresql://u:p?hidden@host:x/db", "'***'"),
        ("postgresql://u:hidden/db", "'***'"),
    ],
    ids=[
        "a variable that no shell filled in",
        "the password in the query",
        "a password with an @",
        "a password with a question mark",
        "no host",
    ],
)
def test_a_port_that_is_no_number_is_told_without_the_password(url: str, shown: str):
    with pytest.raises(BadInput) as told:
        open_engine(url)

    assert str(told.value).startswith(f"PERENNIAL_STATE_URL is {shown}: its port is no number;")
    assert "fill in every variable" in str(told.value)
    assert "hidden" not in "".join(traceback.format_exception(told.value))


@pytest.mark.parametrize("rest", ["hidden@127.0.0.1:9/db", "hidden/more@127.0.0.1:9/db"])
def test_a_password_with_an_at_is_refused_and_no_piece_of_it_told(rest: str):
    with pytest.raises(BadInput, match=r"it is no URL; .* @ : / \? of a password as %40") as told:
        open_engine(f"postgresql://role:p@{rest}")

    assert "hidden" not in "".join(traceback.format_exception(told.value))


PROGRAMS = [
    ("perennial.cli", "doctor", "--cluster"),
    ("perennial.store.migrate",),
    ("perennial.rollout.operator", "--health-port", "0"),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=["the doctor", "migrate", "the operator"])
def test_a_url_with_a_variable_in_it_ends_with_2(tmp_path: Path, program: tuple[str, ...]):
    (tmp_path / "config").write_text(KUBECONFIG)
    env = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "COLUMNS": "1000",
        "KUBECONFIG": str(tmp_path / "config"),
        "PERENNIAL_STATE_URL": "postgresql+psycopg://u:hidden@host:${PORT}/db",
    }

    done = subprocess.run(
        [sys.executable, "-m", *program], env=env, capture_output=True, text=True, check=False
    )

    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "PERENNIAL_STATE_URL is postgresql+psycopg://***@host:${PORT}/db" in said
    assert "Traceback" not in said
    assert "hidden" not in said
