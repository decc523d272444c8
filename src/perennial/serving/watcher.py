"""What becomes of served rows, off the request path: segments, drift reports, events."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Protocol

import httpx
from prometheus_client import Counter, Gauge

from perennial import events
from perennial.drift.detectors import Watch
from perennial.drift.segments import Writer
from perennial.drift.windows import ClosedWindow, Served, WindowBuffer
from perennial.project import Project
from perennial.records import Event

log = logging.getLogger("perennial.watch")

DROPPED = Counter("perennial_watch_dropped", "Requests not watched: the queue was full.")
LATE = Counter("perennial_watch_late_rows", "Rows of a window that was over already.")
FAILURES = Counter("perennial_watch_failures", "Windows or rows lost to an error of ours.")
WINDOWS = Counter("perennial_windows", "Windows that were closed.")
EVENTS = Counter("perennial_drift_events", "Drift events by what became of them.", ["outcome"])
QUEUED = Gauge("perennial_watch_queue", "Requests that wait to be watched.")

QUEUE = 10_000
SPILL_ROWS = 20_000
SPILL_S = 10.0
_SPILL_MOST_S = 600.0
_TRY_FOR_S = 60.0
_BACKOFF_S = (0.5, 16.0)  # first and longest pause
_POST_S = 2.0
_TICK_S = 0.2
_DRAIN_S = 8.0


class Announcer(Protocol):
    """Tells somebody that a window drifted."""

    def put(self, event: Event) -> None:
        """Take an event; it is sent later."""
        ...

    def send_due(self) -> None:
        """Send what is due, without waiting for long."""
        ...


@dataclass
class _Letter:
    event: Event
    given_up: float
    due: float
    pause: float


class Outbox:
    """Posts signed events to a sink, and tries again with growing pauses."""

    def __init__(self, sink: str, key: bytes | None, now: Callable[[], datetime]) -> None:
        self._sink = sink
        self._key = key
        self._now = now
        self._letters: list[_Letter] = []
        self._client = httpx.Client(timeout=_POST_S, trust_env=False)

    def put(self, event: Event) -> None:
        """Take an event; it is sent with the next ``send_due``."""
        moment = time.monotonic()
        self._letters.append(_Letter(event, moment + _TRY_FOR_S, moment, _BACKOFF_S[0]))

    def send_due(self) -> None:
        """Send what is due; one that keeps failing is counted and logged after a minute."""
        moment = time.monotonic()
        due = [letter for letter in self._letters if letter.due <= moment]
        done = [letter for letter in due if self._settled(letter, moment)]
        self._letters = [letter for letter in self._letters if letter not in done]

    def _settled(self, letter: _Letter, moment: float) -> bool:
        trouble = self._post(letter.event)
        if trouble is None:
            EVENTS.labels("sent").inc()
            return True
        if moment + letter.pause > letter.given_up:
            EVENTS.labels("failed").inc()
            log.error("drift event lost id=%s sink=%s: %s", letter.event.id, self._sink, trouble)
            return True
        letter.due = moment + letter.pause
        letter.pause = min(2 * letter.pause, _BACKOFF_S[1])
        return False

    def _post(self, event: Event) -> str | None:
        headers, body = events.to_http(events.restamped(event, self._now()), self._key)
        try:
            answer = self._client.post(self._sink, headers=headers, content=body)
        except httpx.HTTPError as exc:
            return type(exc).__name__
        return None if answer.is_success else f"HTTP {answer.status_code} {answer.text[:200]}"


class Silence:
    """For a server that nobody listens to: drift is written, but not told."""

    def put(self, event: Event) -> None:
        """Count the event."""
        EVENTS.labels("untold").inc()

    def send_due(self) -> None:
        """Nothing is ever due."""


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
        self._queue.put(None)
        self.join(_DRAIN_S)

    def run(self) -> None:
        """Work until ``finish``."""
        while self._turn():
            self._guarded(self._announcer.send_due)
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
        self._guarded(self._announcer.send_due)
