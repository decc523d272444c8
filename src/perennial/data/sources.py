"""Where do raw rows come from, and do they hold what the project names?"""

import csv
import gzip
import io
import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import simulator
from perennial.errors import BadInput
from perennial.project import Project, RowOrder

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
MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "null", "NULL")
_SEPARATORS = (",", ";", "\t", "|")
_MOST_ODD = 0.01  # numbers that do not read as numbers, before it is no slip but another type
_STARTS = {"parquet": b"PAR1", "gzip": b"\x1f\x8b", "zip": b"PK\x03\x04"}


def read(project: Project, source: str | None, root: Path) -> pd.DataFrame:
    """Raw rows of a project: from ``source``, else from its own path, else from its simulator.

    ``root`` is the project's folder; relative paths in the project start there. Raises BadInput
    that names the file, what was wrong and the remedy.
    """
    if not source and not project.source.path and project.source.simulator:
        return simulator.simulate(project.source.simulator)
    path = _locate(project, source, root)
    raw = read_file(path, header=project.source.header)
    if project.source.join_times:
        raw = _with_times(raw, path.parent / project.source.join_times)
    if project.kind == "transactions":
        return _transactions(project, raw, path)
    _require(raw, _needed(project), path)
    return raw


def read_file(path: Path, *, header: bool = True) -> pd.DataFrame:
    """A CSV (also .gz) or Parquet file as it stands; texts are trimmed and blanks are missing."""
    with path.open("rb") as file:
        start = file.read(4)
    if start.startswith(_STARTS["zip"]):
        raise BadInput(f"{path} is a zip archive or a spreadsheet; save it as CSV or Parquet")
    raw = _parquet(path) if start == _STARTS["parquet"] else _csv(path, start, header)
    if raw.empty:
        raise BadInput(f"{path} has no rows; give a file with a header and at least one row")
    return raw


