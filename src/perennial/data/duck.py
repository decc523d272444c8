"""How is DuckDB opened, so that it stays within a bound of memory and tells times in UTC?"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perennial.errors import RunFailed
from perennial.store import files, scratch

MEMORY = "1500MB"
THREADS = 2
_BATCH = 100_000  # rows that are in Python's hands at a time


@contextmanager
def connected(near: Path, memory: str = MEMORY) -> Iterator[Any]:
    """A connection that spills into ``near`` (a folder) what does not fit into ``memory``.

    Raises RunFailed when neither has room.
    """
    import duckdb

    config: Any = {
        "memory_limit": memory,
        "temp_directory": str(near),
        "threads": THREADS,
        # Nothing is fetched from anywhere, whatever a query asks for.
        "autoinstall_known_extensions": False,
    }
    connection = duckdb.connect(config=config)
    try:
        connection.execute("set timezone = 'UTC'")
        yield connection
    except (duckdb.OutOfMemoryException, duckdb.IOException) as exc:
        said = " ".join(str(exc).split())[:300]
        raise RunFailed(
            f"the rows do not fit: {said}; give {near} more disk or the step more memory"
        ) from exc
    finally:
        connection.close()


@contextmanager
def over(frames: Mapping[str, Any], memory: str = MEMORY) -> Iterator[Any]:
    """A connection over frames or Arrow tables that are in memory, each a view by its name.

    What it makes of them is bounded like ``connected``, and spills into the machine's folder for
    such.
    """
    with scratch.folder() as near, connected(near, memory) as connection:
        for name, frame in frames.items():
            connection.register(name, frame)
        yield connection


def view(connection: Any, name: str, file: Path) -> None:
    """Let ``name`` be the rows of a Parquet file; nothing is read yet."""
    connection.execute(f"create or replace temp view {name} as from read_parquet({quoted(file)})")


def quoted(text: object) -> str:
    """A text as SQL."""
    return "'" + str(text).replace("'", "''") + "'"


def column(name: str) -> str:
    """A column's name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def write(connection: Any, sql: str, path: Path) -> int:
    """Write what a query gives to a Parquet file: whole under its name or not at all.

    The same rows in the same order give the same bytes. Gives the number of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    reader = connection.execute(sql).to_arrow_reader(_BATCH)
    rows = 0
    try:
        with pq.ParquetWriter(draft, reader.schema, compression="zstd") as writer:
            for batch in reader:
                writer.write_table(pa.Table.from_batches([batch]), row_group_size=_BATCH)
                rows += batch.num_rows
        settle(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return rows


def settle(draft: Path, path: Path) -> None:
    """Let a finished file be known under its name, once it is on the disk."""
    with draft.open("rb") as file:
        os.fsync(file.fileno())
    draft.replace(path)
    files.sync_folder(path.parent)
