"""Where do raw rows come from? A file or the simulator, read as the project says."""

import csv
import gzip
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from perennial.data import simulator
from perennial.errors import BadInput, many
from perennial.project import Feature, Project

PURCHASE_COLUMNS = (
    "InvoiceNo",
    "StockCode",
    "Description",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
)
# What public tables write where they know nothing.
MISSING = ("", "?", "NA", "N/A", "NaN", "nan", "NULL", "null", "None")


def read(project: Project, source: str | None, folder: Path) -> pd.DataFrame:
    """Raw rows of ``source``, else of the project's own source (a path is relative to ``folder``).

    Raises BadInput that names the file and what is wrong or missing in it.
    """
    if source:
        return _checked(project, Path(source).absolute())
    if project.source.path:
        return _checked(project, folder / project.source.path)
    if project.source.simulator:
        return simulator.simulate(project.source.simulator)
    raise BadInput(
        f"{project.name} needs its data: {project.source.wanted}; give it by --source FILE"
    )


def _checked(project: Project, path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise BadInput(f"no file at {path}; wanted {project.source.wanted}, by --source FILE")
    raw = read_table(path, header=project.source.header)
    if raw.empty:
        raise BadInput(f"{path} has no rows; wanted {project.source.wanted}")
    if project.source.join_times:
        raw = _with_times(raw, path.parent / project.source.join_times, project)
    absent = [c for c in wanted_columns(project) if c not in raw.columns]
    if absent:
        have = ", ".join(map(str, raw.columns[:12]))
        raise many(f"{path} lacks columns (it has {have})", [f"no column {c}" for c in absent])
    return _purchases(raw, path) if project.kind == "transactions" else raw


def wanted_columns(project: Project) -> tuple[str, ...]:
    """Columns that the project cannot do without."""
    if project.kind == "transactions":
        return PURCHASE_COLUMNS
    time = (project.time.column,) if project.time.column else ()
    found = (*project.feature_names, *project.sensitive, project.label.column, *time)
    return tuple(dict.fromkeys(str(c) for c in found))


def read_table(path: Path, *, header: bool = True) -> pd.DataFrame:
    """A CSV (any separator, also .gz) or Parquet file; without header columns are c1, c2, ..."""
    try:
        if path.suffix in (".parquet", ".pq"):
            return pd.read_parquet(path)
        return _read_csv(path, header)
    except (
        OSError,
        UnicodeDecodeError,
        EOFError,
        csv.Error,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
        pa.ArrowException,
        zipfile.BadZipFile,
    ) as exc:
        first = " ".join(str(exc).split())[:200]
        raise BadInput(f"{path} is not a readable CSV or Parquet file: {first}") from exc


def separator(path: Path) -> str:
    """The sign between columns: the one of , ; tab | that the first line has most of."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        first = file.readline()
    return max(",;\t|", key=first.count)


def _read_csv(path: Path, header: bool) -> pd.DataFrame:
    frame = pd.read_csv(
        path,
        sep=separator(path),
        header=0 if header else None,
        skipinitialspace=True,
        na_values=list(MISSING),
        keep_default_na=False,
        low_memory=False,
    )
    if not header:
        frame.columns = [f"c{i + 1}" for i in range(frame.shape[1])]
    frame.columns = [str(c).strip() for c in frame.columns]
    return frame


def _with_times(raw: pd.DataFrame, path: Path, project: Project) -> pd.DataFrame:
    """Add the time column from a file of (row number from 0, time)."""
    if not path.is_file():
        raise BadInput(f"no file at {path}; source.join_times wants a row number and a time a row")
    times = read_table(path)
    if times.shape[1] != 2 or len(times) != len(raw):
        raise BadInput(
            f"{path} has {len(times):,} rows and {times.shape[1]} columns, wanted"
            f" {len(raw):,} rows of a row number and a time"
        )
    ordered = times.sort_values(times.columns[0], kind="stable")
    return raw.assign(**{str(project.time.column): ordered.iloc[:, 1].to_numpy()})


def _purchases(raw: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Raw purchases with the types that the feature queries count on."""
    frame = raw[list(PURCHASE_COLUMNS)].copy()
    frame["InvoiceDate"] = _times(frame["InvoiceDate"], "InvoiceDate", path)
    for column in ("Quantity", "UnitPrice", "CustomerID"):
        frame[column] = pd.to_numeric(frame[column], errors="coerce").astype("float64")
    for column in ("InvoiceNo", "StockCode", "Country"):
        frame[column] = frame[column].astype(str)
    return frame.sort_values("InvoiceDate", kind="stable").reset_index(drop=True)


def _times(values: "pd.Series[object]", column: str, where: object) -> "pd.Series[pd.Timestamp]":
    """Moments in UTC, to the microsecond. Raises BadInput that counts the unreadable ones."""
    try:
        times = pd.to_datetime(values, utc=True, errors="coerce", format="mixed")
    except (ValueError, TypeError, OverflowError) as exc:
        raise BadInput(f"{where}: column {column} holds no times: {exc}") from exc
    bad = times.isna()
    if bad.any():
        seen = str(values[bad].iloc[0])
        raise BadInput(
            f"{where}: column {column} has {int(bad.sum()):,} values that are no time, such as"
            f" {seen!r}; wanted 2011-06-01 or 2011-06-01 12:30"
        )
    return times.astype("datetime64[us, UTC]")


def table_rows(project: Project, raw: pd.DataFrame) -> pd.DataFrame:
    """Rows of a plain table in order of time: row_id, event_time, label, label_known_at, features.

    ``label`` is 1.0, 0.0 or NaN where the table has none; nothing is blanked here.
    """
    frame = pd.DataFrame({"row_id": np.arange(len(raw), dtype=np.int64)})
    frame["event_time"] = _event_times(project, raw)
    frame["label"] = _labels(project, raw)
    known = frame["event_time"] + project.label.known_after
    frame["label_known_at"] = known.astype("datetime64[us, UTC]")
    typed = {f.name: _typed(f, raw[f.name]).to_numpy() for f in project.features}
    others = [s for s in project.sensitive if s not in typed]
    extra = {name: raw[name].astype("string").astype(object).to_numpy() for name in others}
    frame = pd.concat([frame, pd.DataFrame({**typed, **extra})], axis=1)
    return frame.sort_values("event_time", kind="stable").reset_index(drop=True)


def _event_times(project: Project, raw: pd.DataFrame) -> "pd.Series[pd.Timestamp]":
    if project.time.column:
        column = project.time.column
        return _times(raw[column], column, project.name).reset_index(drop=True)
    order = project.time.row_order
    if order is None:
        raise BadInput(f"{project.name}: time needs a column or row_order")
    steps = pd.Series(np.arange(len(raw))) * pd.Timedelta(order.step)
    return (pd.Timestamp(order.start) + steps).astype("datetime64[us, UTC]")


def _labels(project: Project, raw: pd.DataFrame) -> "pd.Series[float]":
    column, wanted = str(project.label.column), project.label.positive
    values = raw[column]
    positive = _as_text(values) == wanted
    if not positive.any():
        seen = ", ".join(repr(v) for v in list(_as_text(values).dropna().unique())[:5])
        raise BadInput(
            f"{project.name}: label {column} is never {wanted!r}; it holds {seen}; mend"
            " label.positive"
        )
    label = positive.astype("float64")
    return label.where(values.notna()).reset_index(drop=True)


def _as_text(values: "pd.Series[object]") -> "pd.Series[str]":
    """Values as a user writes them in project.yaml: 1.0 is 1, text has no space around it."""
    if pd.api.types.is_float_dtype(values) and (values.dropna() % 1 == 0).all():
        return values.astype("Int64").astype("string")
    return values.astype("string").str.strip()


def _typed(feature: Feature, values: "pd.Series[object]") -> "pd.Series[object]":
    if feature.type == "number":
        return pd.to_numeric(values, errors="coerce").astype("float64")
    return _as_text(values).astype(object).where(values.notna(), None)
