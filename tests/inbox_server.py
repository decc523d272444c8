"""The real service with invented windows and runs, and a naive inbox that can take its place."""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

import retraining as loop

from perennial.ledger import Ledger
from perennial.records import Event
from perennial.retrain import service
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Runs
from perennial.retrain.worker import Worker
from perennial.store.engine import make_engine

RUN_S = 0.005


@dataclass
class NaiveInbox:
    """What one writes first: a set against duplicates and a queue, both in memory."""

    seen: set[tuple[str, str]] = field(default_factory=set)
    queue: deque[tuple[int, Event]] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, event: Event) -> bool:
        with self.lock:
            if (event.source, event.id) in self.seen:
                return False
            self.seen.add((event.source, event.id))
            self.queue.append((len(self.seen), event))
            return True

    def pending(self, limit: int | None = None) -> list[tuple[int, Event]]:
        return list(self.queue)[:limit]

    def settle(self, seq: int, outcome: str) -> None:
        self.queue.popleft()

    def fail(self, seq: int, reason: str) -> bool:
        raise AssertionError(reason)

    def dead(self) -> list[tuple[Event, str]]:
        return []

    def counts(self) -> dict[str, int]:
        return {"pending": len(self.queue), "settled": 0, "dead": 0}


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class SlowLauncher:
    """A run that takes a moment and writes its end itself, as the last thing it does."""

    ledger: Ledger

    def __call__(self, as_of: datetime, trigger: str) -> loop.Ended:
        run = f"run-{time.monotonic_ns()}"
        self._append("run.started", run, {"trigger": trigger, "as_of": as_of.isoformat()})
        time.sleep(RUN_S)
        self._append("run.finished", run, {"state": "succeeded", "reason": ""})
        return loop.Ended(run)

    def _append(self, kind: str, run: str, body: dict[str, str]) -> None:
        self.ledger.append(kind, project="churn", subject=run, body={"run": run, **body}, now=now())


def main(url: str, port: int, key: bytes, naive: bool) -> None:
    """Serve until a signal ends this process."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    engine = make_engine(url)
    inbox = NaiveInbox() if naive else Inbox(engine)
    runs = Runs("churn", engine, SlowLauncher(Ledger(engine)), now, lease_s=0.2)
    worker = Worker(loop.project(), engine, inbox, runs, loop.drifted_up_to, now)  # type: ignore[arg-type]
    server = service.listen(service.HOST, port)
    service.serve(service.Service(inbox, {"churn": worker}, key, now), [worker], server)


def prepare(url: str) -> None:
    """Make a database one in which a model serves already."""
    engine = make_engine(url)
    loop.serve(engine)
    engine.dispose()
