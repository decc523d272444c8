"""What does a column hold, whoever wrote it? One rule for texts, numbers and truths, in SQL."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from perennial.data.staging import PLACE

TEXT, WHOLE, NUMBER, TRUTH, TIME, OTHER = "text", "whole", "number", "truth", "time", "other"
ANY = (WHOLE, NUMBER, TRUTH)  # what can be a number in every row
_TRUE, _FALSE = "('True', 'TRUE', 'true')", "('False', 'FALSE', 'false')"
# As a machine writes numbers: 007 and +5 are texts, and so is what no integer of 64 bits holds.
_INTEGER = r"-?(0|[1-9][0-9]{0,17})"
_PLAIN = rf"{_INTEGER}(\.[0-9]*)?([eE][-+]?[0-9]{{1,3}})?|-?\.[0-9]+|[-+]?([iI]nf|[iI]nfinity)"
_SAMPLE = 1000
_TYPES = {"VARCHAR": TEXT, "BIGINT": WHOLE, "DOUBLE": NUMBER, "BOOLEAN": TRUTH, "DATE": TIME}


@dataclass(frozen=True)
class Column:
    """One column of a table in DuckDB: its name as SQL, what it holds, and itself as such."""

    name: str
    kind: str
    sql: str

    @property
    def number(self) -> str:
        """As a number; missing where it is none."""
        if self.kind in ANY:
            return f"cast({self.sql} as double)"
        if self.kind == TEXT:
            # DuckDB reads 1_000 as a number, and nobody else does.
            cast = f"nullif(try_cast({self.sql} as double), 'nan'::double)"
            return f"case when not contains({self.sql}, '_') then {cast} end"
        return "null::double"

    def text(self, whole: bool) -> str:
        """As a text: ``whole`` says that all its numbers are, which are written without a point."""
        if self.kind == NUMBER and whole:
            return f"cast(cast({self.sql} as bigint) as varchar)"
        if self.kind == TRUTH:
            return f"case {self.sql} when true then 'True' when false then 'False' end"
        return f"cast({self.sql} as varchar)"

    @property
    def plain(self) -> str:
        """As a number, truth, moment or text, whichever it is."""
        if self.kind in (WHOLE, NUMBER):
            return self.number
        if self.kind == TIME:
            return f"cast({self.sql} as timestamptz)"
        return self.sql if self.kind == TRUTH else self.text(False)


def infer(connection: Any, table: str, names: Iterable[str]) -> dict[str, Column]:
    """What columns of a table hold; a text is a number or truth where each one of its column is.

    Columns of the table that are not there hold nothing.
    """
    told = dict(
        connection.execute(f"select column_name, column_type from (describe {table})").fetchall()
    )
    found = {name: Column(name, _kind(told.get(name)), _plain(name, told)) for name in names}
    texts = [name for name, column in found.items() if column.kind == TEXT and name in told]
    # A few rows rule out nearly all, and all rows are asked only about the others.
    sample = f"(select * from {table} where {PLACE} < {_SAMPLE})"
    for rows in (sample, table):
        kinds = _text_kinds(connection, rows, texts)
        texts = [name for name in texts if kinds[name] != TEXT]
    return found | {name: _as(name, kinds[name]) for name in texts}


def is_whole(connection: Any, table: str, column: Column) -> bool:
    """Does a column of numbers hold whole ones only, of a size that an integer has?"""
    if column.kind != NUMBER:
        return False
    test = f"{column.sql} = trunc({column.sql}) and abs({column.sql}) < 1e18"
    (found,) = connection.execute(f"select bool_and({test}) from {table}").fetchone()
    return found is not False


def _kind(told: str | None) -> str:
    if told and told.startswith("TIMESTAMP"):
        return TIME
    return _TYPES.get(told or "VARCHAR", OTHER)


def _plain(name: str, told: Mapping[str, str]) -> str:
    return name if name in told else "null::varchar"


def _as(name: str, kind: str) -> Column:
    types = {WHOLE: f"cast({name} as bigint)", NUMBER: f"cast({name} as double)"}
    truth = f"case when {name} in {_TRUE} then true when {name} in {_FALSE} then false end"
    return Column(name, kind, types.get(kind, truth))


def _text_kinds(connection: Any, rows: str, names: list[str]) -> dict[str, str]:
    if not names:
        return {}
    tests = [test for name in names for test in _tests(name)]
    found = list(connection.execute(f"select {', '.join(tests)} from {rows}").fetchone())
    return {name: _told(*found[4 * i : 4 * i + 4]) for i, name in enumerate(names)}


def _tests(name: str) -> tuple[str, ...]:
    return (
        f"count({name})",
        f"count(*) filter (regexp_full_match({name}, '{_INTEGER}'))",
        f"count(*) filter (regexp_full_match({name}, '{_PLAIN}'))",
        f"count(*) filter ({name} in {_TRUE} or {name} in {_FALSE})",
    )


def _told(present: int, whole: int, plain: int, truths: int) -> str:
    if not present:
        return NUMBER  # nothing is no text either, as nothing of a column of numbers
    kinds = {WHOLE: whole, NUMBER: plain, TRUTH: truths}
    return next((kind for kind, count in kinds.items() if count == present), TEXT)
