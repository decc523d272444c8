"""What do staged rows hold? One table of DuckDB over them, asked in bounded memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from perennial.data import kinds
from perennial.data.kinds import Column
from perennial.data.rules import literal
from perennial.data.staging import PLACE, TIME, Staging

MEMORY = "700MB"
NAME = "staged"
BATCH = 131_072


class Table:
    """Columns of the source by their names; ``where`` tells a place as people count rows.

    ``source`` is what they were read from, in a few words.
    """

    def __init__(self, connection: Any, staging: Staging, columns: dict[str, str]) -> None:
        self._connection = connection
        found = kinds.infer(connection, NAME, columns.values())
        self.columns = {name: found[own] for name, own in columns.items()}
        self.rows = staging.rows
        self.where = staging.where
        self.source = ", ".join(part.name for part in staging.parts[:3])

    def one(self, told: str) -> tuple[Any, ...]:
        """One row of sums over all rows."""
        return tuple(self._connection.execute(f"select {told} from {NAME}").fetchone())

    def all(self, sql: str) -> list[tuple[Any, ...]]:
        """Few rows."""
        return list(self._connection.execute(sql).fetchall())

    def batches(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Many rows."""
        yield from self._connection.execute(sql).to_arrow_reader(BATCH)

    def text(self, column: Column) -> str:
        """SQL of a column as texts."""
        return column.text(kinds.is_whole(self._connection, NAME, column))

    def raw(self) -> pd.DataFrame:
        """Columns as they stand in the source, in its order."""
        told = ", ".join(f"{c.sql} as {c.name}" for c in self.columns.values())
        found = pa.Table.from_batches(self.batches(f"select {told} from {NAME} order by {PLACE}"))
        return found.rename_columns(list(self.columns)).to_pandas()


@contextmanager
def opened(
    staging: Staging, scratch: Path, times: tuple[str, Staging] | None = None
) -> Iterator[Table]:
    """A finished staging as a table; ``times`` name a column that stands in a second file.

    That file has a row's number and a moment in each row. What does not fit into memory goes to
    ``scratch``.
    """
    import duckdb

    connection = duckdb.connect(
        config={
            "memory_limit": MEMORY,
            "temp_directory": str(scratch / "duckdb"),
            "threads": 2,
            "autoinstall_known_extensions": False,
        }
    )
    columns = dict(staging.columns)
    rows = f"select * from {_files(staging)}"
    if times:
        columns[times[0]] = own = f"c{len(columns)}"
        rows = _joined(staging, times[1], own)
    try:
        connection.execute("set timezone = 'UTC'")
        connection.execute(f"create view {NAME} as {rows}")
        yield Table(connection, staging, columns)
    finally:
        connection.close()


def _joined(staging: Staging, times: Staging, own: str) -> str:
    number, moment = times.columns.values()
    return (
        f"select s.*, t.{own}, t.{TIME} from {_files(staging)} s left join (select"
        f" try_cast({number} as bigint) as number, arg_min({moment}, {PLACE}) as {own},"
        f" arg_min({TIME}, {PLACE}) as {TIME} from {_files(times)} group by all) t"
        f" on t.number = s.{PLACE}"
    )


def _files(staging: Staging) -> str:
    told = ", ".join(literal(str(path)) for path in staging.files)
    return f"read_parquet([{told}], union_by_name = true)"
