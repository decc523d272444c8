"""Which rows of the quarantine come back, and how do they join the rows of a snapshot?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data import aside, duck
from perennial.data.duck import column as name
from perennial.data.sift import MEMORY
from perennial.errors import RunFailed

_PLACE, _NTH, _SAID, _COPY = "__place", "__nth", "__said", "__copy"
_AFTER, _EACH = 2**61, 2**40  # places after all of a snapshot, and how many each batch has
_ID_DIGITS = 15  # hexadecimal, of a digest: as many as 64 bits hold with a sign
_KINDS = {
    "number": lambda t: pa.types.is_floating(t) or pa.types.is_integer(t),
    "text": lambda t: pa.types.is_string(t) or pa.types.is_large_string(t),
    "time": pa.types.is_timestamp,
}


@dataclass(frozen=True)
class Replayed:
    """The marked rows of one batch that somebody replayed."""

    batch: str
    rows: pa.Table


@dataclass(frozen=True)
class Moment:
    """What a snapshot may know: rows before ``as_of`` by the column ``time``."""

    time: str
    as_of: datetime

    @property
    def sql(self) -> str:
        """The moment as SQL."""
        return f"timestamptz '{self.as_of.isoformat()}'"


@dataclass(frozen=True)
class Back:
    """What became of replayed rows: they joined, the snapshot has them, or they are too young."""

    joined: int = 0
    there: int = 0
    later: int = 0


def unite(
    snapshot: Path,
    replayed: Sequence[Replayed],
    moment: Moment,
    out: Path,
    scratch: Path,
    places: Sequence[str] = (),
) -> Back:
    """Write the rows of a snapshot and those replayed rows that it has not, in order of time.

    A replayed row that was not mended is there where the snapshot holds as many equal rows as there
    were up to it. A mended one joins while the snapshot holds what it was; when that has gone, the
    source is taken to have mended it where it holds an equal row for each. Of batches that hold the
    same row, oldest first, the last one counts. What was not known yet stays out: later rows, and
    labels of earlier ones; a label that came meanwhile joins the row that it is of. Rows that join
    get a ``row_id`` of their own, below zero: their place in the source may be another's by now.

    Raises RunFailed for rows that do not fit the columns of the snapshot.
    """
    schema = pq.read_schema(snapshot)
    with duck.connected(scratch, MEMORY) as connection:
        uniting = _Uniting(connection, schema, moment, places)
        uniting.begin(snapshot)
        for number, one in enumerate(reversed(replayed)):
            uniting.add(_fitting(one, schema), _AFTER - number * _EACH)
        _write(uniting.rows(), schema, out)
    return uniting.back


class _Uniting:
    """Batches that join a snapshot one after the other, the newest first.

    Beside its own columns a row has ``__own_...``, those that say what it is, and ``__was_...``,
    those that said what it was before it was mended; both so that equal values are equal to SQL.
    """

    def __init__(
        self, connection: Any, schema: pa.Schema, moment: Moment, places: Sequence[str]
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._moment = moment
        self._places = places
        self._done: list[list[str]] = []  # what says what a row is, by batch
        self.back = Back()

    def begin(self, snapshot: Path) -> None:
        """Look at a snapshot; nothing joined it yet."""
        told = [f"{aside.alike(name(f.name), f.type)} as {name(f.name)}" for f in self._schema]
        file = f"read_parquet({duck.quoted(snapshot)}, file_row_number = true)"
        rows = f"select * exclude (file_row_number), file_row_number as {_PLACE} from {file}"
        self._run(f"create view snapshot as {rows}")
        self._run(f"create view alike as select {', '.join(told)}, {_PLACE} from snapshot")
        self._run("create temp table joining as from snapshot limit 0")
        self._run(f"create temp table moved ({_SAID} varchar)")

    def rows(self) -> Any:
        """All rows in batches, in order of time; those of the snapshot keep theirs."""
        sql = (
            f"select * exclude ({_PLACE}) from (from snapshot union all by name from joining)"
            f" order by {name(self._moment.time)}, {_PLACE}"
        )
        return self._connection.execute(sql).to_arrow_reader(131_072)

    def add(self, table: pa.Table, after: int) -> None:
        """Let the rows of one batch join that the snapshot has not, at places ``after``."""
        columns = [c for c in table.column_names if c not in aside.OWN]
        same = aside.identity(columns, self._places)
        late = [c for c in ("label", "label_known_at") if c in columns]
        self._take(table, same)
        self._leave_newer(same)
        self._look(same, late)
        told = ", ".join(f"{sql} as {name(c)}" for c, sql in self._told(columns).items())
        joined = self._count(
            f"insert into joining by name select {told}, {after} + {aside.ROW} as {_PLACE}"
            f" from found where if(__mended, is_there or {_NTH} > times, not is_there)"
        )
        self._run(f"insert into moved select {_SAID} from found where __mended and not is_there")
        there = self._count("select count(*) from found") - joined
        later = self._count("select count(*) from batch where not is_early")
        self.back = Back(
            self.back.joined + joined, self.back.there + there, self.back.later + later
        )

    def _take(self, table: pa.Table, same: Sequence[str]) -> None:
        """Make ``batch`` of the rows of one."""
        given = table.append_column("__mended", aside.is_mended(table))
        given = given.append_column(_SAID, pa.array(aside.digests(table, self._places)))
        told = []
        for c in same:
            own, was = name(c), f"{aside.WAS}.{name(c)}"
            origin = f"if(__mended, {was}, {own})" if aside.WAS in table.column_names else own
            kind = table.field(c).type
            told += [f"{aside.alike(own, kind)} as {name(f'__own_{c}')}"]
            told += [f"{aside.alike(origin, kind)} as {name(f'__was_{c}')}"]
        early = f"coalesce({name(self._moment.time)} < {self._moment.sql}, true) as is_early"
        self._connection.register("given", given)
        self._run(
            f"create or replace temp table batch as select *, {', '.join(told)}, {early} from given"
        )
        self._connection.unregister("given")

    def _leave_newer(self, same: Sequence[str]) -> None:
        """Leave out rows that a newer batch holds, as far as both have the same columns."""
        number = len(self._done)
        self._run(
            f"create temp table done{number} as select {_list('__was_', same)}, {aside.COPY}"
            " from batch"
        )
        for n, columns in enumerate(self._done):
            shared = [c for c in same if c in columns]
            self._run(
                f"delete from batch b where exists (select 1 from done{n} d"
                f" where d.{aside.COPY} = b.{aside.COPY}"
                f" and {_equal('d', '__was_', 'b', '__was_', shared)})"
            )
        self._done.append(list(same))

    def _look(self, same: Sequence[str], late: Sequence[str]) -> None:
        """Make ``found``: early rows, whether what each was is there, and how many are like it."""
        key, was, own = (_list(prefix, same) for prefix in ("", "__was_", "__own_"))
        labels = "".join(f", {name(c)} as {name(f'__{c}')}" for c in late)
        copy = f"row_number() over (partition by {key} order by {_PLACE}) as {_COPY}"
        self._run(
            f"create or replace temp table origins as select {key}, {copy}{labels} from alike"
            f" where hash({key}) in (select hash({was}) from batch)"
        )
        self._run(
            f"create or replace temp table likes as select {key}, count(*) as times from alike"
            f" where hash({key}) in (select hash({own}) from batch where __mended) group by {key}"
        )
        # Of mended rows whose source has moved on, each needs an equal row of its own.
        before = f"(select count(*) from moved m where m.{_SAID} = l.{_SAID})"
        group = f"partition by {_SAID}, __mended, is_there order by {aside.ROW}"
        labels = "".join(f", o.{name(f'__{c}')}" for c in late)
        self._run(
            f"create or replace temp table found as select *, {before} + row_number() over"
            f" ({group}) as {_NTH} from (select b.*{labels}, o.{_COPY} is not null as is_there,"
            " coalesce(k.times, 0) as times from batch b"
            f" left join origins o on {_equal('o', '', 'b', '__was_', same)}"
            f" and o.{_COPY} = b.{aside.COPY}"
            f" left join likes k on {_equal('k', '', 'b', '__own_', same)} where is_early) l"
        )

    def _told(self, columns: Sequence[str]) -> dict[str, str]:
        """What joins, by column: labels as they are known at the moment, places of its own."""
        found = {c: name(c) for c in columns}
        if "label" in found:
            found["label"] = "coalesce(label, __label)"
        if "label" in found and "label_known_at" in found:
            since = "if(label is null, coalesce(__label_known_at, label_known_at), label_known_at)"
            found["label_known_at"] = since
            found["label"] = f"if({since} > {self._moment.sql}, null, {found['label']})"
        if "row_id" in found:
            first = f"('0x' || {aside.DIGEST}[:{_ID_DIGITS}])::bigint"
            found["row_id"] = f"-xor({first}, {aside.COPY}) - 1"
        return found

    def _run(self, sql: str) -> None:
        self._connection.execute(sql)

    def _count(self, sql: str) -> int:
        (count,) = self._connection.execute(sql).fetchone()
        return int(count)


def _list(prefix: str, columns: Sequence[str]) -> str:
    return ", ".join(name(f"{prefix}{c}") for c in columns)


def _equal(one: str, before: str, other: str, after: str, columns: Sequence[str]) -> str:
    told = [
        f"{one}.{name(f'{before}{c}')} is not distinct from {other}.{name(f'{after}{c}')}"
        for c in columns
    ]
    return " and ".join(told) or "true"


def _fitting(replayed: Replayed, schema: pa.Schema) -> pa.Table:
    """Rows with columns as the snapshot has them, as far as both do; and their marks."""
    table = replayed.rows
    for field in schema:
        if field.name not in table.column_names:
            continue
        kind = table.field(field.name).type
        if _kind(kind) != _kind(field.type):
            raise RunFailed(
                f"batch {replayed.batch} of the quarantine was replayed, but its column"
                f" {field.name} is {kind}, and the snapshot's is {field.type}: keep its rows with"
                f" 'perennial quarantine show {replayed.batch} --to FILE' where you need them, and"
                f" drop it with 'perennial quarantine drop {replayed.batch} --because WHY'"
            )
        values = table[field.name].cast(field.type)
        table = table.set_column(table.column_names.index(field.name), field.name, values)
    wanted = [c for c in table.column_names if c in schema.names or c in aside.OWN]
    return table.select(wanted)


def _kind(type_: pa.DataType) -> str:
    return next((kind for kind, test in _KINDS.items() if test(type_)), str(type_))


def _write(batches: Any, schema: pa.Schema, out: Path) -> None:
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for batch in batches:
            table = pa.Table.from_batches([batch]).select(schema.names)
            writer.write_table(table.cast(schema))