def table_rows(project: Project, raw: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table project in order of time, in the words that all steps share.

    Columns: row_id (place in the file), event_time, label (0 or 1, NaN where it is blank),
    label_known_at, the features and the sensitive columns that are not features.
    """
    times = _times(project, raw)
    rows = pd.DataFrame({"row_id": np.arange(len(raw), dtype="int64"), "event_time": times})
    rows["label"] = _label(project, raw)
    rows["label_known_at"] = rows["event_time"] + project.label.known_after
    columns = {f.name: _typed(raw[f.name], f.type) for f in project.features}
    extra = [name for name in project.sensitive if name not in columns]
    columns |= {name: as_texts(raw[name]) for name in extra}
    rows = pd.concat([rows, pd.DataFrame(columns)], axis=1)
    return rows.sort_values("event_time", kind="stable", ignore_index=True)


def as_numbers(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts as numbers, NaN where they are none; numbers and truth values as floats."""
    if column.dtype == object or isinstance(column.dtype, pd.StringDtype | pd.CategoricalDtype):
        return pd.to_numeric(column.astype("object"), errors="coerce").astype("float64")
    return column.astype("float64")


def as_times(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts or times as moments in UTC, NaT where they are none."""
    if pd.api.types.is_numeric_dtype(column):
        return pd.Series(pd.NaT, index=column.index, dtype="datetime64[us, UTC]")
    found = pd.to_datetime(column, utc=True, errors="coerce", format="ISO8601")
    if found.isna().all():
        first = _day_first(column)
        found = pd.to_datetime(column, utc=True, errors="coerce", format="mixed", dayfirst=first)
    return found.astype("datetime64[us, UTC]")


def _day_first(column: "pd.Series[Any]") -> bool:
    """Does 03/04/2021 mean April? Yes where some first number is no month; one value cannot say."""
    numbers = column.astype(str).str.extract(r"^\s*(\d{1,2})[/.-]\d{1,2}[/.-]\d{2,4}\b")[0]
    return bool((numbers.astype("float64") > 12).any())


def as_texts(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts, with whole numbers written without a point; None where missing."""
    if pd.api.types.is_float_dtype(column) and (column.dropna() % 1 == 0).all():
        column = column.astype("Int64")
    texts = column.astype("object").where(column.notna(), None)
    return texts.map(str, na_action="ignore").astype("object")


def known_times(column: "pd.Series[Any]", name: str) -> "pd.Series[Any]":
    """Moments of a column in which every value is one. Raises BadInput that names a row."""
    found = as_times(column)
    odd = np.flatnonzero(found.isna())
    if len(odd):
        raise BadInput(
            f"{name} is no date in {len(odd):,} of {len(found):,} rows, such as row {odd[0] + 1}:"
            f" {column.iloc[odd[0]]!r}; wanted dates such as 2011-06-01 12:30"
        )
    return found


def _locate(project: Project, source: str | None, root: Path) -> Path:
    """A path given by hand starts where the user stands, the project's own at its folder."""
    if not source and not project.source.path:
        raise BadInput(
            f"{project.name} has no data of its own; give --source with {project.source.wanted}"
        )
    path = Path(source) if source else root / str(project.source.path)
    if not path.is_file():
        raise BadInput(f"no file at {path}; wanted {project.source.wanted}")
    return path


def _parquet(path: Path) -> pd.DataFrame:
    import pyarrow as pa

    try:
        return _trimmed(pd.read_parquet(path))
    except (pa.ArrowInvalid, OSError) as exc:
        raise BadInput(f"{path} is damaged Parquet: {_first_line(exc)}; write it anew") from exc


def _csv(path: Path, start: bytes, header: bool) -> pd.DataFrame:
    try:
        packed = start.startswith(_STARTS["gzip"])
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, gzip.BadGzipFile) as exc:
        raise BadInput(f"{path} is damaged gzip: {_first_line(exc)}; copy it again") from exc
    except UnicodeDecodeError as exc:
        raise BadInput(
            f"{path} is neither Parquet nor UTF-8 text (byte {exc.start}); save it as CSV or"
            " Parquet"
        ) from exc
    if "\x00" in text:
        raise BadInput(f"{path} is neither Parquet nor text; save it as CSV or Parquet")
    return _parse(path, text, header)


def _parse(path: Path, text: str, header: bool) -> pd.DataFrame:
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise BadInput(f"{path} is empty; give a file with a header and at least one row")
    try:
        raw = pd.read_csv(
            io.StringIO(text),
            sep=separator(first),
            header=0 if header else None,
            skipinitialspace=True,
            na_values=list(MISSING),
            keep_default_na=False,
            low_memory=False,
        )
    except (pd.errors.ParserError, csv.Error, ValueError) as exc:
        raise BadInput(f"{path} is not readable CSV: {_first_line(exc)}; mend it") from exc
    names = [str(c).strip() if header else f"column_{i + 1}" for i, c in enumerate(raw.columns)]
    raw.columns = pd.Index(names)
    return _trimmed(raw)


def separator(line: str) -> str:
    """What splits a line into the most parts: a comma unless another does better."""
    return max(_SEPARATORS, key=lambda mark: len(next(csv.reader([line], delimiter=mark))))


def _trimmed(raw: pd.DataFrame) -> pd.DataFrame:
    """Texts without outer spaces; blank ones are missing."""
    for name in raw.select_dtypes("object").columns:
        if pd.api.types.infer_dtype(raw[name], skipna=True) == "string":
            text = raw[name].str.strip()
            raw[name] = text.mask(text.isin(MISSING), None)
    return raw


def _with_times(raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Add the time column that stands in a second file: row number, time."""
    if not path.is_file():
        raise BadInput(f"no file at {path}; source.join_times wants it beside the source")
    times = read_file(path)
    if times.shape[1] != 2:
        raise BadInput(f"{path} has {times.shape[1]} columns, wanted two: row number and time")
    number, moment = times.columns
    by_row = times.drop_duplicates(number).set_index(number)[moment]
    return raw.assign(**{str(moment): by_row.reindex(range(len(raw))).to_numpy()})


def _transactions(project: Project, raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Raw purchases with the types of the public file, oldest first."""
    raw = raw.rename(columns={"Customer ID": "CustomerID", "Invoice": "InvoiceNo"})
    raw = raw.rename(columns={"Price": "UnitPrice"} if "UnitPrice" not in raw else {})
    _require(raw, TRANSACTIONS, path)
    raw = raw[list(TRANSACTIONS)].copy()
    raw["InvoiceDate"] = known_times(raw["InvoiceDate"], "InvoiceDate")
    for name in ("Quantity", "UnitPrice", "CustomerID"):
        raw[name] = _numbers(raw[name])
    for name in ("InvoiceNo", "StockCode", "Country", "Description"):
        raw[name] = as_texts(raw[name])
    return raw.sort_values(str(project.time.column), kind="stable", ignore_index=True)


def _needed(project: Project) -> tuple[str, ...]:
    timed = (project.time.column,) if project.time.column else ()
    return (*timed, str(project.label.column), *project.feature_names, *project.sensitive)


def _require(raw: pd.DataFrame, wanted: Sequence[str], path: Path) -> None:
    missing = [name for name in dict.fromkeys(wanted) if name not in raw.columns]
    if missing:
        raise BadInput(
            f"{path} has no column {', '.join(missing)}; it has"
            f" {', '.join(map(str, raw.columns[:30]))}"
        )


def _times(project: Project, raw: pd.DataFrame) -> "pd.Series[Any]":
    if project.time.row_order:
        return _in_order(project.time.row_order, len(raw))
    return known_times(raw[project.time.column], str(project.time.column))


def _in_order(order: RowOrder, count: int) -> "pd.Series[Any]":
    steps = np.arange(count) * (order.step // timedelta(microseconds=1))
    moments = pd.Timestamp(order.start) + pd.to_timedelta(steps, unit="us")
    return pd.Series(moments).astype("datetime64[us, UTC]")


def _label(project: Project, raw: pd.DataFrame) -> "pd.Series[Any]":
    name, positive = str(project.label.column), project.label.positive.strip()
    texts = as_texts(raw[name])
    if not (texts == positive).any():
        seen = ", ".join(sorted(texts.dropna().unique())[:6])
        raise BadInput(
            f"label.positive is {positive!r}, but column {name} holds {seen or 'nothing'}; mend"
            " label.positive in project.yaml"
        )
    return (texts == positive).astype("float64").where(texts.notna())


def _typed(column: "pd.Series[Any]", kind: str) -> "pd.Series[Any]":
    return _numbers(column) if kind == "number" else as_texts(column)


def _numbers(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Numbers; a few odd texts become missing, many are another type."""
    numbers = as_numbers(column)
    odd = numbers.isna() & column.notna()
    if odd.mean() > _MOST_ODD:
        raise BadInput(
            f"{column.name} is no number in {int(odd.sum()):,} of {len(odd):,} rows, such as"
            f" {column[odd].iloc[0]!r}; make it a category or mend the file"
        )
    if odd.any():
        log.warning("odd numbers are missing column=%s rows=%d", column.name, int(odd.sum()))
    return numbers


def _first_line(exc: BaseException) -> str:
    return (str(exc).splitlines() or [type(exc).__name__])[0].strip().rstrip(".")
