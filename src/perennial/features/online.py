"""Bring the newest features online: only what is new, the mark last, and safe to be cut off.

Each row replaces its entity's last one as a whole and carries its own time, so a look-up never
sees half a row. The mark says how far the view is, and lies beside the rows. It is emptied before
the first row is written: what a killed process had begun is then written again, all of it. It has
the new moment from then on, so that no older run writes over rows that are newer.

An entity of which no row is left offline becomes unknown: a row of nulls takes the place of its
last one.
"""

import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from perennial.data import duck
from perennial.errors import RunFailed
from perennial.features import known
from perennial.features.store import Mark, Store
from perennial.project import Project
from perennial.store import scratch

log = logging.getLogger(__name__)


_CHUNK = 20_000  # rows in Python's hands at a time


@dataclass(frozen=True)
class Materialized:
    """What one materialization did: it wrote ``written`` rows; ``rows`` tell at ``moment``."""

    moment: datetime
    rows: int
    written: int


def materialize(store: Store, project: Project) -> Materialized:
    """Write the rows that are newer than the mark; all that are online, if they have changed.

    Doing it twice writes nothing the second time. A run about the past takes nothing back, also
    where a newer one was killed on the way: the newer one completes it.
    """
    with scratch.folder(store.folder) as near, duck.connected(near) as connection:
        newest = current(connection, store, project)
        rows, digest = _digest(connection, store)
        mark = store.mark()
        done = Mark(newest, digest, rows)
        if mark and newest < mark.moment:
            return Materialized(mark.moment, rows, 0)
        known.load(connection, store)
        if not _gone(connection, store) and mark == done:
            return Materialized(newest, rows, 0)
        since = _unchanged_until(connection, store, project, mark, newest)
        store.set_mark(Mark(newest, "", 0))
        known.save(connection, store, f"from known union select {store.key} from current")
        written = _write(connection, store, since, newest)
        known.save(connection, store, "select key from known anti join gone using (key)")
        store.set_mark(done)
    log.info("materialized view=%s rows=%d written=%d to=%s", store.name, rows, written, newest)
    return Materialized(newest, rows, written)


def current(
    connection: Any, store: Store, project: Project, moment: datetime | None = None
) -> datetime:
    """Make the view ``current``: the last row of each key that tells at ``moment`` (None: newest).

    Gives the moment. Raises RunFailed where no features were made yet.
    """
    if not store.rows.is_file():
        raise RunFailed(f"no features of {project.name} are there; run its pipeline once")
    duck.view(connection, "offline", store.rows)
    newest = connection.execute("select max(event_time) from offline").fetchone()[0]
    at = moment or newest.astimezone(UTC)
    connection.execute(
        "create or replace temp view current as select * exclude place from (select *,"
        f" row_number() over (partition by {store.key} order by event_time desc) as place"
        f" from offline where event_time between {_told(since(store, project, at))} and"
        f" {_told(at)}) where place = 1"
    )
    return at


def since(store: Store, project: Project, moment: datetime) -> datetime:
    """From when rows still tell at ``moment``: as long as the view says, else its own window."""
    return moment - store.ttl if store.ttl else project.window_start(moment)


def _unchanged_until(
    connection: Any, store: Store, project: Project, mark: Mark | None, newest: datetime
) -> datetime | None:
    """The mark's moment, if what was online then is what the rows say now; else None."""
    if mark is None or not mark.digest:
        return None
    current(connection, store, project, mark.moment)
    rows, digest = _digest(connection, store)
    current(connection, store, project, newest)
    return mark.moment if (rows, digest) == (mark.rows, mark.digest) else None


def _digest(connection: Any, store: Store) -> tuple[int, str]:
    """Number of the current rows and a digest of them that no order changes."""
    names = [store.key, *store.names]
    told = ", ".join(duck.column(name) for name in names)
    sql = f"select count(*), sum(hash({told})::hugeint), md5({duck.quoted(names)}) from current"
    rows, total, schema = connection.execute(sql).fetchone()
    return int(rows), f"{int(total or 0):x}-{schema[:8]}"


def _gone(connection: Any, store: Store) -> int:
    """Make the table ``gone``: keys that are online, but not offline any more. Gives how many."""
    connection.execute(
        "create or replace temp table gone as"
        f" select key from known anti join offline on known.key = offline.{store.key}"
    )
    return int(connection.execute("select count(*) from gone").fetchone()[0])


def _write(connection: Any, store: Store, since: datetime | None, newest: datetime) -> int:
    newer = f"from current where event_time > {_told(since)}" if since else _all(store)
    empty = f"select key as {store.key}, {_told(newest)} as event_time from gone"
    sql = f"from (({newer}) union all by name ({empty})) order by {store.key}"
    reader = connection.execute(sql).to_arrow_reader(_CHUNK)
    written = 0
    for batch in reader:
        rows: pd.DataFrame = batch.to_pandas()
        store.write(rows)
        written += len(rows)
    return written


def _all(store: Store) -> str:
    """The current rows, and the last one of each entity that is online but has none of these."""
    key = store.key
    return (
        "(from current) union all by name (select * exclude place from (select *, row_number()"
        f" over (partition by {key} order by event_time desc) as place from offline"
        f" where {key} in (select key from known) and {key} not in (select {key} from current))"
        " where place = 1)"
    )


def _told(moment: datetime) -> str:
    return f"timestamptz '{moment.isoformat()}'"
