"""How are rows kept aside, with the rules that they break and what they are known by?"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perennial.data import duck
from perennial.data.duck import column as name
from perennial.data.sift import MEMORY, Positions
from perennial.errors import BadInput
from perennial.project import Project

# What a row of the quarantine has beside its own columns. A row is known by its digest and by which
# of the rows with that digest it is, counted from 1; a mended one is known by what it was.
ROW, RULES, DIGEST = "quarantine_row", "quarantine_rules", "quarantine_digest"
COPY, WAS = "quarantine_copy", "quarantine_was"
OWN = (ROW, RULES, DIGEST, COPY, WAS)
# Not part of what a row is: its place in the source, and a truth that comes later.
_NOT_IDENTITY = ("row_id", "label", "label_known_at")
# No mending of a row: what the source, or the label's own delay, decides.
_NOT_MENDED = ("row_id", "label_known_at")
_NAME = 12  # hexadecimal digits of a batch's name
_WRITTEN = (
    "write the file with 'perennial quarantine show BATCH --to FILE', and leave that column alone"
)

Key = tuple[str, int]


@dataclass(frozen=True)
class Aside:
    """Rows that were kept aside: how many, what each is known by, how many break each rule."""

    rows: int
    keys: tuple[Key, ...]
    rules: Mapping[str, int]

    def name(self, origin: str) -> str:
        """The same for the same rows of the same ``origin``, a run or a batch."""
        said = "\n".join([origin, *sorted(f"{digest} {copy}" for digest, copy in self.keys)])
        return hashlib.sha256(said.encode()).hexdigest()[:_NAME]


def places(project: Project) -> tuple[str, ...]:
    """Columns that say no more of a row than where it stands in the source."""
    return ("event_time",) if project.kind == "table" and project.time.row_order else ()


def mark(
    aside: Path,
    positions: Positions,
    broken: Mapping[str, Positions],
    whole: Path,
    places: Sequence[str] = (),
) -> pa.Table:
    """The rows of a Parquet file with where each stood, what it breaks, and what it is known by.

    ``positions`` are those of the rows in the file ``whole``, sorted; ``broken`` has them by rule.
    A row's digest is the SHA-256 of its columns as JSON, without its place and its label. What does
    not fit into memory is spilled beside ``aside``.
    """
    table = pq.read_table(aside)
    by_row: list[list[str]] = [[] for _ in range(len(table))]
    for rule, found in broken.items():
        for place in np.searchsorted(positions, found):
            by_row[place].append(rule)
    copies = _copies(aside, whole, identity(table.column_names, places))[positions]
    own = {
        ROW: pa.array(positions + 1),
        RULES: pa.array(by_row, pa.list_(pa.string())),
        DIGEST: pa.array(digests(table, places), pa.string()),
        COPY: pa.array(copies, pa.int64()),
    }
    for column, values in own.items():
        table = table.append_column(column, values)
    return table.replace_schema_metadata(None)


def tell(table: pa.Table) -> Aside:
    """What marked rows are."""
    rules = Counter(rule for rules in table[RULES].to_pylist() for rule in rules)
    return Aside(len(table), tuple(keys(table)), dict(rules))


def keys(table: pa.Table) -> list[Key]:
    """What each marked row is known by."""
    return list(zip(table[DIGEST].to_pylist(), table[COPY].to_pylist(), strict=True))


def bare(table: pa.Table) -> pa.Table:
    """What is left of marked rows that are deleted: enough to know them again."""
    return table.select([ROW, RULES, DIGEST, COPY])


def is_mended(table: pa.Table) -> pa.Array:
    """Which marked rows are not what their snapshot held any more?"""
    if WAS not in table.column_names:
        return pa.array(np.zeros(len(table), dtype=bool))
    return table[WAS].combine_chunks().is_valid()


def with_mended(table: pa.Table, mended: pa.Table) -> pa.Table:
    """Marked rows with mended ones in their places; what those were before stays with them.

    Raises BadInput for a row that mends none of them, or one that another mends, too.
    """
    taken = pa.array(_sources(table, mended), pa.int64())
    before = table
    for column in _mendable(table.column_names):
        if column not in mended.column_names:
            continue
        new = mended[column].combine_chunks().take(taken)
        chosen = pc.if_else(taken.is_valid(), new, table[column].combine_chunks())
        table = table.set_column(table.column_names.index(column), column, chosen)
    return _remembering(before, table)


def identity(columns: Sequence[str], places: Sequence[str] = ()) -> list[str]:
    """Columns that say whether two rows are the same."""
    return [column for column in columns if column not in (*OWN, *_NOT_IDENTITY, *places)]


def alike(told: str, type_: pa.DataType) -> str:
    """SQL: a value so that what is the same to a reader is the same to a digest and a group."""
    # Not a number is nothing, and zero has no sign.
    return f"if(isnan({told}), null, {told} + 0.0)" if pa.types.is_floating(type_) else told


def plain(table: pa.Table) -> pa.Table:
    """Rows of the quarantine as they were in their snapshot, or as they were mended."""
    return table.drop_columns([c for c in OWN if c in table.column_names])


def digests(table: pa.Table, places: Sequence[str] = ()) -> list[str]:
    """The digest of each row."""
    if not len(table):
        return []
    told = {c: alike(name(c), table.field(c).type) for c in identity(table.column_names, places)}
    fields = ", ".join(f"{name(c)} := {value}" for c, value in told.items())
    with duck.over({"aside": table}) as connection:
        sql = f"select sha256(to_json(struct_pack({fields}))::varchar) from aside"
        return [row[0] for row in connection.execute(sql).fetchall()]


def _copies(
    aside: Path, whole: Path, columns: Sequence[str]
) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """For each row of ``whole`` that is like one of ``aside``: which of its equals it is."""
    copies = np.zeros(pq.read_metadata(whole).num_rows, dtype=np.int64)
    if not pq.read_metadata(aside).num_rows:
        return copies
    schema = pq.read_schema(whole)
    key = ", ".join(alike(name(c), schema.field(c).type) for c in columns)
    sql = (
        "select file_row_number as place,"
        f" row_number() over (partition by {key} order by file_row_number) as copy"
        f" from read_parquet({duck.quoted(whole)}, file_row_number = true)"
        f" where hash({key}) in (select hash({key}) from read_parquet({duck.quoted(aside)}))"
    )
    with duck.connected(aside.parent, MEMORY) as connection:
        found = connection.execute(sql).fetchnumpy()
    copies[np.asarray(found["place"])] = np.asarray(found["copy"])
    return copies


def _mendable(columns: Sequence[str]) -> list[str]:
    return [column for column in columns if column not in (*OWN, *_NOT_MENDED)]


def _sources(table: pa.Table, mended: pa.Table) -> list[int | None]:
    """For each marked row, the mended one that takes its place."""
    for column in (DIGEST, COPY):
        if column not in mended.column_names:
            raise BadInput(f"the mended rows have no column {column}; {_WRITTEN}")
    found: dict[Key, int] = {}
    known = set(keys(table))
    for place, key in enumerate(keys(mended)):
        if key not in known:
            raise BadInput(
                f"row {place + 1} of the mended rows mends none of this batch: its {DIGEST} is"
                f" {key[0]!r} and its {COPY} {key[1]!r}; {_WRITTEN}"
            )
        if key in found:
            raise BadInput(
                f"rows {found[key] + 1} and {place + 1} of the mended rows mend the same row,"
                f" {DIGEST} {key[0]!r}; leave one of them"
            )
        found[key] = place
    return [found.get(key) for key in keys(table)]


def _remembering(before: pa.Table, table: pa.Table) -> pa.Table:
    """Mended rows beside what they were at first; one that is as it was is not mended."""
    columns = _mendable(table.column_names)
    was = pa.StructArray.from_arrays(
        [before[c].combine_chunks() for c in columns], fields=[before.field(c) for c in columns]
    )
    if WAS in before.column_names:
        was = pc.if_else(is_mended(before), before[WAS].combine_chunks(), was)
        table = table.drop_columns([WAS])
    with duck.over({"mended": table.append_column(WAS, was)}) as connection:
        tests = [
            f"{alike(name(c), table.field(c).type)} is distinct from"
            f" {alike(f'{WAS}.{name(c)}', table.field(c).type)}"
            for c in columns
        ]
        told = connection.execute(f"select {' or '.join(tests)} from mended").fetchall()
    changed = pa.array([row[0] for row in told], pa.bool_())
    return table.append_column(WAS, pc.if_else(changed, was, pa.scalar(None, was.type)))
