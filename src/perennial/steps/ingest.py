"""What was known at one moment? An immutable snapshot of the source, named by its content."""

import io
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data import sources
from perennial.errors import RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import context
from perennial.store import fence, files
from perennial.store.engine import make_engine


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on the disk; ``digest`` is that of its bytes, ``as_of`` what it may know."""

    digest: str
    rows: int
    path: Path
    as_of: datetime


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
    malformed, RunFailed when nothing is left, and what the guard raises.
    """
    raw = sources.read(project, source or None, folder)
    frame, moment = known_at(project, raw, as_of)
    if frame.empty:
        raise RunFailed(
            f"the source has no row before {moment:%Y-%m-%d %H:%M}; its rows are later, or as_of"
            " is too early"
        )
    taken = _keep(settings, project, frame, moment)
    files.write_atomic(out, taken.path.read_bytes())
    engine = make_engine(settings.state(project.name).url)
    try:
        ledger = Ledger(engine, guard)
        _record(ledger, project, taken, run=run, trigger=trigger, source=source, now=now)
    finally:
        engine.dispose()
    return taken


def known_at(
    project: Project, raw: pd.DataFrame, as_of: datetime | None
) -> tuple[pd.DataFrame, datetime]:
    """The rows that were there before ``as_of``, with only the labels that were known at it."""
    frame = sources.table_rows(project, raw) if project.kind == "table" else raw
    column = "event_time" if project.kind == "table" else str(project.time.column)
    times = pd.to_datetime(frame[column], utc=True)
    moment = as_of or times.max().to_pydatetime() + timedelta(seconds=1)
    kept = frame[times < moment].reset_index(drop=True)
    if project.kind == "table":
        known = kept["label_known_at"] <= moment
        kept = kept.assign(label=kept["label"].where(known))
    return kept, moment


def _keep(settings: Settings, project: Project, frame: pd.DataFrame, moment: datetime) -> Snapshot:
    data = content(frame)
    digest = files.digest_bytes(data)
    path = settings.state(project.name).snapshots / f"{digest.removeprefix('sha256:')}.parquet"
    if not path.exists():
        files.write_atomic(path, data)
    return Snapshot(digest, len(frame), path, moment)


def content(frame: pd.DataFrame) -> bytes:
    """Parquet bytes that depend on the rows alone: no pandas metadata, no time of writing."""
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", coerce_timestamps="us")
    return buffer.getvalue()


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
        "rows": taken.rows,
        "source": source or project.source.path or "simulator",
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
