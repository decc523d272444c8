"""How is the database opened: one factory, durable commits, and writers that queue up."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DatabaseError

from perennial.errors import Unavailable
from perennial.store import tables

BUSY_S = 30


def make_engine(url: str) -> Engine:
    """Open the database at ``url``; its folder and tables are made when they are missing."""
    address = make_url(url)
    if address.get_backend_name() != "sqlite" or not address.database:
        engine = create_engine(address)
        tables.metadata.create_all(engine)
        return engine
    Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _prepare)
    event.listen(engine, "begin", _begin)
    try:
        _create_tables(engine)
    except DatabaseError as exc:
        raise Unavailable(
            f"{address.database} cannot be used as the state database: {exc.orig}; if it is"
            " damaged, move it away and begin anew"
        ) from exc
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that only reads, and so waits for no writer; ``engine.begin()`` writes."""
    with engine.connect() as connection:
        yield connection.execution_options(perennial_reads=True)


def _prepare(connection: Any, _record: Any) -> None:
    # None: the driver begins nothing by itself, so that _begin decides how.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin(connection: Connection) -> None:
    # A writer takes its lock at once: read-then-write can neither race nor fail half way.
    reads = connection.get_execution_options().get("perennial_reads", False)
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _create_tables(engine: Engine) -> None:
    with reading(engine) as connection:
        if _schema(connection) == tables.SCHEMA:
            return
    with engine.begin() as connection:
        if _schema(connection) != tables.SCHEMA:
            tables.metadata.create_all(connection)
            connection.exec_driver_sql(f"PRAGMA user_version={tables.SCHEMA}")


def _schema(connection: Connection) -> int:
    return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
