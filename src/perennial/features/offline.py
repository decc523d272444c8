"""Where are features joined to rows of the past: a bounded DuckDB, or a table of PostgreSQL?"""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perennial.data import duck
from perennial.features import config
from perennial.project import Project
from perennial.settings import Settings
from perennial.store import scratch

if TYPE_CHECKING:
    from feast import FeatureStore

_COPY = 10_000  # rows that are in Python's hands at a time


@contextlib.contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Let Feast's DuckDB spill into ``folder`` what does not fit into its share of memory."""
    import ibis

    before = ibis.options.default_backend
    with scratch.folder(folder) as near:
        backend = ibis.duckdb.connect(
            memory_limit=duck.MEMORY,
            temp_directory=str(near),
            threads=duck.THREADS,
        )
        ibis.set_backend(backend)
        try:
            yield
        finally:
            ibis.options.default_backend = before
            backend.disconnect()


def table(project: Project) -> str:
    """Name of the table that holds the rows on PostgreSQL."""
    return f"perennial_{config.identifier(project)}_rows"


def postgres_source(name: str, table_name: str) -> Any:
    """Feast's source over that table."""
    from feast.infra.offline_stores.contrib.postgres_offline_store.postgres_source import (
        PostgreSQLSource,
    )

    return PostgreSQLSource(name=name, table=table_name, timestamp_field="event_time")


def upload(settings: Settings, project: Project, rows: Path) -> None:
    """Put the rows of a Parquet file in the place of those on PostgreSQL, all of them or none."""
    import psycopg
    import pyarrow.parquet as pq
    from psycopg import sql

    place = config.postgres(settings)
    new, old = sql.Identifier(f"{table(project)}_new"), sql.Identifier(table(project))
    file = pq.ParquetFile(rows)
    columns = sql.SQL(", ").join(
        sql.SQL(f"{{}} {_type(field)}").format(sql.Identifier(field.name))
        for field in file.schema_arrow
    )
    with psycopg.connect(
        host=place["host"],
        port=place["port"],
        dbname=place["database"],
        user=place["user"],
        password=place["password"],
        options=f"-c search_path={place['db_schema']}",
        connect_timeout=10,
    ) as connection:
        cursor = connection.cursor()
        cursor.execute(sql.SQL("drop table if exists {}").format(new))
        cursor.execute(sql.SQL("create table {} ({})").format(new, columns))
        with cursor.copy(sql.SQL("copy {} from stdin").format(new)) as copy:
            for batch in file.iter_batches(_COPY):
                for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    copy.write_row(row)
        cursor.execute(sql.SQL("drop table if exists {}").format(old))
        cursor.execute(sql.SQL("alter table {} rename to {}").format(new, old))


def stores_fail() -> tuple[type[Exception], ...]:
    """How Redis, PostgreSQL and SQLite say that they do not answer."""
    import psycopg
    import redis
    from sqlalchemy.exc import OperationalError

    return (redis.RedisError, psycopg.OperationalError, OperationalError, sqlite3.DatabaseError)


def let_read(database: Path) -> None:
    """Let a feature server read SQLite while rows are written."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("pragma journal_mode = wal")


def close(store: "FeatureStore") -> None:
    """Close what Feast opens and leaves to the end of the process."""
    # Not by its properties: they would open what was never opened, or could not be.
    registry: Any = getattr(store, "_registry", None)
    if registry is not None:
        registry.write_engine.dispose()
    online: Any = getattr(getattr(store, "_provider", None), "_online_store", None)
    if (sqlite := getattr(online, "_conn", None)) is not None:
        sqlite.close()
    if (client := getattr(online, "_client", None)) is not None:
        client.close()


def _type(field: Any) -> str:
    import pyarrow as pa

    if pa.types.is_timestamp(field.type):
        return "timestamptz"
    if pa.types.is_integer(field.type):
        return "bigint"
    return "double precision" if pa.types.is_floating(field.type) else "text"
