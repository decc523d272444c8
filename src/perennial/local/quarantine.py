"""Which rows are kept aside, and what shall become of them: list, show, replay, drop."""

import json
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from rich.table import Table

from perennial import project as projects
from perennial.data import aside, checks
from perennial.data.shelf import Part, Shelf
from perennial.errors import BadInput
from perennial.local import folders, tables
from perennial.local.look import View
from perennial.project import Project
from perennial.settings import Settings
from perennial.store import files, quarantine
from perennial.store.quarantine import Batch

_SHORT = 60
# A row repeats another that is not in its batch: it cannot be judged alone.
_TOGETHER = ("ExpectColumnValuesToBeUnique", "ExpectCompoundColumnsToBeUnique")


def listing(settings: Settings, text: str, *, as_json: bool) -> int:
    """All batches, newest first."""
    view = View(settings, text)
    found = quarantine.batches(view.engine, view.name)[::-1]
    if as_json:
        print(json.dumps([_plain(batch) for batch in found], indent=2))
        return 0
    if not found:
        print(f"No row of {view.name} was ever kept aside.")
        return 0
    table = Table("batch", "state", "rows", "since", "run", "rules", box=None, pad_edge=False)
    for batch in found:
        since, rules = f"{batch.at:%Y-%m-%d %H:%M}", "\n".join(_rules(batch))
        table.add_row(batch.id, batch.state, f"{batch.rows:,}", since, batch.run[:12], rules)
    tables.show(table)
    return 0


def show(settings: Settings, text: str, name: str, *, rows: int, to: str, as_json: bool) -> int:
    """One batch: the rules, and its first rows; all of them into a file with ``to``."""
    view = View(settings, text)
    batch = _found(view, name)
    table = _rows(view, batch)
    if to:
        _export(table, Path(to))
        print(f"{batch.rows:,} rows of batch {batch.id} are in {to}")
        return 0
    first = table.slice(0, rows)
    if as_json:
        print(json.dumps(_plain(batch) | {"shown": first.to_pylist()}, indent=2, default=str))
        return 0
    print(f"batch {batch.id}: {batch.rows:,} rows, {batch.state} since {batch.at:%Y-%m-%d %H:%M}")
    print(f"snapshot {batch.snapshot}, run {batch.run}")
    print("\n".join(f"  {line}" for line in _rules(batch)))
    print(batch.told or _advice(batch))
    _print(first, batch.rows)
    return 0


def replay(settings: Settings, text: str, name: str, *, rows: str) -> int:
    """Judge a batch again, by today's rules; what keeps them joins the next run."""
    view, project = View(settings, text), _project(settings, text)
    shelf, batch = _shelf(view), _found(view, name)
    if batch.state not in (quarantine.HELD, quarantine.REPLAYED):
        raise BadInput(
            f"batch {batch.id} is {batch.state} ({batch.told}), wanted one that is held or replayed"
        )
    table = shelf.read(batch)
    if rows:
        table = aside.with_mended(table, _import(Path(rows), table.schema))
        _check_mended(project, table)
    good = _keeps(project, table)
    if not good.any():
        raise BadInput(
            f"all {batch.rows:,} rows of batch {batch.id} still break rules: mend the rules in"
            f" project.yaml, or the rows: perennial quarantine show {batch.id} --to rows.csv, then"
            f" perennial quarantine replay {batch.id} --rows rows.csv"
        )
    joins = replace(batch, state=quarantine.REPLAYED, told="joins the next run")
    back = Part(joins, table.filter(pa.array(good)))
    stays = replace(batch, state=quarantine.HELD, told="")
    rest = None if good.all() else Part(stays, table.filter(pa.array(~good)))
    print(shelf.replay(batch, back, rest, datetime.now(UTC)))
    return 0


def drop(settings: Settings, text: str, name: str, *, because: str) -> int:
    """Delete the rows of a batch for good; that they were there stays written."""
    view = View(settings, text)
    shelf, batch = _shelf(view), _found(view, name)
    if batch.state == quarantine.RENEWED:
        raise BadInput(f"batch {batch.id} is {batch.state}: {batch.told}; drop those")
    if batch.state == quarantine.DROPPED:
        raise BadInput(f"batch {batch.id} was dropped already: {batch.told}")
    shelf.drop(batch, because, datetime.now(UTC))
    print(f"{batch.rows:,} rows of batch {batch.id} are deleted: {because}")
    return 0


def _keeps(project: Project, table: pa.Table) -> "np.ndarray[Any, np.dtype[np.bool_]]":
    """Which rows keep all of today's rules about rows?

    Whether a row repeats another only the next run can tell, which has them all: a row that did is
    taken for mended where it was changed, or the rule was.
    """
    rules = [one for one in project.expectations if checks.is_about_rows(one)]
    together = {checks.tell(one) for one in rules if one.expect in _TOGETHER}
    repeats = [bool(together.intersection(broken)) for broken in table[aside.RULES].to_pylist()]
    good: np.ndarray[Any, np.dtype[np.bool_]] = ~np.array(repeats)
    good |= np.array(aside.is_mended(table).to_pylist())
    alone = tuple(one for one in rules if one.expect not in _TOGETHER)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        pq.write_table(aside.plain(table), path)
        wanted = project.model_copy(update={"expectations": alone})
        good[checks.check(wanted, path, (), None, Path(folder)).aside] = False
    return good


