"""How is the database opened: one factory, durable commits, and writers that queue up."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import PoolProxiedConnection, QueuePool

from perennial.errors import BadInput, Unavailable
from perennial.store import schema, tables, urls

BUSY_S = 30
# Connections that one process keeps, and takes beyond that while it is busy. Writers queue anyhow,
# and all pods of a tenant share what its role may have (docs/state.md).
KEPT, BEYOND = 2, 1
POSTGRES = "postgresql+psycopg"

_kept: dict[str, Engine] = {}
_KEEPING = threading.Lock()

_READ, _WRITE, _MIGRATE = "read", "write", "migrate"
_QUEUE = f"SET LOCAL lock_timeout = '{BUSY_S}s'; "
# A lock on a table of one's own: another tenant could take and keep an advisory one.
_TURN = f"LOCK TABLE {schema.VERSION_TABLE} IN SHARE ROW EXCLUSIVE MODE"
# The table of the first migration, which waits here for another that makes it at the same time.
_MADE = f"""
DO $$ BEGIN
    CREATE TABLE IF NOT EXISTS {schema.VERSION_TABLE} (
        version_num VARCHAR(32) NOT NULL CONSTRAINT {schema.VERSION_TABLE}_pkc PRIMARY KEY);
EXCEPTION WHEN unique_violation OR duplicate_table OR duplicate_object THEN NULL;
END $$; """
# How a transaction begins. A writer waits for its turn at once, so that read-then-write can
# neither race nor fail half way; a reader waits for nobody and sees one moment of all tables.
_BEGIN = {
    "sqlite": {_READ: "BEGIN", _WRITE: "BEGIN IMMEDIATE", _MIGRATE: "BEGIN IMMEDIATE"},
    "postgresql": {
        _READ: "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY",
        _WRITE: f"{_QUEUE}{_TURN}",
        _MIGRATE: f"{_QUEUE}{_MADE}{_TURN}",
    },
}
_FULL = "too many connections for role"  # what the server says, in a message without a code
_LOCK_NOT_AVAILABLE = "55P03"
# A server that vanished is noticed within half a minute, not after two hours of TCP.
_POSTGRES_ARGS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 25_000,
    "application_name": "perennial",
    # A pooler between us and the server keeps no prepared statements.
    "prepare_threshold": None,
}


def make_engine(url: str) -> Engine:
    """Open the database at ``url``; SQLite's folder and tables are made when they are missing.

    Raises Unavailable when it does not answer, or when PostgreSQL's tables are not there yet.
    """
    engine = open_engine(url)
    if engine.dialect.name == "sqlite":
        _make_tables(engine)
    else:
        _require_tables(engine)
    return engine


def kept_engine(url: str) -> Engine:
    """The one engine of a long-lived process for a database, open until the process ends."""
    with _KEEPING:
        if url not in _kept:
            _kept[url] = make_engine(url)
        return _kept[url]


@contextmanager
def borrowed(url: str) -> Iterator[Engine]:
    """The engine that this process keeps for a database, else one for as long as the block."""
    if url in _kept:
        yield _kept[url]
        return
    engine = make_engine(url)
    try:
        yield engine
    finally:
        engine.dispose()


def open_engine(url: str) -> Engine:
    """Open the database at ``url`` with the tables that it has, or has not."""
    address = _address(url)
    engine = _sqlite(address) if address.get_backend_name() == "sqlite" else _postgres(address)
    event.listen(engine, "begin", _begin)
    return engine


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A connection that only reads, and so waits for no writer; ``engine.begin()`` writes."""
    with engine.connect() as connection:
        yield connection.execution_options(perennial_transaction=_READ)


@contextmanager
def migrating(engine: Engine) -> Iterator[Connection]:
    """A connection that changes tables, one at a time."""
    with engine.execution_options(perennial_transaction=_MIGRATE).begin() as connection:
        yield connection


def shown(engine: Engine) -> str:
    """Where a database is, without its password."""
    return str(engine.url.database if engine.dialect.name == "sqlite" else engine.url)


