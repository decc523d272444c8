"""Which window of event time does a served row belong to, and is that window over?"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from perennial.project import Project

Matrix = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Served:
    """One answered request: its rows as the contract encodes them, and their scores."""

    event_time: datetime
    request_id: str
    matrix: Matrix
    scores: Matrix


@dataclass(frozen=True)
class ClosedWindow:
    """Rows of one window that are ready to be written: the next part of its segment.

    ``closed`` says that the window is over; otherwise more parts may follow.
    """

    start: datetime
    end: datetime
    digest: str
    part: int
    closed: bool
    served: tuple[Served, ...]

    @property
    def rows(self) -> int:
        return sum(len(s.scores) for s in self.served)


class WindowBuffer:
    """Rows of one revision, kept by window until somebody takes them. Does no IO."""

    def __init__(self, project: Project, digest: str) -> None:
        self._project = project
        self._digest = digest
        self._pending: dict[datetime, list[Served]] = {}  # of open windows, and late rows
        self._parts: dict[datetime, int] = {}
        self._over: set[datetime] = set()
        self.late_rows = 0
        self.pending_rows = 0  # that no part holds yet

    def add(self, served: Served) -> None:
        """Take one request's rows; those of a window that is over go to a later part of it."""
        start = self._project.window_start(served.event_time)
        self._pending.setdefault(start, []).append(served)
        self.pending_rows += len(served.scores)
        if start in self._over:
            self.late_rows += len(served.scores)

    def close_before(self, moment: datetime) -> list[ClosedWindow]:
        """End the windows that were over by ``moment``; each is given once, the oldest first."""
        return self._end([s for s in self._open() if self._project.window_end(s) <= moment])

    def spill(self) -> list[ClosedWindow]:
        """Give up pending rows as parts, so that memory stays small and a crash loses little."""
        return [self._take(s) for s in sorted(self._pending) if self._pending[s]]

    def flush(self) -> list[ClosedWindow]:
        """End every window, because no more rows will come."""
        late = sorted(self._over & self._pending.keys())
        return [self._take(s) for s in late] + self._end(self._open())

    def _open(self) -> list[datetime]:
        return sorted(self._pending.keys() - self._over)

    def _end(self, starts: list[datetime]) -> list[ClosedWindow]:
        self._over.update(starts)
        return [self._take(start, closed=True) for start in starts]

    def _take(self, start: datetime, *, closed: bool = False) -> ClosedWindow:
        served = tuple(self._pending.pop(start))
        self.pending_rows -= sum(len(s.scores) for s in served)
        if start not in self._over:
            self._pending[start] = []
        part = self._parts.get(start, 0)
        self._parts[start] = part + bool(served)
        end = self._project.window_end(start)
        return ClosedWindow(start, end, self._digest, part, closed, served)
