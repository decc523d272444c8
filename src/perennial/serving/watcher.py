"""What becomes of served rows, off the request path: segments, drift reports, events."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial

from prometheus_client import Counter, Gauge

from perennial import events
from perennial.drift.detectors import Watch
from perennial.drift.segments import Writer
from perennial.drift.windows import ClosedWindow, Served, WindowBuffer
from perennial.project import Project
from perennial.serving.outbox import Announcer

log = logging.getLogger("perennial.watch")

DROPPED = Counter("perennial_watch_dropped", "Requests not watched: the queue was full.")
LATE = Counter("perennial_watch_late_rows", "Rows of a window that was over already.")
FAILURES = Counter("perennial_watch_failures", "Windows or rows lost to an error of ours.")
WINDOWS = Counter("perennial_windows", "Windows that were closed.")
QUEUED = Gauge("perennial_watch_queue", "Requests that wait to be watched.")

QUEUE = 10_000
SPILL_ROWS = 20_000
SPILL_S = 10.0
_SPILL_MOST_S = 600.0
_TICK_S = 0.2
_DRAIN_S = 8.0


class Watcher(threading.Thread):
    """One thread that cuts served rows into windows, writes them and tests them."""

    def __init__(
        self,
        project: Project,
        watch: Watch,
        writer: Writer,
        announcer: Announcer,
        now: Callable[[], datetime],
    ) -> None:
        super().__init__(name="watcher", daemon=True)
        self._project = project
        self._watch = watch
        self._writer = writer
        self._announcer = announcer
        self._now = now
        self._buffer = WindowBuffer(project, watch.digest)
        self._queue: queue.Queue[Served | None] = queue.Queue(QUEUE)
        self._late = 0
        self._spill_s = SPILL_S
        self._spill_at = time.monotonic() + SPILL_S
        QUEUED.set_function(self._queue.qsize)

    def offer(self, served: Served) -> None:
        """Take one answered request, or drop it: a client never waits for this."""
        try:
            self._queue.put_nowait(served)
        except queue.Full:
            DROPPED.inc()

    def finish(self) -> None:
        """Write what is pending and end; an unfinished window is no reason for an event."""
        until = time.monotonic() + _DRAIN_S
        # Full still: the thread hangs, at a store that is away, and hears of nothing.
        with suppress(queue.Full):
            self._queue.put(None, timeout=_DRAIN_S)
        self.join(max(0.0, until - time.monotonic()))
        self._announcer.finish()

    def run(self) -> None:
        """Work until ``finish``."""
        self._announcer.start()
        while self._turn():
            pass
        self._flush()

    def _turn(self) -> bool:
        try:
            served = self._queue.get(timeout=_TICK_S)
        except queue.Empty:
            self._guarded(self._spill)
            return True
        if served is not None:
            self._guarded(partial(self._take, served))
        return served is not None

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception:
            # A full disk must not end the watch: the next window may be written again.
            FAILURES.inc()
            log.exception("watch failed revision=%s", self._writer.revision)

    def _take(self, served: Served) -> None:
        for window in self._buffer.close_before(served.event_time):
            self._guarded(partial(self._close, window, announce=True))
        self._buffer.add(served)
        LATE.inc(self._buffer.late_rows - self._late)
        self._late = self._buffer.late_rows
        self._spill()

    def _close(self, window: ClosedWindow, *, announce: bool) -> None:
        self._writer.write(window)
        if not window.closed:
            return
        rows = self._writer.read_own(window.start)
        report = self._watch.report(rows.matrix, window.start, window.end)
        self._writer.write_report(report)
        WINDOWS.inc()
        self._spill_s = SPILL_S
        log.info(
            "window closed start=%s rows=%d drifted=%s", window.start, len(rows), report.drifted
        )
        if report.is_drift and announce:
            source = f"/perennial/{self._project.name}"
            event = events.drift_event(report, self._project.name, source, self._now())
            self._announcer.put(event)

    def _spill(self) -> None:
        moment = time.monotonic()
        if moment < self._spill_at and self._buffer.pending_rows < SPILL_ROWS:
            return
        for window in self._buffer.spill():
            self._guarded(partial(self._writer.write, window))
            # Ever rarer, so that a window of weeks does not become a thousand files.
            self._spill_s = min(1.5 * self._spill_s, _SPILL_MOST_S)
        self._spill_at = moment + self._spill_s

    def _flush(self) -> None:
        for window in self._buffer.flush():
            self._guarded(partial(self._close, window, announce=False))
