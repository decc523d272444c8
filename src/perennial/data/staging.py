"""Which raw rows are there? Those of any source in plain files that DuckDB reads, bit by bit."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from perennial.data import delimited
from perennial.data.places import Part, first_line
from perennial.errors import BadInput, Unavailable
from perennial.store import files

log = logging.getLogger(__name__)

MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
_BLANK = ("",)
PLACE, TIME = "place", "time"  # columns of a staged file, beside c0, c1, ...
_PARQUET, _ZIP = b"PAR1", b"PK\x03\x04"
_UTC = pa.timestamp("us", "UTC")
_TIMES = "datetime64[us, UTC]"
_DAYS = r"^\s*(\d{1,2})[/.-]\d{1,2}[/.-]\d{2,4}\b"

Batches = Iterable[pa.RecordBatch]


@dataclass(frozen=True)
class Wanted:
    """Columns to read: those that must be there and those that are welcome (None: all there are).

    ``renamed`` gives a column of the source another name where that one is not there. ``time``
    says when a row happened, ``free`` are columns in which people write what they like, "?" too.
    """

    needed: tuple[str, ...] = ()
    welcome: tuple[str, ...] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    time: str | None = None
    free: tuple[str, ...] = ()

    def of(self, names: Sequence[str]) -> dict[str, str]:
        """Columns to take by the names that they shall have, and their names in the source."""
        told = {self._name(name, names): name for name in names}
        if self.welcome is None:
            return told
        return {name: told[name] for name in (*self.needed, *self.welcome) if name in told}

    def _name(self, name: str, names: Sequence[str]) -> str:
        new = self.renamed.get(name, name)
        return name if new in names else new


@dataclass(frozen=True)
class Taken:
    """One part of a source as it was read; what is empty is not known."""

    name: str
    rows: int
    bytes: int = 0
    sha256: str = ""
    etag: str = ""


class Staging:
    """A folder of Parquet files with the rows of a source in their order, place counted from 0.

    Columns are c0, c1, ... (``columns`` knows their names, in which DuckDB would not tell capitals
    apart), texts without outer spaces, blanks missing; ``time`` is when a row happened, missing
    where that cannot be read.
    """

    def __init__(self, folder: Path, wanted: Wanted) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wanted = wanted
        self._types: dict[str, pa.DataType] = {}
        self._times = _Times()
        self.columns: dict[str, str] = {}
        self.files: list[Path] = []
        self.parts: list[Taken] = []

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)

    def add_file(self, part: Part, *, header: bool = True) -> None:
        """Read a CSV (also .gz) or Parquet file. Raises BadInput that names what is wrong with it.

        Raises Unavailable when the file changes meanwhile.
        """
        before = _stamp(part.path)
        with part.path.open("rb") as file:
            start = file.read(4)
        if start.startswith(_ZIP):
            raise BadInput(
                f"{part.name} is a zip archive or a spreadsheet; save it as CSV or Parquet"
            )
        rows = self._parquet(part) if start == _PARQUET else self._text(part, header)
        digest = files.digest_file(part.path)
        if _stamp(part.path) != before:
            raise Unavailable(f"{part.name} changed while it was read; try again")
        size = part.path.stat().st_size
        self.parts.append(Taken(part.name, rows, size, digest.removeprefix("sha256:"), part.etag))

    def add(self, name: str, names: Sequence[str], batches: Batches) -> None:
        """Read batches of anything, such as a query's answer."""
        self.parts.append(Taken(name, self._keep(self._choose(name, names), batches)))

    def finish(self) -> None:
        """See to times that are not written as ISO 8601. Raises BadInput where there is no row."""
        if not self.rows:
            where = ", ".join(part.name for part in self.parts[:3])
            raise BadInput(f"{where} has no rows; give a file with a header and at least one row")
        if not self._times.is_iso:
            self._read_times_anew()

    def where(self, place: int) -> str:
        """A row as people count: its number, and its part where there are several."""
        for part in self.parts:
            if place < part.rows:
                break
            place -= part.rows
        return f"row {place + 1}" + (f" of {part.name}" if len(self.parts) > 1 else "")

    def _parquet(self, part: Part) -> int:
        try:
            with pq.ParquetFile(part.path) as file:
                chosen = self._choose(part.name, file.schema_arrow.names)
                return self._keep(chosen, file.iter_batches(delimited.BATCH, columns=[*chosen]))
        except (pa.ArrowException, OSError) as exc:
            if isinstance(exc, OSError) and exc.errno:
                raise  # the disk's fault
            size = part.path.stat().st_size
            raise BadInput(
                f"{part.name} is damaged Parquet (of {size:,} bytes): {first_line(exc)};"
                " write it anew"
            ) from exc

    def _text(self, part: Part, header: bool) -> int:
        layout = delimited.layout(part, header)
        chosen = self._choose(part.name, layout.names)
        known = len(self.files)
        try:
            return self._keep(chosen, delimited.quick(part, layout, [*chosen]))
        except delimited.Odd:
            self.files[known:] = []
            return self._keep(chosen, delimited.careful(part, layout, [*chosen]))

    def _choose(self, where: str, names: Sequence[str]) -> dict[str, str]:
        """Columns to take from a part, with the names of their staged ones."""
        names = [str(name) for name in names]
        found = self._wanted.of(names)
        missing = [name for name in dict.fromkeys(self._wanted.needed) if name not in found]
        if missing:
            raise BadInput(
                f"{where} has no column {', '.join(missing)}; it has {', '.join(names[:30])}"
            )
        if self.parts and set(found) != set(self.columns):
            odd = sorted(set(found) ^ set(self.columns))
            raise BadInput(
                f"{where} and {self.parts[0].name} do not have the same columns: {odd[0]} stands"
                " in one of them only; give parts that are alike"
            )
        for name in found:
            self.columns.setdefault(name, f"c{len(self.columns)}")
        return {source: self.columns[name] for name, source in found.items()}

    def _keep(self, chosen: Mapping[str, str], batches: Batches) -> int:
        rows, start = 0, self.rows
        with closing(_Writer(self._folder, self.files)) as writer:
            for batch in batches:
                writer.write(self._cleaned(chosen, batch, start + rows))
                rows += len(batch)
        return rows

    def _cleaned(
        self, chosen: Mapping[str, str], batch: pa.RecordBatch, start: int
    ) -> pa.RecordBatch:
        columns = {PLACE: pa.array(np.arange(start, start + len(batch)))}
        free = {self.columns.get(name) for name in self._wanted.free}
        for source, name in chosen.items():
            column = batch.column(batch.schema.get_field_index(source))
            found = clean(column, _BLANK if name in free else MISSING)
            if pa.types.is_null(found.type):
                found = found.cast(self._types.get(name, pa.string()))
            else:
                self._types[name] = found.type
            columns[name] = found
        if self._wanted.time in self.columns:
            columns[TIME] = self._times.read(columns[self.columns[str(self._wanted.time)]])
        return pa.RecordBatch.from_pydict(columns)

    def _read_times_anew(self) -> None:
        """No time is ISO 8601: read them as people write them."""
        column = self.columns[str(self._wanted.time)]
        day_first = any(_is_day_first(t) for path in self.files for t in _texts(path, column))

        def read(batch: pa.RecordBatch) -> pa.RecordBatch:
            place = batch.schema.get_field_index(TIME)
            times = _moments(batch.column(column), format="mixed", dayfirst=day_first)
            return batch.set_column(place, TIME, times)

        for path in self.files:
            _rewrite(path, read)


