"""What does a database answer? Rows of a query in batches, without keeping them all."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
from sqlalchemy import URL, Connection, create_engine
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

from perennial.data.delimited import BATCH
from perennial.data.places import first_line
from perennial.errors import BadInput, Unavailable
from perennial.store import urls

_POSTGRES = "postgresql+psycopg"
_TELL = "give source.url or PERENNIAL_SOURCE_URL such as postgresql://role@host:5432/database"
_CONNECT_S = 10
_PASSING = ("08", "40", "53", "57")  # SQLSTATE: connection, conflict, resources, operator
# The row order of a large table is no chance then, as far as the server can see to it.
_STEADY = "SET LOCAL synchronize_seqscans = off"


class Answer:
    """The names of a query's columns, and its rows in batches of Arrow."""

    def __init__(self, names: Sequence[str], batches: Iterator[pa.RecordBatch]) -> None:
        self.names = tuple(names)
        self.batches = batches


@contextmanager
def answer(url: str, query: str, base: Path) -> Iterator[Answer]:
    """Ask a database; a relative path of SQLite starts at ``base``. Nothing can be written.

    Raises BadInput for a URL or query that is wrong, Unavailable when the database does not answer.
    No message tells a password.
    """
    address = _address(url, base)
    with _faults(address):
        engine = create_engine(address, poolclass=NullPool, connect_args=_arguments(address))
        with engine.connect() as connection, closing(_ask(connection, query)) as found:
            names = list(found.keys())
            if len(set(names)) < len(names):
                raise BadInput(f"source.query gives two columns of one name: {', '.join(names)}")
            yield Answer(names, _batches(names, found))


def _ask(connection: Connection, query: str) -> Any:
    if connection.dialect.name == "postgresql":
        connection.execution_options(postgresql_readonly=True)
        connection.exec_driver_sql(_STEADY)
    # Without parameters a % in the query is what it says.
    how = {"stream_results": True, "max_row_buffer": BATCH, "no_parameters": True}
    found = connection.execution_options(**how).exec_driver_sql(query)
    if not found.returns_rows:
        raise BadInput("source.query gives no rows; wanted a SELECT")
    return found


def _batches(names: Sequence[str], found: Any) -> Iterator[pa.RecordBatch]:
    for rows in found.partitions(BATCH):
        columns = [array(values) for values in zip(*rows, strict=True)]
        yield pa.RecordBatch.from_arrays(columns, names=list(names))


def array(values: Sequence[Any]) -> pa.Array:
    """Values of one type as such, all as texts where they differ."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return pa.array([None if v is None else str(v) for v in values], pa.string())


def _address(url: str, base: Path) -> URL:
    try:
        address = urls.parse(url)
    except (ArgumentError, ValueError):
        # Not from exc: what it quotes may be a piece of the password.
        raise BadInput(
            f"the URL of the source is no URL of a database; {_TELL}, and {urls.ESCAPES}"
        ) from None
    kind = address.get_backend_name()
    if kind == "postgresql":
        return address.set(drivername=_POSTGRES)
    if kind != "sqlite":
        return address
    path = base / str(address.database or "")
    if not path.is_file():
        raise BadInput(f"no SQLite file at {path}; mend source.url")
    return address.set(database=path.resolve().as_uri(), query={"mode": "ro", "uri": "true"})


def _arguments(address: URL) -> dict[str, Any]:
    if address.get_backend_name() == "postgresql":
        return {"connect_timeout": _CONNECT_S, "application_name": "perennial"}
    return {}


@contextmanager
def _faults(address: URL) -> Iterator[None]:
    where = f"{address.get_backend_name()} at {address.host or 'this machine'}"
    try:
        yield
    except (NoSuchModuleError, ImportError) as exc:
        raise BadInput(f"there is no driver for {address.drivername}; {_TELL}") from exc
    except DBAPIError as exc:
        said = first_line(exc.orig or exc)
        if _is_away(address, exc):
            raise Unavailable(f"the source, {where}, cannot be read now: {said}") from None
        raise BadInput(f"source.query fails in {where}: {said}; mend it") from None
    except SQLAlchemyError as exc:
        raise BadInput(f"the source, {where}, cannot be read: {first_line(exc)}") from None


def _is_away(address: URL, exc: DBAPIError) -> bool:
    """Is it the server's fault, which passes, rather than the query's?"""
    if address.get_backend_name() == "sqlite":
        return "locked" in str(exc.orig)
    code = getattr(exc.orig, "sqlstate", None)
    if code is None:
        return exc.connection_invalidated or isinstance(exc, OperationalError)
    return str(code)[:2] in _PASSING
