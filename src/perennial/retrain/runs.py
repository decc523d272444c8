"""Has this trigger had its run? One run at a time, and a trigger's run is never made twice."""

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Protocol

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from perennial.errors import PerennialError, Unavailable
from perennial.ledger import Entry, Ledger
from perennial.retrain import beside, ends
from perennial.steps.context import LOST, lease_of_runs
from perennial.store import fence, lease

log = logging.getLogger(__name__)

# A trigger whose run was cut off is started again, but not for ever.
STARTS = 3
SETTLE_S = 15.0  # between two looks at a run that nobody follows
_POLL_S = 0.2


class Result(Protocol):
    """How a pipeline run ended; ``launchers.RunResult`` is one."""

    @property
    def run(self) -> str: ...

    @property
    def state(self) -> str: ...

    @property
    def reason(self) -> str: ...


class Launch(Protocol):
    """Run the pipeline on data up to a moment and wait for its end."""

    def __call__(self, as_of: datetime, trigger: str) -> Result: ...


@dataclass(frozen=True)
class NotLaunched:
    """The result of a run that could not even begin."""

    run: str
    reason: str
    state: str = "failed"


class Stopped(Exception):
    """The service ends; whatever was not settled is taken up again at the next start."""


class Runs:
    """Pipeline runs of one project, as the retraining service makes them."""

    def __init__(
        self,
        project: str,
        engine: Engine,
        launch: Launch,
        clock: Callable[[], datetime],
        *,
        cancel: Callable[[], None] | None = None,
        outlives: bool = False,
        lease_s: float = 20.0,
        beat: Callable[[], object] = lambda: None,
        is_over: ends.IsOver | None = None,
    ) -> None:
        """``outlives`` says that runs go on without this process, and are found again.

        ``beat`` is called while a run is waited for, to keep what must not lapse meanwhile;
        ``is_over`` tells of a run that nobody follows, so that its lease is let go.
        """
        self._project = project
        self._engine = engine
        self._ledger = Ledger(engine)
        self._launch = launch
        self._clock = clock
        self._cancel = cancel
        self._outlives = outlives
        self._lease = lease_of_runs(project)
        self._lease_s = lease_s
        self._beat = beat
        self._is_over = is_over
        self._settled = -math.inf
        self._number: int | None = None
        self._stopping = threading.Event()
        self.running = False

    def stop(self) -> None:
        """Begin no run any more, cut off the present one and take its end for no result."""
        self._stopping.set()
        if self._cancel:
            self._cancel()

    def is_held(self) -> bool:
        """Does anybody run the pipeline now?"""
        if self._is_over:
            return not ends.settle(self._engine, self._project, self._is_over, self._now())
        return lease.holder(self._engine, self._lease, self._now()) is not None

    def settle(self) -> None:
        """Let the lease of a run go that is over; often called, this seldom looks.

        Raises as ``ends.settle`` does, and then looks at the next call.
        """
        if self._is_over and time.monotonic() - self._settled > SETTLE_S:
            ends.settle(self._engine, self._project, self._is_over, self._now())
            self._settled = time.monotonic()

    def newest_as_of(self) -> datetime | None:
        """Up to when the newest retraining had data; making the first model was none."""
        served = self._ledger.entries(self._project, "served")
        if not served:
            return None
        started = self._ledger.entries(self._project, "run.started")
        later = [r.body["as_of"] for r in started if r.seq > served[0].seq]
        return max(map(datetime.fromisoformat, later), default=None)

    def once(self, trigger: str, as_of: datetime) -> str:
        """Run the pipeline for a trigger, unless it was; says how it ended.

        A run that an earlier process did not see the end of is waited for where it outlived that
        process; else it is lost, and made anew.
        """
        with self._exclusively(trigger):
            starts = self._starts(trigger)
            told = self._ends(starts)
            under_way = [r for r in starts if r not in told]
            if under_way and self._outlives:
                return self._run(trigger, as_of)
            for run in under_way:
                self._finish(run, LOST, "the service ended while it ran")
            done = [end for end in told.values() if end.body["state"] != LOST]
            if done:
                return _outcome(done[-1].body["state"], done[-1].body["reason"])
            if len(starts) >= STARTS:
                return f"given up, {len(starts)} runs were cut off"
            return self._run(trigger, as_of)

    def _run(self, trigger: str, as_of: datetime) -> str:
        log.info("run begins project=%s as_of=%s trigger=%s", self._project, as_of, trigger[:12])
        result = self._launched(trigger, as_of)
        # A run that could not even begin leaves its end under the name of the result.
        runs = self._starts(trigger) or [result.run]
        for run in set(runs) - self._ends(runs).keys():
            self._finish(run, result.state, result.reason)
        log.info("run ended project=%s %s", self._project, _outcome(result.state, result.reason))
        return _outcome(result.state, result.reason)

    def _launched(self, trigger: str, as_of: datetime) -> Result:
        self.running = True
        try:
            return self._launch(as_of, trigger)
        except Unavailable:
            raise
        except PerennialError as exc:
            return NotLaunched(trigger, str(exc))
        finally:
            self.running = False
            self._refuse_when_stopping()

    def _starts(self, trigger: str) -> list[str]:
        started = self._ledger.entries(self._project, "run.started")
        return [e.subject for e in started if e.body["trigger"] == trigger]

    def _ends(self, runs: Sequence[str]) -> dict[str, Entry]:
        found = {run: self._ledger.entries(self._project, "run.finished", run) for run in runs}
        return {run: entries[-1] for run, entries in found.items() if entries}

    def _finish(self, run: str, state: str, reason: str) -> Entry:
        return Ledger(self._engine, self._guard).append(
            "run.finished",
            project=self._project,
            subject=run,
            body={"run": run, "state": state, "reason": reason},
            now=self._clock(),
        )

    @contextmanager
    def _exclusively(self, trigger: str) -> Iterator[None]:
        """Hold the lease of runs, renewed by a thread for as long as the block takes."""
        number = self._number = self._acquire(trigger)
        try:
            with beside.going_on(partial(self._renew, number)):
                yield
        finally:
            lease.release(self._engine, self._lease, number)

    def _guard(self, connection: Connection) -> None:
        fence.check_run(connection, self._lease, self._number)

    def _acquire(self, trigger: str) -> int:
        while True:
            self._refuse_when_stopping()
            # The first step of the run knows by this name that the lease is held for it.
            number = lease.acquire(
                self._engine,
                self._lease,
                trigger,
                self._lease_s,
                self._now(),
                goes_on=self._outlives,
            )
            if number is not None:
                return number
            self._beat()
            self.settle()
            self._stopping.wait(_POLL_S)

    def _renew(self, number: int, over: threading.Event) -> None:
        while not over.wait(self._lease_s / 4):
            try:
                kept = lease.renew(self._engine, self._lease, number, self._lease_s, self._now())
                self._beat()
            except (SQLAlchemyError, Unavailable) as exc:
                log.warning("the lease %s could not be renewed: %s", self._lease, exc)
                continue
            if not kept:
                log.warning("the lease %s was taken by another process", self._lease)
                return

    def _refuse_when_stopping(self) -> None:
        if self._stopping.is_set():
            raise Stopped

    def _now(self) -> float:
        return self._clock().timestamp()


def _outcome(state: str, reason: str) -> str:
    return f"{state}: {reason}" if reason else state
