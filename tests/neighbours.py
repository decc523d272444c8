"""Two tenants of one PostgreSQL: a loop that must go on, and a neighbour that takes all it can."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

import psycopg
import retraining as loop
from sqlalchemy import Engine
from starlette.testclient import TestClient

from perennial import events
from perennial.ledger import Ledger
from perennial.records import Event
from perennial.retrain import service
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Runs
from perennial.retrain.worker import Worker
from perennial.store.engine import BEYOND, KEPT, make_engine
from perennial.store.schema import VERSION_TABLE
from perennial.store.tenant import CONNECTIONS

KEY = b"k" * 32
PATIENCE_S = 60.0


def now() -> datetime:
    return datetime.now(UTC)


class Loop:
    """The retraining service of one tenant, in this process: HTTP, inbox, worker, ledger."""

    def __init__(self, engine: Engine) -> None:
        self.inbox = Inbox(engine)
        self.ledger = Ledger(engine)
        self.launcher = loop.FakeLauncher(self.ledger)
        runs = Runs("churn", engine, self.launcher, now)
        project = loop.project()
        self.worker = Worker(project, engine, self.inbox, runs, loop.drifted_up_to, now)
        self.app = service.Service(self.inbox, {"churn": self.worker}, KEY, now).app()
        self._client = TestClient(self.app)

    def post(self, event: Event) -> int:
        headers, body = events.to_http(event, KEY)
        return int(self._client.post("/", headers=headers, content=body).status_code)

    def decided(self, event: Event) -> bool:
        """Does the ledger have the worker's decision, within a generous time?"""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            if self.ledger.entries("churn", "decision", event.id):
                return True
            time.sleep(0.1)
        return False


@contextmanager
def served(url: str) -> Iterator[Loop]:
    """The loop of a tenant whose model serves."""
    engine = make_engine(url)
    loop.serve(engine)
    made = Loop(engine)
    made.worker.start()
    try:
        yield made
    finally:
        made.worker.stop()
        engine.dispose()


class Neighbour:
    """Opens every connection of its role, with a long transaction in each, and floods its inbox."""

    def __init__(self, url: str) -> None:
        self._url = url.replace("+psycopg", "").replace(" ", "%20")
        self._engine = make_engine(url)
        loop.serve(self._engine)
        self.loop = Loop(self._engine)
        self._open = ExitStack()
        self.connections: list[psycopg.Connection] = []

    def take_all(self) -> None:
        """All connections but those of its own service, each reading in an open transaction."""
        for _ in range(CONNECTIONS - KEPT - BEYOND):
            one = psycopg.connect(self._url)
            # Not as a context: the server ends a transaction that idles, and then nothing commits.
            self._open.callback(one.close)
            one.execute("SELECT count(*) FROM ledger")
            # Advisory locks are shared by all tenants of a database, by number and by name.
            one.execute("SELECT pg_advisory_xact_lock_shared(n) FROM generate_series(0, 50) n")
            self.connections.append(one)

    def lock(self) -> None:
        """Let no writer of its own schema go on, for as long as the transaction lasts."""
        self.connections[0].execute(f"LOCK TABLE {VERSION_TABLE} IN ACCESS EXCLUSIVE MODE")

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """A writer of its own schema waits in vain while the block runs."""
        answers: list[int] = []
        event = loop.event(10_000)
        waiting = threading.Thread(target=lambda: answers.append(self.loop.post(event)))
        waiting.start()
        try:
            yield
            assert 202 not in answers, "the lock kept nobody"
        finally:
            self.connections[0].rollback()
            waiting.join()

    @contextmanager
    def flooding(self, count: int) -> Iterator[None]:
        """Post events to its inbox beside the block, which ends when all were kept."""
        answers: list[int] = []

        def post() -> None:
            for number in range(count):
                answers.append(self.loop.post(loop.event(number)))

        flood = threading.Thread(target=post)
        flood.start()
        try:
            yield
        finally:
            flood.join()
        assert answers == [202] * count

    def close(self) -> None:
        self._open.close()
        self._engine.dispose()


@contextmanager
def neighbour(url: str) -> Iterator[Neighbour]:
    """A tenant that takes all it can, and gives it back at the end."""
    made = Neighbour(url)
    try:
        yield made
    finally:
        made.close()
