"""What was known at one moment? An immutable snapshot of the source, named by its content."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from perennial.data import snapshots, sources
from perennial.data.rows import Clock
from perennial.data.snapshots import Counted
from perennial.errors import RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings, StateFolder
from perennial.steps import context
from perennial.store import fence, objects, scratch
from perennial.store.engine import make_engine

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on the disk; ``digest`` is that of its bytes, ``as_of`` what it may know."""

    digest: str
    counted: Counted
    path: Path
    as_of: datetime
    kind: str  # of its source

    @property
    def rows(self) -> int:
        return self.counted.kept


def ingest(
    settings: Settings,
    project: Project,
    folder: Path,
    source: str,
    as_of: datetime | None,
    out: Path,
    *,
    run: str,
    trigger: str,
    now: datetime,
    guard: fence.Guard = fence.free,
) -> Snapshot:
    """Keep every row before ``as_of`` (None: all) and write the start of the run to the ledger.

    Labels that are not known by then are blank. Raises BadInput for a source that is missing or
    malformed, RunFailed when nothing is left or rows lie in the future, Unavailable when the source
    does not answer or the disk is full, and what the guard raises.
    """
    state = settings.state(project.name)
    with (
        _with_room(state.root),
        scratch.folder(state.scratch) as near,
        sources.opened(project, source or None, folder, near, url=settings.source_url) as found,
    ):
        taken = _take(state.snapshots, project, found, as_of, near / "draft", now)
        snapshots.copy(taken.path, out)
        _publish(state, taken)
    engine = make_engine(state.url)
    try:
        ledger = Ledger(engine, guard)
        _record(ledger, project, taken, run=run, trigger=trigger, source=source, now=now)
    finally:
        engine.dispose()
    return taken


def _take(
    folder: Path,
    project: Project,
    found: sources.Opened,
    as_of: datetime | None,
    draft: Path,
    now: datetime,
) -> Snapshot:
    rows = found.rows
    unreadable = rows.check()
    clock = rows.clock(now)
    if clock.in_future and as_of is None:
        raise RunFailed(
            f"{clock.in_future:,} of {clock.rows:,} rows lie in the future by"
            f" {project.time.column or 'time.row_order'}, such as {clock.example:%Y-%m-%d %H:%M};"
            " mend the source, or give as_of to leave them for later"
        )
    moment = as_of or _after(clock)
    position = rows.newest(moment)
    if position is None:
        raise RunFailed(
            f"the source has no row before {moment:%Y-%m-%d %H:%M}; its rows are later, or as_of"
            " is too early"
        )
    kept = snapshots.write(draft, rows.schema, rows.known(moment))
    counted = Counted(rows.count, kept, rows.later(moment), clock.in_future, unreadable)
    told = snapshots.Taken(found.origin, moment, position, now)
    digest = snapshots.keep(draft, folder, counted, told)
    path = folder / f"{digest.removeprefix('sha256:')}.parquet"
    return Snapshot(digest, counted, path, moment, found.origin.kind)


def _publish(state: StateFolder, taken: Snapshot) -> None:
    """Where pods share no disk, the record of a snapshot outlives the pod that took it."""
    if state.artifact_root:
        record = snapshots.record_of(taken.path)
        objects.Folder(state.artifacts("snapshots")).write(record.name, record.read_bytes())


def _after(clock: Clock) -> datetime:
    assert clock.newest is not None
    return clock.newest + timedelta(seconds=1)


@contextmanager
def _with_room(folder: Path) -> Iterator[None]:
    """Tell a full disk as such, whoever met it."""
    import duckdb

    try:
        yield
    except (OSError, duckdb.Error) as exc:
        is_full = getattr(exc, "errno", None) in _FULL or "No space left" in str(exc)
        if not is_full:
            raise
        raise Unavailable(
            f"the disk of {folder} is full; nothing half-written is kept: make room and run again"
        ) from exc


def _record(
    ledger: Ledger,
    project: Project,
    taken: Snapshot,
    *,
    run: str,
    trigger: str,
    source: str,
    now: datetime,
) -> None:
    body = {
        "run": run,
        "trigger": _cause(ledger, project.name, run, trigger),
        "as_of": taken.as_of.isoformat(),
        "data_digest": taken.digest,
        "rows": taken.counted.kept,
        "rows_read": taken.counted.read,
        "rows_later": taken.counted.later,
        **taken.counted.odd,
        "source": source or project.source.path or taken.kind,
    }
    ledger.append(
        "run.started",
        project=project.name,
        subject=run,
        body=body,
        now=now,
        event_time=taken.as_of,
    )


def _cause(ledger: Ledger, project: str, run: str, trigger: str) -> str:
    """What started this run: one that repeats the run of an event was copied by a person."""
    is_event = bool(ledger.entries(project, "decision", trigger))
    others = context.ends(ledger, project, run, trigger).values()
    is_copy = any(end not in (None, context.LOST) for end in others)
    return f"by hand, as for {trigger}" if is_event and is_copy else trigger