def _address(url: str) -> URL:
    wanted = f"wanted such as {POSTGRES}://role:password@host:5432/database"
    try:
        address = urls.parse(url)
    except (ArgumentError, ValueError) as exc:
        fault = "its port is no number" if isinstance(exc, ValueError) else "it is no URL"
        # Not from exc: what it quotes may be a piece of the password.
        raise BadInput(
            f"PERENNIAL_STATE_URL is {_redacted(url)}: {fault}; {wanted}; fill in every variable,"
            f" and {urls.ESCAPES}"
        ) from None
    kind = address.get_backend_name()
    if kind == "postgresql":
        return address.set(drivername=POSTGRES)
    if kind == "sqlite" and address.database:
        return address
    raise BadInput(f"the state database cannot be {kind}; {wanted}")


def _redacted(url: str) -> str:
    """As much of a URL that cannot be parsed as is surely no password."""
    found = re.fullmatch(r"([\w+]+)://[^@?]*@([^@?]*)(?:\?[^@]*)?", url)
    return f"{found[1]}://***@{found[2]}" if found else "'***'"


def _sqlite(address: URL) -> Engine:
    Path(str(address.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(address, connect_args={"timeout": BUSY_S})
    event.listen(engine, "connect", _prepare)
    return engine


def _postgres(address: URL) -> Engine:
    engine = create_engine(
        address,
        connect_args=_POSTGRES_ARGS,
        poolclass=_Pool,
        pool_pre_ping=True,
        pool_size=KEPT,
        max_overflow=BEYOND,
        pool_timeout=BUSY_S,
    )
    event.listen(engine, "handle_error", _translate)
    return engine


class _Pool(QueuePool):
    """Waits for a connection that another thread gives back, as writers wait for their turn."""

    def connect(self) -> PoolProxiedConnection:
        try:
            return super().connect()
        except PoolTimeout as exc:
            raise Unavailable(
                f"the {KEPT + BEYOND} connections of this process to the state database were busy"
                f" for {BUSY_S} s"
            ) from exc


def _prepare(connection: Any, _record: Any) -> None:
    # None: the driver begins nothing by itself, so that _begin decides how.
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")


def _begin(connection: Connection) -> None:
    how = connection.get_execution_options().get("perennial_transaction", _WRITE)
    connection.exec_driver_sql(_BEGIN[connection.dialect.name][how])


def _translate(context: ExceptionContext) -> None:
    fault = context.sqlalchemy_exception
    if context.is_pre_ping or not isinstance(fault, OperationalError | InterfaceError):
        return
    where = context.engine.url if context.engine else "?"
    said = " ".join(str(context.original_exception).split())
    if _FULL in said:
        raise Unavailable(
            f"the state database {where} gives this role no further connection: its pods use all"
            " that it may have; this passes, or the role needs more (docs/state.md)"
        )
    if getattr(context.original_exception, "sqlstate", None) == _LOCK_NOT_AVAILABLE:
        raise Unavailable(
            f"the state database {where} cannot be used now: another writer or migration of this"
            f" role did not end within {BUSY_S} s ({said}); try again"
        )
    raise Unavailable(f"the state database {where} cannot be used now: {said}")


def _make_tables(engine: Engine) -> None:
    try:
        with reading(engine) as connection:
            if schema.is_current(connection):
                return
        with migrating(engine) as connection:
            if not schema.is_current(connection):
                schema.upgrade(connection)
    except DatabaseError as exc:
        raise Unavailable(
            f"{shown(engine)} cannot be used as the state database: {exc.orig}; if it is"
            " damaged, move it away and begin anew"
        ) from exc


def _require_tables(engine: Engine) -> None:
    with reading(engine) as connection:
        if schema.is_current(connection):
            return
        found = schema.version(connection)
    engine.dispose()
    raise Unavailable(
        f"the tables at {shown(engine)} have version {found}, wanted {tables.SCHEMA}; run"
        " 'python -m perennial.store.migrate' and try again"
    )