def _project(settings: Settings, text: str) -> Project:
    if not text:
        raise BadInput("a replay judges by the rules of a project; name it with --project FOLDER")
    return projects.load(folders.project_folder(settings, text))


def _shelf(view: View) -> Shelf:
    return Shelf(view.engine, view.ledger, view.name, view.state)


def _found(view: View, name: str) -> Batch:
    """The one batch that begins with a name; what a killed command left of it goes."""
    shelf = _shelf(view)
    found = [b for b in shelf.batches() if b.id.startswith(name)]
    if len(found) != 1 or not name:
        raise BadInput(
            f"{len(found) or 'no'} batches of {view.name} begin with {name!r}; see 'perennial"
            " quarantine list'"
        )
    if found[0].state in (quarantine.RENEWED, quarantine.DROPPED):
        shelf.finish(found[0])
    return found[0]


def _rows(view: View, batch: Batch) -> pa.Table:
    if batch.state in (quarantine.RENEWED, quarantine.DROPPED):
        raise BadInput(f"batch {batch.id} is {batch.state} and has no rows: {batch.told}")
    return _shelf(view).read(batch)


def _export(table: pa.Table, to: Path) -> None:
    if to.suffix not in (".csv", ".parquet"):
        raise BadInput(f"--to is {to}, wanted a name that ends with .csv or .parquet")
    words = ["; ".join(rules) for rules in table[aside.RULES].to_pylist()]
    table = table.set_column(table.column_names.index(aside.RULES), aside.RULES, pa.array(words))
    if aside.WAS in table.column_names:
        table = table.drop_columns([aside.WAS])
    sink = pa.BufferOutputStream()
    if to.suffix == ".csv":
        # Quotes tell a text without characters from none at all.
        csv.write_csv(table, sink)
    else:
        pq.write_table(table, sink)
    files.write_atomic(to, sink.getvalue().to_pybytes())


def _import(path: Path, schema: pa.Schema) -> pa.Table:
    """Mended rows in the types of their batch."""
    if not path.is_file():
        raise BadInput(f"no file at {path}; wanted rows that 'quarantine show --to' wrote")
    types = {f.name: f.type for f in schema if f.name not in (aside.RULES, aside.WAS)}
    options = csv.ConvertOptions(
        column_types=types, strings_can_be_null=True, quoted_strings_can_be_null=False
    )
    try:
        if path.suffix == ".parquet":
            table = pq.read_table(path)
        else:
            table = csv.read_csv(path, convert_options=options)
        twice = [c for c in types if table.column_names.count(c) > 1]
        if twice:
            raise BadInput(f"{path} has two columns {twice[0]}; leave one of them")
        known = [c for c in types if c in table.column_names]
        return pa.table({c: table[c].cast(types[c]) for c in known})
    except (pa.ArrowException, OSError) as exc:
        first = " ".join(str(exc).split())
        raise BadInput(f"{path} does not hold rows of this batch: {first}") from exc


def _check_mended(project: Project, table: pa.Table) -> None:
    """A mended row must be one that a source could hold."""
    time = "event_time" if project.kind == "table" else str(project.time.column)
    frame = table.filter(aside.is_mended(table)).to_pandas()
    odd = frame[time].isna() | (frame[time] > pd.Timestamp(datetime.now(UTC)))
    if odd.any():
        raise _wrong(frame, odd, time, "a time that has been")
    if "label" in frame and not (fits := frame["label"].isna() | frame["label"].isin((0, 1))).all():
        raise _wrong(frame, ~fits, "label", "0, 1 or nothing")


def _wrong(frame: pd.DataFrame, odd: "pd.Series[bool]", column: str, wanted: str) -> BadInput:
    row = frame[odd].iloc[0]
    return BadInput(
        f"{int(odd.sum()):,} mended rows are no such rows: of {aside.ROW} {row[aside.ROW]}"
        f" {column} is {row[column]}, wanted {wanted}"
    )


def _plain(batch: Batch) -> dict[str, Any]:
    return {
        "batch": batch.id,
        "state": batch.state,
        "rows": batch.rows,
        "rules": dict(batch.rules),
        "since": batch.at.isoformat(),
        "run": batch.run,
        "snapshot": batch.snapshot,
        "digest": batch.digest,
        "told": batch.told,
    }


def _rules(batch: Batch) -> list[str]:
    return [f"{count:,} x {rule}" for rule, count in batch.rules.items()]


def _advice(batch: Batch) -> str:
    return (
        "mend the rules or the rows, then: perennial quarantine replay"
        f" {batch.id} --project PROJECT; or: perennial quarantine drop {batch.id} --because WHY"
    )


def _print(first: pa.Table, rows: int) -> None:
    shown = [
        c for c in first.column_names if c not in (aside.RULES, aside.DIGEST, aside.COPY, aside.WAS)
    ]
    table = Table(*shown, box=None, pad_edge=False)
    for row in first.select(shown).to_pylist():
        table.add_row(*("" if v is None else str(v)[:_SHORT] for v in row.values()))
    tables.show(table)
    if rows > len(first):
        print(f"... and {rows - len(first):,} more; --rows N shows more, --to FILE.csv all")
