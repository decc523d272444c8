"""Which typed rows does a project's source give, in order of time? In bounded memory, by DuckDB."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import pandas as pd
import pyarrow as pa

from perennial.data import aside, kinds, table
from perennial.data.kinds import Column
from perennial.data.rules import literal
from perennial.data.staging import PLACE, TIME, Wanted
from perennial.data.table import Table
from perennial.errors import BadInput
from perennial.project import Project, RowOrder, words

log = logging.getLogger(__name__)

TRANSACTIONS = (
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
)
_NUMBERS = ("Quantity", "UnitPrice", "CustomerID")
_MOST_ODD = 0.01  # numbers that do not read as numbers, before it is no slip but another type
_SHORT = 60  # of an example
_UTC = pa.timestamp("us", "UTC")
_OWN = ("row_id", "event_time", "label", "label_known_at")
# What validation and the quarantine put beside the columns of a snapshot, and DuckDB finds there.
_TAKEN = (*aside.OWN, "file_row_number")
_INNER = "__"
_PLAIN = {kinds.WHOLE: pa.float64(), kinds.NUMBER: pa.float64(), kinds.TRUTH: pa.bool_()}
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Clock:
    """When the rows of a source happened, seen from one moment."""

    rows: int
    newest: datetime | None  # of those that are not in the future
    in_future: int
    example: datetime | None  # of a moment in the future


@dataclass(frozen=True)
class Unreadable:
    """Values of one column that are no numbers though it is one of numbers; they are missing."""

    column: str
    rows: int
    example: str


@dataclass(frozen=True)
class _Field:
    name: str
    sql: str
    type: pa.DataType


class Rows:
    """Rows of a table in the words that all steps of one project share."""

    def __init__(self, project: Project, found: Table) -> None:
        self._project = project
        self._table = found
        order = project.time.row_order
        self._time = _in_order(order) if order else TIME

    @property
    def count(self) -> int:
        """Rows that were read."""
        return self._table.rows

    def clock(self, now: datetime) -> Clock:
        """Look at the times of all rows."""
        told, moment = self._time, literal(now)
        found = self._table.one(
            f"max({told}) filter ({told} <= {moment}), count(*) filter ({told} > {moment}),"
            f" max({told}) filter ({told} > {moment})"
        )
        return Clock(self.count, *found)

    def newest(self, before: datetime) -> datetime | None:
        """Time of the last row before a moment."""
        told = self._time
        found: datetime | None = self._table.one(
            f"max({told}) filter ({told} < {literal(before)})"
        )[0]
        return found

    def later(self, as_of: datetime) -> int:
        """How many rows happened at ``as_of`` or after it."""
        return int(self._table.one(f"count(*) filter ({self._time} >= {literal(as_of)})")[0])

    def check(self) -> tuple[Unreadable, ...]:
        """Refuse times that are none, numbers that are texts, and a label that never is positive.

        Gives the few values that are no numbers and become missing, of all rows that were read.
        Raises BadInput that names the column, how many rows, and one of them.
        """
        if not self._project.time.row_order:
            self._check_times(str(self._project.time.column))
        if self._project.kind == "table":
            self._check_label()
            numbers = [f.name for f in self._project.features if f.type == "number"]
        else:
            numbers = list(_NUMBERS)
        texts = [name for name in numbers if self._of(name).kind not in kinds.ANY]
        return tuple(odd for odd in map(self._check_numbers, texts) if odd.rows)

    @property
    def schema(self) -> pa.Schema:
        """Names and types of ``known``.

        Raises BadInput where only capitals tell two names apart, and for a name of our own.
        """
        found = pa.schema([(field.name, field.type) for field in self._selected(None)])
        self._check_names(found.names)
        return found

    def known(self, as_of: datetime | None) -> Iterator[pa.RecordBatch]:
        """Rows before ``as_of`` (None: all) in order of time, then of their place in the source.

        Labels that are not known by then are blank.
        """
        fields = self._selected(as_of)
        before = f" where {self._time} < {literal(as_of)}" if as_of else ""
        told = ", ".join(f"{field.sql} as f{i}" for i, field in enumerate(fields))
        schema = pa.schema([(field.name, field.type) for field in fields])
        sql = f"select {told} from {table.NAME}{before} order by {self._time}, {PLACE}"
        for batch in self._table.batches(sql):
            yield batch.rename_columns(schema.names).cast(schema)

    def frame(self) -> pd.DataFrame:
        """All of ``known`` at once."""
        return pa.Table.from_batches(self.known(None), self.schema).to_pandas()

    def _of(self, name: str) -> Column:
        return self._table.columns[name]

    def _selected(self, as_of: datetime | None) -> tuple[_Field, ...]:
        if self._project.kind == "transactions":
            return tuple(self._purchase(name) for name in TRANSACTIONS)
        own = self._examples(as_of)
        names = {field.name for field in own}
        more = [name for name in self._table.columns if name not in names and self._is_told(name)]
        return (*own, *(self._more(name) for name in more))

    def _examples(self, as_of: datetime | None) -> tuple[_Field, ...]:
        project = self._project
        known_at = f"({self._time} + {_length(project.label.known_after)})"
        truth = self._truth()
        label = f"case when {known_at} <= {literal(as_of)} then {truth} end" if as_of else truth
        features = [_Field(f.name, *self._typed(f.name, f.type)) for f in project.features]
        more = [name for name in project.sensitive if name not in project.feature_names]
        return (
            _Field("row_id", PLACE, pa.int64()),
            _Field("event_time", self._time, _UTC),
            _Field("label", label, pa.float64()),
            _Field("label_known_at", known_at, _UTC),
            *features,
            *(_Field(name, *self._typed(name, "category")) for name in dict.fromkeys(more)),
        )

    def _typed(self, name: str, kind: str) -> tuple[str, pa.DataType]:
        if kind == "number":
            return self._of(name).number, pa.float64()
        return self._text(name), pa.string()

    def _text(self, name: str) -> str:
        return self._table.text(self._of(name))

    def _truth(self) -> str:
        text = self._text(str(self._project.label.column))
        positive = literal(self._project.label.positive.strip())
        return (
            f"case when {text} = {positive} then 1.0::double when {text} is not null then 0.0 end"
        )

    def _purchase(self, name: str) -> _Field:
        if name == self._project.time.column:
            return _Field(name, self._time, _UTC)
        return _Field(name, *self._typed(name, "number" if name in _NUMBERS else "category"))

    def _is_told(self, name: str) -> bool:
        return name in told_columns(self._project) and name not in _OWN

    def _more(self, name: str) -> _Field:
        """A column that only an expectation names."""
        if name == self._project.time.column:
            return _Field(name, self._time, _UTC)
        column = self._of(name)
        if column.kind == kinds.TIME:
            return _Field(name, column.plain, _UTC)
        return _Field(name, column.plain, _PLAIN.get(column.kind, pa.string()))

    def _check_names(self, names: Sequence[str]) -> None:
        """Nothing that asks a snapshot by SQL could tell such columns apart, or from its own."""
        seen: dict[str, str] = {}
        for name in names:
            if name.lower() in _TAKEN or name.startswith(_INNER):
                raise BadInput(
                    f"{self._table.source} has a column {name}, and that name is taken: names that"
                    f" begin with {_INNER} and {', '.join(_TAKEN)} are perennial's own; rename it"
                    " in the source, or let the project leave it out"
                )
            twin = seen.setdefault(name.lower(), name)
            if twin != name:
                raise BadInput(
                    f"the snapshot of {self._table.source} would have two columns that only"
                    f" capitals tell apart: {twin} and {name}; rename one of them in the source, or"
                    " let the project name only one"
                )

    def _check_times(self, name: str) -> None:
        odd, place = self._table.one(
            f"count(*) - count({TIME}), min({PLACE}) filter ({TIME} is null)"
        )
        if not odd:
            return
        sql = f"select {self._of(name).sql} from {table.NAME} where {PLACE} = {place}"
        ((value,),) = self._table.all(sql)
        raise BadInput(
            f"{name} is no date in {odd:,} of {self.count:,} rows, such as"
            f" {self._table.where(place)}: {value!r}; wanted dates such as 2011-06-01 12:30"
        )

    def _check_label(self) -> None:
        label = self._project.label
        text = self._text(str(label.column))
        if self._table.one(f"count(*) filter ({text} = {literal(label.positive.strip())})")[0]:
            return
        sql = f"select distinct {text} as seen from {table.NAME} where seen is not null order by 1"
        seen = ", ".join(value for (value,) in self._table.all(f"{sql} limit 6"))
        raise BadInput(
            f"label.positive is {label.positive.strip()!r}, but column {label.column} holds"
            f" {seen or 'nothing'}; mend label.positive in project.yaml"
        )

    def _check_numbers(self, name: str) -> Unreadable:
        """A few odd texts become missing, many are another type."""
        column = self._of(name)
        odd = f"{column.sql} is not null and ({column.number}) is null"
        count, example = self._table.one(
            f"count(*) filter ({odd}), arg_min({column.sql}, {PLACE}) filter ({odd})"
        )
        if count > _MOST_ODD * self.count:
            raise BadInput(
                f"{name} is no number in {count:,} of {self.count:,} rows, such as"
                f" {example!r}; make it a category or mend the file"
            )
        if count:
            log.warning("odd numbers are missing column=%s rows=%d", name, count)
        return Unreadable(name, int(count), str(example)[:_SHORT])


def wanted(project: Project, *, joined: bool = False) -> Wanted:
    """Columns that a project needs of its source (``joined``: with those of a second file)."""
    if project.kind == "transactions":
        renamed = {"Customer ID": "CustomerID", "Invoice": "InvoiceNo", "Price": "UnitPrice"}
        return Wanted(TRANSACTIONS, (), renamed, str(project.time.column), ("Description",))
    clock = project.time.column
    timed = (clock,) if clock and (joined or not project.source.join_times) else ()
    needed = (*timed, str(project.label.column), *project.feature_names, *project.sensitive)
    more = (*((project.entity,) if project.entity else ()), *told_columns(project))
    return Wanted(tuple(dict.fromkeys(needed)), tuple(dict.fromkeys(more)), time=clock)


def told_columns(project: Project) -> tuple[str, ...]:
    """Columns that the expectations of a project may mean; of a query, every word."""
    found = [column for one in project.expectations for column in one.columns]
    queries = (str(one.args.get("unexpected_rows_query", "")) for one in project.expectations)
    return tuple(dict.fromkeys([*found, *(w for query in queries for w in words(query))]))


def _in_order(order: RowOrder) -> str:
    start = (order.start - datetime(1970, 1, 1, tzinfo=order.start.tzinfo)) // _MICROSECOND
    step = order.step // _MICROSECOND
    return f"timezone('UTC', make_timestamp({start} + {PLACE} * {step}))"


def _length(length: timedelta) -> str:
    return f"to_microseconds({length // _MICROSECOND}::bigint)"
