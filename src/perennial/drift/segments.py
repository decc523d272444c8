"""What was served in a window: Parquet parts and drift reports, on a disk or in a bucket."""

import io
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from perennial.drift.windows import ClosedWindow, Matrix
from perennial.errors import BadInput
from perennial.records import DriftReport, FeatureDrift, plain
from perennial.store.objects import Folder, at

_NAME = "%Y%m%dT%H%M%SZ"
_PART = ".parquet"
_REPORT = ".drift.json"
# A feature may be called like one of our own columns.
_FEATURE = "feature."

Place = Folder | Path | str


@dataclass(frozen=True)
class SegmentRows:
    """All rows of one window, of every revision, in order of time; categories as codes."""

    features: tuple[str, ...]
    matrix: Matrix
    scores: Matrix
    request_ids: tuple[str, ...]
    rows: tuple[int, ...]  # which row of its request
    times: tuple[datetime, ...]
    digests: tuple[str, ...]
    revisions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Writer:
    """The one process that writes parts under its own name: ``<revision>-<pid>-<token>``."""

    folder: Folder
    revision: str
    features: tuple[str, ...]
    # Containers all have the same process id: the token keeps copies, and restarts of one, apart.
    stem: str
    # What was written of windows that are not over: a server may read its parts, but list nothing.
    _parts: dict[datetime, list[str]] = field(default_factory=dict)

    @classmethod
    def new(cls, folder: Place, revision: str, features: Sequence[str]) -> "Writer":
        """A writer for this process."""
        stem = f"{revision}-{os.getpid()}-{secrets.token_hex(4)}"
        return cls(at(folder), revision, tuple(features), stem)

    def write(self, window: ClosedWindow) -> str | None:
        """Write one part and give its URI; nothing when it has no rows."""
        if not window.rows:
            return None
        buffer = io.BytesIO()
        pq.write_table(_table(window, self.revision, self.features), buffer)
        suffix = f"-{window.part}" if window.part else ""
        name = f"{_name(window.start)}/{self.stem}{suffix}{_PART}"
        uri = self.folder.write(name, buffer.getvalue())
        known = self._parts.setdefault(window.start, [])
        known.extend([name] if name not in known else [])
        return uri

    def write_report(self, report: DriftReport) -> str:
        """Write what was found in a window that is over; its presence says that it is over."""
        name = f"{_name(report.window_start)}/{self.stem}{_REPORT}"
        text = {**plain(report), "drifted": list(report.drifted)}
        uri = self.folder.write(name, json.dumps(text, indent=1) + "\n")
        self._parts.pop(report.window_start, None)
        return uri

    def read_own(self, window_start: datetime) -> SegmentRows:
        """The rows of one window that this process wrote and did not report on yet."""
        return _rows_of(self.folder, window_start, self._parts.get(window_start, []))


def starts(folder: Place) -> list[datetime]:
    """Starts of the windows that have rows, the oldest first."""
    found = {name.partition("/")[0] for name in at(folder).names() if name.endswith(_PART)}
    return sorted(datetime.strptime(name, _NAME).replace(tzinfo=UTC) for name in found)


def read(folder: Place, window_start: datetime) -> SegmentRows:
    """All rows of one window, from all its parts. Raises BadInput when there are none."""
    where, window = at(folder), _name(window_start)
    parts = [name for name in where.names(window) if name.endswith(_PART)]
    return _rows_of(where, window_start, parts)


def reports(folder: Place, window_start: datetime) -> list[DriftReport]:
    """What each process that served rows of the window found in its own share of them."""
    where = at(folder)
    found = where.names(_name(window_start))
    return [_report(where, name) for name in found if name.endswith(_REPORT)]


def _name(start: datetime) -> str:
    return start.astimezone(UTC).strftime(_NAME)


def _table(window: ClosedWindow, revision: str, features: Sequence[str]) -> pa.Table:
    counts = [len(s.scores) for s in window.served]
    counted = list(zip(window.served, counts, strict=True))
    matrix = np.concatenate([s.matrix for s in window.served])
    columns = {
        "request_id": [s.request_id for s, n in counted for _ in range(n)],
        "row": np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
        "event_time": pa.array(
            [s.event_time for s, n in counted for _ in range(n)],
            pa.timestamp("us", tz="UTC"),
        ),
        "probability": np.concatenate([s.scores for s in window.served]),
        "model_digest": [window.digest] * len(matrix),
        "revision": [revision] * len(matrix),
        **{f"{_FEATURE}{name}": matrix[:, i] for i, name in enumerate(features)},
    }
    return pa.table(columns)


def _rows_of(folder: Folder, window_start: datetime, parts: Sequence[str]) -> SegmentRows:
    if not parts:
        where = f"{folder.uri}/{_name(window_start)}"
        raise BadInput(f"no served rows at {where}; wanted Parquet parts")
    table = pa.concat_tables([_part(folder, n) for n in parts], promote_options="default")
    return _rows(table.sort_by([(c, "ascending") for c in ("event_time", "request_id", "row")]))


def _part(folder: Folder, name: str) -> pa.Table:
    data = folder.read(name)
    try:
        return pq.read_table(io.BytesIO(data), partitioning=None)
    except (pa.ArrowException, OSError) as exc:
        raise BadInput(f"{folder.uri}/{name} is not a readable segment; move it away") from exc


def _rows(table: pa.Table) -> SegmentRows:
    names = [c for c in table.column_names if c.startswith(_FEATURE)]
    columns = [table[c].to_numpy() for c in names]
    return SegmentRows(
        features=tuple(n.removeprefix(_FEATURE) for n in names),
        matrix=np.column_stack(columns).astype(np.float64),
        scores=table["probability"].to_numpy(),
        request_ids=tuple(table["request_id"].to_pylist()),
        rows=tuple(table["row"].to_pylist()),
        times=tuple(t.replace(tzinfo=UTC) for t in _naive(table["event_time"])),
        digests=tuple(table["model_digest"].to_pylist()),
        revisions=tuple(table["revision"].to_pylist()),
    )


def _naive(column: pa.ChunkedArray) -> list[datetime]:
    # Arrow would ask a time zone database that a slim image does not have.
    found: list[datetime] = column.cast(pa.timestamp("us")).to_pylist()
    return found


def _report(folder: Folder, name: str) -> DriftReport:
    data = folder.read(name)
    try:
        raw: dict[str, Any] = json.loads(data)
        del raw["drifted"]
        for key in ("window_start", "window_end"):
            raw[key] = datetime.fromisoformat(raw[key])
        raw["features"] = tuple(FeatureDrift(**item) for item in raw["features"])
        return DriftReport(**raw)
    except (ValueError, KeyError, TypeError) as exc:
        raise BadInput(f"{folder.uri}/{name} is not a readable drift report; move it away") from exc