class _Writer:
    """Writes batches one behind the other, into a new file wherever the types change."""

    def __init__(self, folder: Path, written: list[Path]) -> None:
        self._folder = folder
        self._written = written
        self._open: pq.ParquetWriter | None = None

    def write(self, batch: pa.RecordBatch) -> None:
        if self._open is None or self._open.schema != batch.schema:
            self.close()
            path = self._folder / f"{len(self._written):06}.parquet"
            self._written.append(path)
            # It is read a few times and then gone: what is quick to write will do.
            plain = {"compression": "lz4", "use_dictionary": False, "write_statistics": False}
            self._open = pq.ParquetWriter(path, batch.schema, **plain)
        self._open.write_batch(batch)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
        self._open = None


def clean(column: pa.Array, missing: Sequence[str] = MISSING) -> pa.Array:
    """Texts without outer spaces, NaN and the words ``missing`` gone, of each kind the widest."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
        blank = pc.is_in(texts, value_set=pa.array(missing, pa.string()))
        return pc.if_else(blank, pa.scalar(None, pa.string()), texts)
    if pa.types.is_integer(kind) and kind != pa.uint64():
        return column.cast(pa.int64())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or kind == pa.uint64():
        numbers = column.cast(pa.float64(), safe=False)
        return pc.if_else(pc.is_nan(numbers), pa.scalar(None, pa.float64()), numbers)
    if pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us", kind.tz and "UTC"), safe=False)
    if pa.types.is_duration(kind):
        # Parquet would keep a number; as bytes it is, as here, neither number nor text.
        return column.cast(pa.int64()).cast(pa.string()).cast(pa.binary())
    return column


class _Times:
    """Reads times as ISO 8601, and remembers whether any was."""

    def __init__(self) -> None:
        self.is_iso = True
        self._texts = self._read = 0

    def read(self, column: pa.Array) -> pa.Array:
        if not pa.types.is_string(column.type):
            return typed_moments(column)
        found = _moments(column, format="ISO8601")
        self._texts += len(column) - column.null_count
        self._read += len(found) - found.null_count
        self.is_iso = bool(self._read) or not self._texts
        return found


def typed_moments(column: pa.Array) -> pa.Array:
    """Moments in UTC of a column that holds no text: none of numbers."""
    if pa.types.is_timestamp(column.type):
        return column.cast(_UTC) if column.type.tz else pc.assume_timezone(column, "UTC")
    if pa.types.is_date(column.type):
        return pc.assume_timezone(column.cast(pa.timestamp("us")), "UTC")
    return pa.nulls(len(column), _UTC)


def moments(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts or times as moments in UTC, NaT where they are none."""
    if pd.api.types.is_numeric_dtype(column):
        return pd.Series(pd.NaT, index=column.index, dtype=_TIMES)
    found = pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601")
    if found.isna().all():
        first = _is_day_first(column)
        found = pd.to_datetime(column, utc=True, errors="coerce", format="mixed", dayfirst=first)
    return found.astype(_TIMES)


def _moments(column: pa.Array, **how: Any) -> pa.Array:
    found = pd.to_datetime(column.to_pandas(), utc=True, errors="coerce", **how)
    return pa.array(found.astype(_TIMES), _UTC)


def _is_day_first(column: "pd.Series[Any]") -> bool:
    """Does 03/04/2021 mean April? Yes where some first number is no month; one value cannot say."""
    numbers = column.astype(str).str.extract(_DAYS)[0]
    return bool((numbers.astype("float64") > 12).any())


def _texts(path: Path, column: str) -> "Iterator[pd.Series[Any]]":
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(delimited.BATCH, columns=[column]):
            yield batch.column(0).to_pandas()


def _rewrite(path: Path, change: Callable[[pa.RecordBatch], pa.RecordBatch]) -> None:
    new = path.with_suffix(".new")
    with pq.ParquetFile(path) as file, pq.ParquetWriter(new, file.schema_arrow) as writer:
        for batch in file.iter_batches(delimited.BATCH):
            writer.write_batch(change(batch))
    new.replace(path)


def _stamp(path: Path) -> tuple[int, int]:
    told = path.stat()
    return told.st_size, told.st_mtime_ns
