"""Which rows of a snapshot break its rules, and what is left without them? In bounded memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data import aggregates, duck
from perennial.data.aggregates import ROWS, Aggregate, Judged
from perennial.data.duck import column as name
from perennial.data.rules import NUMBER, TEXT, TIME, TRUTH, Foreign, RowRule, kind_of_rows, literal
from perennial.errors import BadInput
from perennial.project import Expectation

EXAMPLES = 3
MEMORY = "1GB"
_POSITION = "__row"
_ALL = "__all_rows"
_GONE = "__gone_rows"
_BATCH = 131_072

Positions = np.ndarray[Any, np.dtype[np.int64]]


def nothing() -> Positions:
    """No position at all."""
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Broken:
    """What one rule found: rows it looked at, rows that break it, and some of them.

    Of rows that repeat each other all break their rule, as for Great Expectations; ``surplus`` are
    those after the first, without which none would. Examples begin with the row's number in the
    snapshot, counted from 1, under ``row``.
    """

    looked_at: int
    rows: int
    surplus: int
    examples: tuple[Mapping[str, Any], ...]


def kinds(schema: pa.Schema) -> dict[str, str]:
    """The kind of each column that DuckDB can judge; others are left out."""
    tests = {
        NUMBER: lambda t: pa.types.is_floating(t) or pa.types.is_integer(t),
        TEXT: lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
        TIME: pa.types.is_timestamp,
        TRUTH: pa.types.is_boolean,
    }
    found = {field.name: [k for k, test in tests.items() if test(field.type)] for field in schema}
    return {column: kind[0] for column, kind in found.items() if kind}


class Sieve:
    """One snapshot and its rules; use it as a context manager."""

    def __init__(self, snapshot: Path, scratch: Path, memory: str = MEMORY) -> None:
        """``scratch`` is a folder for what does not fit into ``memory``."""
        self.snapshot = snapshot
        file = pq.ParquetFile(snapshot)
        self.rows: int = file.metadata.num_rows
        self.schema = file.schema_arrow
        self.columns = kinds(self.schema)
        self._held = ExitStack()
        self._connection = self._held.enter_context(duck.connected(scratch, memory))
        self._connection.execute(
            f"create view {_ALL} as select *{_without_nan(file.schema_arrow)},"
            f" file_row_number as {_POSITION}"
            f" from read_parquet({literal(str(snapshot))}, file_row_number = true)"
        )
        # A rule may be a query of its own: it sees these rows, and no other file or address.
        self._connection.execute(f"set allowed_paths = [{literal(str(snapshot))}]")
        self._connection.execute("set enable_external_access = false")
        self._connection.execute("set lock_configuration = true")
        self._connection.execute(f"create view {ROWS} as from {_ALL}")

    def __enter__(self) -> "Sieve":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._held.__exit__(*raised)

    def leave_out(self, gone: Positions) -> None:
        """Look, from now on, only at the rows that are not at these positions."""
        self._connection.register(_GONE, pa.table({_POSITION: gone}))
        self._connection.execute(
            f"create or replace view {ROWS} as from {_ALL} anti join {_GONE} using ({_POSITION})"
        )

    def count(self, rules: Sequence[RowRule]) -> list[Broken]:
        """What each rule finds, in one pass for all that look at a row alone."""
        if not rules:
            return []
        plain = [rule for rule in rules if not rule.unique]
        told = [f"count(*) filter ({rule.looked_at})" for rule in rules]
        told += [f"count(*) filter ({_breaks(rule)})" for rule in plain]
        found = [int(count) for count in self.ask(told)]
        looked_at, rows = found[: len(rules)], iter(found[len(rules) :])
        return [
            self._repeated(rule, seen) if rule.unique else self._broken(rule, seen, next(rows))
            for rule, seen in zip(rules, looked_at, strict=True)
        ]

    def positions(self, rule: RowRule) -> Positions:
        """The rows, counted from 0, that must go so that the rule holds; sorted."""
        if rule.unique:
            repeats, place = self._repeats(rule)
            return repeats[place > 1]
        sql = f"select {_POSITION} from {ROWS} where {_breaks(rule)} order by {_POSITION}"
        return np.asarray(self._connection.execute(sql).fetchnumpy()[_POSITION], dtype=np.int64)

    def observe(self, wanted: Sequence[Aggregate]) -> list[Judged]:
        """What each expectation about all rows finds, in one pass as far as can be."""
        import duckdb

        if not wanted:
            return []
        try:
            values = iter(self.ask([told for one in wanted for told in one.sql]))
        except duckdb.Error as exc:
            if len(wanted) == 1:
                # Such as the spread of numbers of which one is infinite.
                return [Judged(False, None, f"cannot be computed: {' '.join(str(exc).split())}")]
            return [judged for one in wanted for judged in self.observe([one])]
        return [one.judge([next(values) for _ in one.sql]) for one in wanted]

    @property
    def names(self) -> list[str]:
        """Names of all columns."""
        return list(self.schema.names)

    def no_rows(self) -> Any:
        """The table as pandas reads it, without its rows."""
        return self.schema.empty_table().to_pandas()

    def partition(self, wanted: Expectation) -> Any:
        """How a column is distributed, as a partition object of Great Expectations; None: unfit."""
        made = aggregates.partition(wanted, self.columns)
        seen = self.observe([made])[0].observed if made else None
        if not isinstance(seen, list):
            return seen
        return self.observe([aggregates.shares_between(wanted, self.columns, seen)])[0].observed

    def present(self, wanted: Expectation) -> int:
        """How many values there are in a column, of the rows that an expectation is about."""
        try:
            where = kind_of_rows(dict(wanted.args), self.columns)
        except Foreign:
            where = "true"
        return int(self.ask([f"count({name(str(wanted.args['column']))}) filter ({where})"])[0])

    def ask(self, told: Sequence[str]) -> tuple[Any, ...]:
        """The values of some expressions of SQL over all rows."""
        # The count makes one row of it, also where all others are queries of their own.
        sql = f"select {', '.join(['count(*)', *told])} from {ROWS}"
        return tuple(self._connection.execute(sql).fetchone() or ())[1:]

    def unexpected(self, query: str) -> tuple[int, list[dict[str, Any]]]:
        """How many rows a query finds, and the first of them; ``{batch}`` stands for the rows.

        Raises BadInput for a query that does not run, or that would do more than read the rows.
        """
        import duckdb

        told = f"select * from ({query.replace('{batch}', ROWS).rstrip().rstrip(';')})"
        try:
            _require_select(self._connection.extract_statements(told))
            found = self._connection.execute(f"{told} limit {EXAMPLES}")
            names = [column[0] for column in found.description]
            rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
            count = self._connection.execute(f"select count(*) from ({told})").fetchone()
        except duckdb.Error as exc:
            first = " ".join(str(exc).split())
            raise BadInput(f"the query does not run: {first}") from exc
        shown = [{k: v for k, v in row.items() if k != _POSITION} for row in rows]
        return int(count[0]) if count else 0, shown

    def values(self, column: str, most: int) -> tuple[str, ...]:
        """The texts of a column in order; none, where there are more than ``most``."""
        sql = f"select distinct {name(column)} as v from {ROWS} where v is not null"
        found = self._connection.execute(f"{sql} limit {most + 1}").fetchall()
        return tuple(sorted(v for (v,) in found)) if len(found) <= most else ()

    def surplus(self, columns: Sequence[str]) -> int:
        """How many rows equal an earlier one in these columns."""
        _, place = self._repeats(RowRule("true", "", tuple(columns), tuple(columns)))
        return int((place > 1).sum())

    def frame(self, columns: Sequence[str]) -> Any:
        """Whole columns (all, where none is named), as pandas reads them."""
        told = ", ".join(name(c) for c in columns) or f"* exclude ({_POSITION})"
        table = self._connection.execute(f"select {told} from {ROWS} order by {_POSITION}")
        return table.to_arrow_table().to_pandas(date_as_object=False)

    def examples(self, positions: Sequence[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some rows by their positions, with these columns."""
        if not positions:
            return []
        wanted = ", ".join(str(int(p)) for p in positions)
        return self._shown(f"{_POSITION} in ({wanted})", columns)

    def _broken(self, rule: RowRule, looked_at: int, rows: int) -> Broken:
        shown = self._shown(_breaks(rule), rule.columns) if rows else []
        return Broken(looked_at, rows, rows, tuple(shown))

    def _repeated(self, rule: RowRule, looked_at: int) -> Broken:
        positions, place = self._repeats(rule)
        first = np.sort(positions)[:EXAMPLES].tolist()
        shown = self.examples(first, rule.columns)
        return Broken(looked_at, len(positions), int((place > 1).sum()), tuple(shown))

    def _repeats(self, rule: RowRule) -> tuple[Positions, Positions]:
        """Positions of all rows that are there more than once, sorted, and which time it is.

        Rows of equal hashes are few and fit into memory; they alone are compared in full.
        """
        key = ", ".join(name(c) for c in rule.unique)
        sql = (
            f"select {_POSITION}, count(*) over (partition by {key}) as __times,"
            f" row_number() over (partition by {key} order by {_POSITION}) as __place"
            f" from {ROWS} where {rule.looked_at}"
            f" and hash({key}) in (select hash({key}) from {ROWS} where {rule.looked_at}"
            f" group by hash({key}) having count(*) > 1) qualify __times > 1 order by {_POSITION}"
        )
        found = self._connection.execute(sql).fetchnumpy()
        return (
            np.asarray(found[_POSITION], dtype=np.int64),
            np.asarray(found["__place"], dtype=np.int64),
        )

    def _shown(self, where: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        told = ", ".join([f"{_POSITION} + 1", *(name(c) for c in columns)])
        sql = f"select {told} from {ROWS} where {where} order by {_POSITION} limit {EXAMPLES}"
        found = self._connection.execute(sql).fetchall()
        return [dict(zip(("row", *columns), row, strict=True)) for row in found]


def _require_select(statements: Sequence[Any]) -> None:
    """A query that closes its bracket could go on with a statement that writes."""
    import duckdb

    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise BadInput("the query does not run: it is not one SELECT")


def _breaks(rule: RowRule) -> str:
    return f"({rule.looked_at} and {rule.broken})"


def _without_nan(schema: pa.Schema) -> str:
    """To pandas, and so to Great Expectations, NaN is missing; to DuckDB it is a great number."""
    told = [f.name for f in schema if pa.types.is_floating(f.type)]
    if not told:
        return ""
    parts = ", ".join(f"if(isnan({name(c)}), null, {name(c)}) as {name(c)}" for c in told)
    return f" replace ({parts})"


def spaced(snapshot: Path, columns: Sequence[str], most: int, gone: Positions | None = None) -> Any:
    """At most ``most`` rows of a Parquet file, evenly spaced, as a pandas frame.

    Rows at the sorted positions ``gone`` are passed over, as if the file had never had them.
    """
    gone = nothing() if gone is None else gone
    file, start, passed, parts = pq.ParquetFile(snapshot), 0, 0, []
    step = max(1, -(-(file.metadata.num_rows - len(gone)) // most))
    for batch in file.iter_batches(_BATCH, columns=list(columns)):
        here = np.flatnonzero(~_among(gone, start, len(batch)))
        parts.append(batch.take(pa.array(here[-passed % step :: step])))
        start, passed = start + len(batch), passed + len(here)
    schema = pa.schema([file.schema_arrow.field(c) for c in columns])
    return pa.Table.from_batches(parts, parts[0].schema if parts else schema).to_pandas()


def split(snapshot: Path, gone: "np.ndarray[Any, Any]", kept: Path, aside: Path) -> tuple[int, int]:
    """Write the rows at the sorted positions ``gone`` to one file and all others to the other.

    Both keep the order, the schema and the place in the snapshot. Gives how many rows each has.
    """
    file = pq.ParquetFile(snapshot)
    counts, start = [0, 0], 0
    with _writing(kept, file.schema_arrow) as keep, _writing(aside, file.schema_arrow) as put:
        for batch in file.iter_batches(_BATCH):
            mask = _among(gone, start, len(batch))
            counts[0] += _write(keep, batch, ~mask)
            counts[1] += _write(put, batch, mask)
            start += len(batch)
    return counts[0], counts[1]


def _among(gone: Positions, start: int, count: int) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which rows of a batch that begins at ``start`` are at these positions."""
    low, high = np.searchsorted(gone, [start, start + count])
    mask = np.zeros(count, dtype=bool)
    mask[gone[low:high] - start] = True
    return mask


def _write(writer: pq.ParquetWriter, batch: pa.RecordBatch, wanted: Any) -> int:
    taken = batch.filter(pa.array(wanted))
    if len(taken):
        writer.write_batch(taken)
    return len(taken)


@contextmanager
def _writing(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield writer
