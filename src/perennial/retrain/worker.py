"""What becomes of an event: confirmed, decided, recorded, and trained for when it is worth it."""

import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from perennial import events
from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.ledger import Entry, Ledger
from perennial.project import Project
from perennial.records import Action, Decision, DriftReport, Event
from perennial.retrain import policy
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Runs, Stopped
from perennial.store import fence, rollouts

log = logging.getLogger(__name__)

_RETRY_S = 1.0

# Reports of the serving model's windows up to the one that starts at this moment, newest last.
Confirm = Callable[[datetime], list[DriftReport]]

# Of several copies of this process, is it this one's turn to work?
Turn = Callable[[], bool]


@dataclass(frozen=True)
class Status:
    """What the worker is at."""

    pending: int  # also the event that is in work
    running: bool
    last_decided: datetime | None
    failed: tuple[str, ...]


class Worker:
    """One thread that handles events in the order of their arrival.

    Each step is written down before the next begins and is not done twice, so the process may
    end anywhere and start again.
    """

    def __init__(
        self,
        project: Project,
        engine: Engine,
        inbox: Inbox,
        runs: Runs,
        confirm: Confirm,
        clock: Callable[[], datetime],
        turn: Turn = lambda: True,
        guard: fence.Guard = fence.free,
    ) -> None:
        """``guard`` refuses what this copy would write after its turn went to another."""
        self._project = project
        self._engine = engine
        self._inbox = inbox
        self._runs = runs
        self._confirm = confirm
        self._clock = clock
        self._turn = turn
        self._guard = guard
        self._ledger = Ledger(engine, guard)
        self._last_decided = self._newest_decided()
        self._said = ""
        self._stopping = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="worker", daemon=True)

    def start(self) -> None:
        """Begin with what an earlier process left pending."""
        self._thread.start()

    def wake(self) -> None:
        """Say that an event came in."""
        self._news.set()

    def stop(self, timeout_s: float = 10.0) -> None:
        """End soon, also a run that is under way; it is made anew at the next start."""
        self._stopping.set()
        self._runs.stop()
        self._news.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def status(self) -> Status:
        """How much is pending, whether a run goes on, and what could not be handled."""
        return Status(
            pending=self._inbox.counts()["pending"],
            running=self._runs.running,
            last_decided=self._last_decided,
            failed=tuple(f"event {e.id}: {reason}" for e, reason in self._inbox.dead()),
        )

    def undelivered(self, event: Event) -> None:
        """Write down, once, that an event came too late to count."""
        if not self._recorded("event.undelivered", event):
            # Whichever copy is told of it, whether it has the turn or not.
            body, hint = {"id": event.id}, events.hint(event)
            self._append("event.undelivered", event, hint, body, Ledger(self._engine))

    def step(self) -> bool:
        """Handle the oldest pending event; False when there is none, or it is another's turn.

        Raises what is not the event's fault; an event's own fault is counted against it.
        """
        waiting = self._inbox.pending(limit=1) if self._turn() else []
        if not waiting:
            return False
        seq, event = waiting[0]
        try:
            self._inbox.settle(seq, self._handle(event), self._guard)
        except (SQLAlchemyError, Unavailable, Stopped):
            raise
        except Exception as exc:
            self._failed(seq, event, exc)
        return True

    def _loop(self) -> None:
        with contextlib.suppress(Stopped):
            while not self._stopping.is_set():
                self._step_or_wait()

    def _step_or_wait(self) -> None:
        self._news.clear()
        try:
            busy = self.step()
            if not busy:
                self._runs.settle()
        except (SQLAlchemyError, Unavailable) as exc:
            self._say(exc)
            self._stopping.wait(_RETRY_S)
            return
        self._said = ""
        if not busy:
            self._news.wait(_RETRY_S)

    def _say(self, exc: Exception) -> None:
        """Log a trouble once, not at every turn."""
        if self._said != str(exc):
            log.warning("trying again every %s s: %s", _RETRY_S, exc)
        self._said = str(exc)

    def _failed(self, seq: int, event: Event, exc: Exception) -> None:
        reason = str(exc) if isinstance(exc, PerennialError) else f"{type(exc).__name__}: {exc}"
        log.warning("event %s could not be handled: %s", event.id, reason)
        if not self._inbox.fail(seq, reason, self._guard):
            return
        told = Decision(Action.DECLINE, f"set aside, it could not be handled: {reason}")
        with contextlib.suppress(BadInput):
            self._record_decision(event, events.hint(event), told, ())

    def _handle(self, event: Event) -> str:
        if event.type == events.SCHEDULE:
            return self._look_again(event)
        hint = events.hint(event)
        self._record_event(event, hint)
        decision = self._decide_once(event, hint)
        if decision.action is not Action.RETRAIN:
            return f"{decision.action}: {decision.reason}"
        return f"{decision.action}: {self._runs.once(event.id, hint.window_end)}"

    def _look_again(self, event: Event) -> str:
        """Decide anew on the newest windows: what had to wait may be due without another event."""
        windows = self._confirm(event.time)
        if not windows:
            return "nothing was served yet"
        hint = events.Hint(windows[-1].window_start, event.time, windows[-1].model_digest, ())
        decision = self._decide_once(event, hint)
        if decision.action is not Action.RETRAIN:
            return f"{decision.action}: {decision.reason}"
        return f"{decision.action}: {self._runs.once(event.id, event.time)}"

    def _decide_once(self, event: Event, hint: events.Hint) -> Decision:
        known = self._recorded("decision", event)
        if known:
            return Decision(Action(known.body["action"]), known.body["reason"])
        decision, confirmed = self._decide(hint)
        self._record_decision(event, hint, decision, confirmed)
        return decision

    def _decide(self, hint: events.Hint) -> tuple[Decision, tuple[str, ...]]:
        """The decision on a hint, and the features whose drift our own rows confirm."""
        stale = self._not_about_serving(hint)
        if stale:
            return Decision(Action.DECLINE, stale), ()
        windows = tuple(self._confirm(hint.window_start))
        # Older windows must not speak for one that we served no rows of.
        if windows and windows[-1].window_start != hint.window_start:
            windows = ()
        facts = policy.Facts(
            now=hint.window_end,
            windows=windows,
            last_retraining=self._runs.newest_as_of(),
            running=self._runs.is_held() or self._is_rolling_out(),
            window_is_thin=bool(windows) and windows[-1].thin,
        )
        decision = policy.decide(facts, self._project.retraining, label_delay(self._project))
        return decision, windows[-1].drifted if windows else ()

    def _not_about_serving(self, hint: events.Hint) -> str | None:
        serving = rollouts.serving(self._engine, self._project.name)
        if serving is None:
            return "no model serves yet"
        if serving.digest != hint.model_digest:
            short = hint.model_digest.removeprefix("sha256:")[:8]
            return f"the event is about {short}, but v{serving.version} serves"
        return None

    def _is_rolling_out(self) -> bool:
        return rollouts.open_rollout(self._engine, self._project.name) is not None

    def _recorded(self, kind: str, event: Event) -> Entry | None:
        found = self._ledger.entries(self._project.name, kind, event.id)
        return next((e for e in found if e.body["source"] == event.source), None)

    def _record_event(self, event: Event, hint: events.Hint) -> None:
        if self._recorded("event.received", event):
            return
        body = {"id": event.id, "drifted": list(hint.drifted), "model_digest": hint.model_digest}
        self._append("event.received", event, hint, body)

    def _record_decision(
        self, event: Event, hint: events.Hint, decision: Decision, confirmed: Sequence[str]
    ) -> None:
        body = {
            "event_id": event.id,
            "action": str(decision.action),
            "reason": decision.reason,
            "confirmed": list(confirmed),
        }
        self._append("decision", event, hint, body)
        log.info("decided event=%s %s: %s", event.id[:12], decision.action, decision.reason)
        if self._last_decided is None or hint.window_end > self._last_decided:
            self._last_decided = hint.window_end

    def _append(
        self,
        kind: str,
        event: Event,
        hint: events.Hint,
        body: dict[str, Any],
        ledger: Ledger | None = None,
    ) -> None:
        where = {
            "source": event.source,
            "window_start": hint.window_start.isoformat(),
            "window_end": hint.window_end.isoformat(),
        }
        (ledger or self._ledger).append(
            kind,
            project=self._project.name,
            subject=event.id,
            body={**body, **where},
            now=self._clock(),
            event_time=hint.window_end,
        )

    def _newest_decided(self) -> datetime | None:
        decided = self._ledger.entries(self._project.name, "decision")
        return max((e.event_time for e in decided if e.event_time), default=None)


def label_delay(project: Project) -> timedelta:
    """How long after its time a row's label is known at the latest."""
    if project.kind == "transactions":
        return max(project.label.horizon, project.label.known_after)
    return project.label.known_after
