"""What goes wrong with files that others deliver? Faults to break a good one with, by a seed."""

import difflib
import gzip
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import sources
from perennial.errors import BadInput
from perennial.store import files

_FUTURE = pd.DateOffset(years=20)
_OUTLIER = 1e6
_LATE_COLUMN = "_v2"


@dataclass(frozen=True)
class File:
    """A raw file: its rows as they stand (a CSV's as texts, blanks as "") and how it is written."""

    path: Path
    rows: pd.DataFrame
    is_parquet: bool
    separator: str = ","
    header: bool = True
    is_packed: bool = False
    encoding: str = "utf-8"

    def to_bytes(self) -> bytes:
        """The same rows, the same bytes."""
        if self.is_parquet:
            buffer = io.BytesIO()
            self.rows.to_parquet(buffer, index=False)
            return buffer.getvalue()
        text = self.rows.to_csv(
            index=False, header=self.header, sep=self.separator, lineterminator="\n"
        )
        return self.packed(text.encode(self.encoding))

    def packed(self, data: bytes) -> bytes:
        """Compressed where the file is, without the time of day."""
        return gzip.compress(data, mtime=0) if self.is_packed else data


@dataclass(frozen=True)
class Wish:
    """Where and how much: a column, a second one, a share of rows (0 to 1) and a seed."""

    column: str
    other: str
    share: float
    seed: int

    def picked(self, count: int) -> "np.ndarray[Any, Any]":
        """Places of the rows that break, in their order: the share of them, at least one."""
        many = min(count, max(1, round(count * self.share)))
        chosen = np.random.default_rng(self.seed).choice(count, many, replace=False)
        return np.sort(chosen)


@dataclass(frozen=True)
class Fault:
    """One way to break a file.

    ``needs`` is what it wants beside the file: nothing, a column, a date column, two columns.
    ``named`` is what a good validation names: the column, the key or the file.
    """

    name: str
    what: str
    needs: str
    named: str
    share: float
    make: Callable[[File, Wish], bytes]


@dataclass(frozen=True)
class Broken:
    """What was written, for a sentence."""

    fault: Fault
    column: str
    rows: int
    path: Path


def names() -> tuple[str, ...]:
    """All faults, as the table has them."""
    return tuple(fault.name for fault in FAULTS)


