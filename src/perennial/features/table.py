"""What was known of each row at its own time? The feature table, made in bounded memory."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from perennial.data import duck, history
from perennial.errors import RunFailed
from perennial.features.store import TIME, Store
from perennial.project import Project

MOMENT = "event_timestamp"  # Feast's name of a row's own time
_ORDER = "__order"


# Looks at a file of examples and the counts of rows before the store does.
Judge = Callable[[Path, Mapping[str, int]], object]


@dataclass(frozen=True)
class Draft:
    """A feature table on the disk that nobody has seen yet.

    ``counts`` says what the rows of the snapshot were; together they are all of them.
    """

    path: Path
    rows: int
    labelled: int
    counts: Mapping[str, int]


def draft(
    project: Project,
    store: Store,
    snapshot: Path,
    as_of: datetime,
    near: Path,
    judge: Judge = lambda _examples, _counts: None,
) -> Draft:
    """Make the feature table of a snapshot as ``as_of`` knows it, in the folder ``near``.

    The features go to the store's rows first, and come back joined by Feast as of each row's time.
    Raises RunFailed when there is no row, or when rows are lost on the way, and what ``judge``
    raises on the examples: then the store is as it was.
    """
    examples = near / "examples.parquet"
    with duck.connected(near) as connection:
        duck.view(connection, "raw", snapshot)
        counts = history.make_examples(project, connection, as_of, as_of)
        _check_counts(connection, counts)
        rows = duck.write(connection, "from examples order by event_time, row_id", examples)
    if not rows:
        raise RunFailed(
            f"the snapshot as of {as_of:%Y-%m-%d} gives no example yet: features look back"
            " some weeks before the first cut-off; give a longer history"
        )
    judge(examples, counts)
    _publish_rows(store, examples)
    store.apply()
    with duck.connected(near) as connection:
        made = _joined(connection, project, store, examples, near / "table.parquet")
        labelled = connection.execute("select count(label) from examples").fetchone()[0]
    if made != rows:
        raise RunFailed(f"Feast returned {made:,} rows for {rows:,}; nothing is kept")
    return Draft(near / "table.parquet", rows, int(labelled), counts)


def publish(made: Path, to: Path) -> None:
    """Copy a finished table to where others read it, maybe on another disk; whole or not at all."""
    to.parent.mkdir(parents=True, exist_ok=True)
    copy = to.with_name(f".{to.name}.tmp")
    try:
        shutil.copyfile(made, copy)
        duck.settle(copy, to)
    finally:
        copy.unlink(missing_ok=True)


def _check_counts(connection: Any, counts: Mapping[str, int]) -> None:
    rows = connection.execute("select count(*) from raw").fetchone()[0]
    if rows != sum(counts.values()):
        raise RunFailed(f"{rows:,} rows came in, but {sum(counts.values()):,} are accounted for")


def _publish_rows(store: Store, examples: Path) -> None:
    """Let Feast read the features of these examples from now on."""
    names = ", ".join(duck.column(name) for name in store.names if name != TIME)
    with duck.connected(examples.parent) as connection:
        duck.view(connection, "examples", examples)
        duck.write(
            connection,
            f"select {store.key}, event_time, epoch_us(event_time) as {TIME}, {names}"
            " from examples order by event_time, row_id",
            store.rows,
        )
    store.publish()


def _joined(connection: Any, project: Project, store: Store, examples: Path, to: Path) -> int:
    """Write the examples with their features as of each one's time, in their order."""
    duck.view(connection, "examples", examples)
    connection.execute(
        f"create temp view numbered as select *, file_row_number as {_ORDER}"
        f" from read_parquet({duck.quoted(examples)}, file_row_number = true)"
    )
    asked = connection.execute(
        f"select {_ORDER}, {store.key}, event_time as {MOMENT} from numbered"
    ).df()
    found = store.join(asked)
    connection.register("found", found)
    features = [f"f.{duck.column(name)}" for name in project.feature_names]
    others = ", ".join(f"n.{duck.column(name)}" for name in _about(connection, store))
    return duck.write(
        connection,
        f"select {others}, make_timestamptz(f.{TIME}) as {TIME}, {', '.join(features)}"
        f" from numbered n join found f using ({_ORDER}) order by {_ORDER}",
        to,
    )


def _about(connection: Any, store: Store) -> list[str]:
    """Columns of the examples that are no features."""
    told = connection.execute("describe examples").fetchall()
    return [name for name, *_ in told if name not in store.names]
