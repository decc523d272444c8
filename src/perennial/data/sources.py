"""Where do raw rows come from, and do they hold what the project names?"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from perennial.data import delimited, places, query, rows, simulator, staging, table
from perennial.data.places import Part
from perennial.data.rows import Rows
from perennial.data.staging import Staging, Taken, Wanted
from perennial.data.table import Table
from perennial.errors import BadInput
from perennial.project import Project
from perennial.store import scratch as scratches

TRANSACTIONS = rows.TRANSACTIONS
as_times = staging.moments
separator = delimited.separator


@dataclass(frozen=True)
class Origin:
    """What rows were read from: a kind (files, query or simulator), its words, and its parts."""

    kind: str
    told: str
    parts: tuple[Taken, ...]


@dataclass(frozen=True)
class Opened:
    """A source whose rows can be asked for."""

    origin: Origin
    table: Table
    rows: Rows


def read(project: Project, source: str | None, root: Path, *, url: str = "") -> pd.DataFrame:
    """Raw rows of a project: from ``source``, else from what the project names as its own.

    A table's rows stand as in the source, with the columns that the project needs (``table_rows``
    types them); purchases are typed, oldest first. ``root`` is the project's folder; relative
    paths in the project start there. ``url`` is that of the database, where the environment says
    it. Raises BadInput that names the file, what was wrong and the remedy.
    """
    with scratches.folder() as scratch, opened(project, source, root, scratch, url=url) as found:
        if project.kind == "table":
            return found.table.raw()
        found.rows.check()
        return found.rows.frame()


@contextmanager
def opened(
    project: Project, source: str | None, root: Path, scratch: Path, *, url: str = ""
) -> Iterator[Opened]:
    """Rows as ``read`` finds them, in bounded memory; ``scratch`` is an empty folder for them."""
    staged = Staging(scratch / "rows", rows.wanted(project))
    times: tuple[str, Staging] | None = None
    if source or project.source.path:
        kind, told = "files", str(source or project.source.path)
        base = Path() if source else root
        for part in places.parts(told, base, project.source.wanted, scratch):
            staged.add_file(part, header=project.source.header)
        if project.source.join_times:
            times = _times(project, places.beside(told, project.source.join_times), base, scratch)
    elif project.source.query:
        kind, told = "query", project.source.query
        with query.answer(_url(project, url), told, root) as answer:
            staged.add("source.query", answer.names, answer.batches)
    elif project.source.simulator:
        kind, told = "simulator", str(project.source.simulator.seed)
        _add_frame(staged, kind, simulator.simulate(project.source.simulator))
    else:
        raise BadInput(
            f"{project.name} has no data of its own; give --source with {project.source.wanted}"
        )
    staged.finish()
    with table.opened(staged, scratch, times) as found:
        yield Opened(Origin(kind, told, tuple(staged.parts)), found, Rows(project, found))


def read_file(path: Path, *, header: bool = True) -> pd.DataFrame:
    """A CSV (also .gz) or Parquet file as it stands; texts are trimmed and blanks are missing."""
    with scratches.folder() as scratch:
        staged = Staging(scratch / "rows", Wanted())
        staged.add_file(Part(str(path), path), header=header)
        staged.finish()
        with table.opened(staged, scratch) as found:
            return found.raw()


def table_rows(project: Project, raw: pd.DataFrame) -> pd.DataFrame:
    """Rows of a table project in order of time, in the words that all steps share.

    Columns: row_id (place in the file), event_time, label (0 or 1, NaN where it is blank),
    label_known_at, the features, the sensitive columns that are not features, and what else the
    project's expectations name. Raises BadInput for a value that does not fit.
    """
    with scratches.folder() as scratch:
        staged = Staging(scratch / "rows", rows.wanted(project, joined=True))
        _add_frame(staged, "the table", raw)
        staged.finish()
        with table.opened(staged, scratch) as found:
            typed = Rows(project, found)
            typed.check()
            return typed.frame()


def as_numbers(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Texts as numbers, NaN where they are none; numbers and truth values as floats."""
    if column.dtype == object or isinstance(column.dtype, pd.StringDtype | pd.CategoricalDtype):
        return pd.to_numeric(column.astype("object"), errors="coerce").astype("float64")
    return column.astype("float64")


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


def _times(project: Project, location: str, base: Path, scratch: Path) -> tuple[str, Staging]:
    """The time column that stands in a second file: row number, time."""
    wanted = "source.join_times beside the source"
    staged = Staging(scratch / "times", Wanted(time=project.time.column))
    for part in places.parts(location, base, wanted, scratch):
        staged.add_file(part)
        if len(staged.columns) != 2:
            raise BadInput(
                f"{part.name} has {len(staged.columns)} columns, wanted two: row number and time"
            )
        if list(staged.columns)[1] != project.time.column:
            raise BadInput(
                f"{part.name} has no column {project.time.column} behind the row number; it has"
                f" {', '.join(staged.columns)}"
            )
    staged.finish()
    return str(project.time.column), staged


def _add_frame(staged: Staging, name: str, frame: pd.DataFrame) -> None:
    columns = [_arrow(frame[column]) for column in frame.columns]
    found = pa.Table.from_arrays(columns, names=[str(column) for column in frame.columns])
    staged.add(name, found.column_names, found.to_batches(delimited.BATCH))


def _arrow(column: "pd.Series[Any]") -> pa.Array:
    try:
        return pa.Array.from_pandas(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.Array.from_pandas(as_texts(column), type=pa.string())


def _url(project: Project, url: str) -> str:
    found = url or project.source.url
    if not found:
        raise BadInput(
            f"{project.name} asks a database by source.query, but nothing says which; set"
            " PERENNIAL_SOURCE_URL, or source.url without a password"
        )
    return found