def find(name: str) -> Fault:
    """The fault of a name. Raises BadInput that suggests the nearest names."""
    found = next((fault for fault in FAULTS if fault.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"wanted {', '.join(names())}"
        raise BadInput(f"there is no fault {name!r}; {hint}")
    return found


def write(
    source: Path,
    fault: str,
    to: Path,
    *,
    column: str = "",
    other: str = "",
    share: float | None = None,
    seed: int = 0,
    header: bool = True,
) -> Broken:
    """Write a broken copy of a CSV (also .gz) or Parquet file; the same wish, the same bytes.

    ``share`` is the part of the rows that break (of the bytes, for a truncated file), by default
    the fault's own. Raises BadInput for a name, column or share that is not to be had, and where
    ``to`` is there already.
    """
    found = find(fault)
    wanted = found.share if share is None else share
    if not 0 < wanted <= 1:
        raise BadInput(f"--share is {wanted:g}, wanted a part above 0 and up to 1")
    if to.exists():
        raise BadInput(f"{to} is there already; give another file by --to")
    file = read(source, header=header)
    wish = Wish(_column(file, found, column), _other(file, found, column, other), wanted, seed)
    files.write_atomic(to, found.make(file, wish))
    return Broken(found, wish.column, len(file.rows), to)


def read(source: Path, *, header: bool = True) -> File:
    """A file as it stands: no blank is filled, no text becomes a number."""
    if not source.is_file():
        raise BadInput(f"no file at {source}; give a CSV (also .gz) or Parquet file")
    data = source.read_bytes()
    if data.startswith(b"PAR1"):
        return _read_parquet(source)
    is_packed = data.startswith(b"\x1f\x8b")
    try:
        text = (gzip.decompress(data) if is_packed else data).decode("utf-8-sig")
        mark = sources.separator(next(line for line in text.splitlines() if line.strip()))
        rows = _parsed(text, mark, header)
    except (OSError, EOFError, UnicodeDecodeError, StopIteration, ValueError) as exc:
        raise BadInput(f"{source} is no whole CSV or Parquet file; break a good one") from exc
    return File(source, rows, False, mark, header, is_packed)


def _read_parquet(source: Path) -> File:
    try:
        return File(source, pd.read_parquet(source), True)
    except (OSError, ValueError) as exc:
        raise BadInput(f"{source} is damaged Parquet; break a good file") from exc


def _parsed(text: str, mark: str, header: bool) -> pd.DataFrame:
    rows = pd.read_csv(
        io.StringIO(text),
        sep=mark,
        header=0 if header else None,
        dtype=str,
        keep_default_na=False,
        skipinitialspace=True,
    )
    given = [str(c).strip() if header else f"column_{i + 1}" for i, c in enumerate(rows.columns)]
    rows.columns = pd.Index(given)
    return rows


def _column(file: File, fault: Fault, column: str) -> str:
    has = [str(c) for c in file.rows.columns]
    if not fault.needs:
        return column if column in has else ""
    if column in has:
        return column
    near = difflib.get_close_matches(column, has, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(has[:30])}"
    if not column:
        raise BadInput(f"{fault.name} wants --column; {file.path} has {', '.join(has[:30])}")
    raise BadInput(f"{file.path} has no column {column}; {hint}")


def _other(file: File, fault: Fault, column: str, other: str) -> str:
    """The second column: given, else the one behind the first."""
    has = [str(c) for c in file.rows.columns]
    if fault.needs != _TWO:
        return ""
    if not other and len(has) > 1:
        return has[(has.index(column) + 1) % len(has)]
    if other not in has or other == column:
        raise BadInput(f"{file.path} has no second column {other or '(it has one)'} for --other")
    return other


def _with(file: File, **columns: Any) -> bytes:
    return replace(file, rows=file.rows.assign(**columns)).to_bytes()


def _of_rows(file: File, rows: pd.DataFrame) -> bytes:
    return replace(file, rows=rows.reset_index(drop=True)).to_bytes()


def _rename(file: File, wish: Wish) -> bytes:
    renamed = {wish.column: wish.column + _LATE_COLUMN}
    return _of_rows(_headed(file), file.rows.rename(columns=renamed))


def _headed(file: File) -> File:
    if not file.header:
        raise BadInput(f"{file.path} names no columns in its first line, so none can be renamed")
    return file


def _drop(file: File, wish: Wish) -> bytes:
    return _of_rows(file, file.rows.drop(columns=wish.column))


def _texts(file: File, wish: Wish) -> bytes:
    column = _as_object(file, wish.column)
    places = _filled(file, wish)
    column.iloc[places] = [f"{value} EUR" for value in column.iloc[places]]
    if file.is_parquet:
        column = column.map(str, na_action="ignore")
    return _with(file, **{wish.column: column})


def _swap(file: File, wish: Wish) -> bytes:
    places = wish.picked(len(file.rows))
    one, other = _as_object(file, wish.column), _as_object(file, wish.other)
    left, right = one.copy(), other.copy()
    left.iloc[places], right.iloc[places] = other.iloc[places], one.iloc[places]
    return _with(file, **{wish.column: _typed(left), wish.other: _typed(right)})


def _typed(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Numbers where all are, else texts: a Parquet column holds one type."""
    found = column.infer_objects()
    if found.dtype != object:
        return found
    return found.where(found.isna(), found.map(str)) if found.notna().any() else found


def _scale(factor: float) -> Callable[[File, Wish], bytes]:
    def make(file: File, wish: Wish) -> bytes:
        return _with(file, **{wish.column: _scaled(file, wish, factor)})

    return make


def _scaled(file: File, wish: Wish, factor: float) -> "pd.Series[Any]":
    numbers = sources.as_numbers(file.rows[wish.column].replace("", None))
    if numbers.isna().all():
        raise BadInput(f"{wish.column} of {file.path} holds no numbers, so they cannot be changed")
    changed = numbers.copy()
    places = wish.picked(len(numbers))
    changed.iloc[places] *= factor
    if file.is_parquet:
        return changed
    told = changed.map(lambda v: f"{v:.0f}" if float(v).is_integer() else repr(round(v, 9)))
    touched = (changed != numbers) & numbers.notna()
    return file.rows[wish.column].mask(touched, told)


def _blank(file: File, wish: Wish) -> bytes:
    column = _as_object(file, wish.column)
    column.iloc[wish.picked(len(column))] = None if file.is_parquet else ""
    kind = file.rows[wish.column].dtype
    is_whole = pd.api.types.is_integer_dtype(kind)
    return _with(file, **{wish.column: column.astype("Int64") if is_whole else _typed(column)})


def _repeat(file: File, wish: Wish) -> bytes:
    again = file.rows.iloc[wish.picked(len(file.rows))]
    return _of_rows(file, pd.concat([file.rows, again]))


def _lose(file: File, wish: Wish) -> bytes:
    kept = np.ones(len(file.rows), dtype=bool)
    kept[wish.picked(len(kept))] = False
    return _of_rows(file, file.rows[kept])


def _future(file: File, wish: Wish) -> bytes:
    return _moved(file, wish, lambda times: times + _FUTURE)


def _day_for_month(file: File, wish: Wish) -> bytes:
    return _moved(file, wish, lambda times: times.map(_exchanged, na_action="ignore"))


def _exchanged(moment: pd.Timestamp) -> pd.Timestamp:
    return moment.replace(day=moment.month, month=moment.day) if moment.day <= 12 else moment


def _moved(file: File, wish: Wish, move: "Callable[[pd.Series[Any]], pd.Series[Any]]") -> bytes:
    column = file.rows[wish.column]
    times = sources.as_times(column)
    if times.isna().mean() > 0.5:
        raise BadInput(f"{wish.column} of {file.path} holds no dates, so they cannot be moved")
    places = wish.picked(len(column))
    changed = times.copy()
    changed.iloc[places] = move(times.iloc[places])
    if not file.is_parquet or column.dtype == object:
        told = changed.dt.strftime("%Y-%m-%d %H:%M:%S").str.removesuffix(" 00:00:00")
        return _with(file, **{wish.column: column.mask(changed.ne(times) & times.notna(), told)})
    has_zone = getattr(column.dtype, "tz", None) is not None
    plain = changed if has_zone else changed.dt.tz_localize(None)
    return _with(file, **{wish.column: plain.astype(column.dtype)})


def _truncate(file: File, wish: Wish) -> bytes:
    data = file.path.read_bytes()
    return data[: max(1, int(len(data) * (1 - wish.share)))]


def _latin(file: File, wish: Wish) -> bytes:
    """Texts with accents, as old tools write them."""
    column = _as_object(_text_file(file), wish.column)
    places = _filled(file, wish)
    column.iloc[places] = [f"{value}é" for value in column.iloc[places]]
    return _with(replace(file, encoding="latin-1"), **{wish.column: column})


def _utf_16(file: File, wish: Wish) -> bytes:
    return replace(_text_file(file), encoding="utf-16").to_bytes()


def _text_file(file: File) -> File:
    if file.is_parquet:
        raise BadInput(f"{file.path} is Parquet, which has no encoding to get wrong; give a CSV")
    return file


def _flip(file: File, wish: Wish) -> bytes:
    one, other = _two_values(file, wish)
    column = _as_object(file, wish.column)
    places = wish.picked(len(column))
    column.iloc[places] = column.iloc[places].map({one: other, other: one})
    return _with(file, **{wish.column: column.astype(file.rows[wish.column].dtype)})


def _jump(file: File, wish: Wish) -> bytes:
    rare, common = _two_values(file, wish)
    column = _as_object(file, wish.column)
    others = np.flatnonzero(column == common)
    column.iloc[others[wish.picked(len(others))]] = rare
    return _with(file, **{wish.column: column.astype(file.rows[wish.column].dtype)})


def _two_values(file: File, wish: Wish) -> tuple[Any, Any]:
    """The rarer and the more common value of a label."""
    values = file.rows[wish.column].replace("", None).dropna().value_counts()
    if len(values) != 2:
        raise BadInput(
            f"{wish.column} of {file.path} has {len(values):,} values, wanted a label's 2"
        )
    return values.index[1], values.index[0]


def _no_rows(file: File, wish: Wish) -> bytes:
    return _of_rows(file, file.rows.head(0))


def _no_bytes(file: File, wish: Wish) -> bytes:
    return b""


def _empty_rows(file: File, wish: Wish) -> bytes:
    """Rows without a single value, as spreadsheets leave them at the end."""
    count = max(1, round(len(file.rows) * wish.share))
    none = pd.DataFrame(index=range(count), columns=file.rows.columns, dtype=object)
    if not file.is_parquet:
        return _of_rows(file, pd.concat([file.rows, none.fillna("")]))
    return _of_rows(file, file.rows.reindex(range(len(file.rows) + count)))


def _constant(file: File, wish: Wish) -> bytes:
    column = file.rows[wish.column]
    known = column[column.notna() & (column.astype(str) != "")]
    if known.empty:
        raise BadInput(f"{wish.column} of {file.path} holds nothing that could be repeated")
    return _with(
        file, **{wish.column: pd.Series(known.iloc[0], index=column.index, dtype=column.dtype)}
    )


def _shout(file: File, wish: Wish) -> bytes:
    """The same words in capitals, or small where they are capitals already."""
    column = _as_object(file, wish.column)
    places = _filled(file, wish)
    column.iloc[places] = [_recased(str(value)) for value in column.iloc[places]]
    return _with(file, **{wish.column: column})


def _recased(text: str) -> str:
    return text.upper() if text.upper() != text else text.lower()


def _as_object(file: File, name: str) -> "pd.Series[Any]":
    return file.rows[name].astype("object").copy()


def _filled(file: File, wish: Wish) -> "np.ndarray[Any, Any]":
    """Of the rows that break those that hold a value."""
    column = file.rows[wish.column]
    places = wish.picked(len(column))
    here = (column.notna() & (column.astype(str) != "")).to_numpy()
    filled: np.ndarray[Any, Any] = places[here[places]]
    return filled


_ONE, _DATE, _TWO, _LABEL = "a column", "a date column", "two columns", "a label column"
_COLUMN, _KEY, _FILE = "the column", "the key", "the file"

FAULTS = (
    Fault("renamed-column", "a column has another name", _ONE, _COLUMN, 1.0, _rename),
    Fault("missing-column", "a column is not there", _ONE, _COLUMN, 1.0, _drop),
    Fault("numbers-as-texts", "12 becomes '12 EUR'", _ONE, _COLUMN, 1.0, _texts),
    Fault("swapped-columns", "two columns have each other's values", _TWO, _COLUMN, 1.0, _swap),
    Fault("unit-x100", "numbers are in another unit", _ONE, _COLUMN, 1.0, _scale(100.0)),
    Fault("sign-flipped", "numbers have the other sign", _ONE, _COLUMN, 1.0, _scale(-1.0)),
    Fault("outliers", "numbers a million times too large", _ONE, _COLUMN, 0.05, _scale(_OUTLIER)),
    Fault("nulls", "values are missing", _ONE, _COLUMN, 0.4, _blank),
    Fault("constant-column", "every row has the first value", _ONE, _COLUMN, 1.0, _constant),
    Fault("renamed-category", "texts in other capitals", _ONE, _COLUMN, 1.0, _shout),
    Fault("future-dates", "dates lie 20 years ahead", _DATE, _COLUMN, 0.05, _future),
    Fault("day-for-month", "3 April becomes 4 March", _DATE, _COLUMN, 1.0, _day_for_month),
    Fault("label-flip", "a label's two values are exchanged", _LABEL, _COLUMN, 1.0, _flip),
    Fault("label-jump", "rows of the common label get the rare one", _LABEL, _COLUMN, 0.4, _jump),
    Fault("duplicated-rows", "rows come twice", "", _KEY, 0.2, _repeat),
    Fault("lost-rows", "rows are not there", "", _FILE, 0.95, _lose),
    Fault("empty-rows", "rows without any value at the end", "", _FILE, 0.2, _empty_rows),
    Fault("no-rows", "a header and nothing else", "", _FILE, 1.0, _no_rows),
    Fault("no-bytes", "a file of no bytes", "", _FILE, 1.0, _no_bytes),
    Fault("truncated-file", "the copy broke off", "", _FILE, 0.4, _truncate),
    Fault("encoding-latin-1", "texts with accents in Latin-1", _ONE, _FILE, 0.05, _latin),
    Fault("encoding-utf-16", "texts in UTF-16", "", _FILE, 1.0, _utf_16),
)
