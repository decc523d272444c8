"""The database: durable settings, several processes at once, and the tables made once."""

import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from perennial.store.engine import make_engine, reading

OPEN = """
import sys
from perennial.store import rollouts
from perennial.store.engine import make_engine
engine = make_engine(sys.argv[1])
for k in range(20):
    rollouts.set_serving(engine, sys.argv[2], k)
"""


def url(folder: Path) -> str:
    return f"sqlite:///{folder}/deep/state.db"


def test_a_commit_is_on_the_disk_before_it_returns(tmp_path: Path):
    engine = make_engine(url(tmp_path))

    with engine.connect() as connection:
        mode = connection.exec_driver_sql("PRAGMA journal_mode").scalar()
        synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar()
        timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar()

    assert (mode, synchronous, timeout) == ("wal", 2, 30_000)


def test_a_reader_waits_for_no_writer_and_sees_only_what_is_committed(tmp_path: Path):
    engine = make_engine(url(tmp_path))
    other = make_engine(url(tmp_path))

    with engine.begin() as writer, reading(other) as reader:
        writer.exec_driver_sql("INSERT INTO serving (project, rollout_id) VALUES ('p', 1)")
        seen = reader.exec_driver_sql("SELECT count(*) FROM serving").scalar()

    assert seen == 0


def test_processes_that_open_a_new_database_at_once_all_succeed(tmp_path: Path):
    children = [
        subprocess.Popen([sys.executable, "-c", OPEN, url(tmp_path), f"p{n}"]) for n in range(4)
    ]
    codes = [child.wait(timeout=60) for child in children]

    with reading(make_engine(url(tmp_path))) as connection:
        rows = connection.exec_driver_sql("SELECT count(*) FROM serving").scalar()

    assert codes == [0, 0, 0, 0]
    assert rows == 80


@pytest.mark.parametrize("change", ["UPDATE ledger SET body = '{}'", "DELETE FROM ledger"])
def test_the_database_itself_refuses_to_change_a_ledger_entry(tmp_path: Path, change: str):
    engine = make_engine(url(tmp_path))
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO ledger VALUES (1, 'a', NULL, 'k', 'p', 's', '{}', 'x', 'y')"
        )

    with pytest.raises(IntegrityError, match="append-only"), engine.begin() as connection:
        connection.exec_driver_sql(change)
