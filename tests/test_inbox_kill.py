"""The service may be killed at any moment: what it acknowledged is done, and done once."""

import contextlib
import http.client
import multiprocessing
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.context import ForkServerProcess

import inbox_server
import pytest
import retraining as loop
from sqlalchemy import Engine

from perennial import events
from perennial.ledger import Ledger
from perennial.store.engine import make_engine, reading

KEY = b"k" * 32
CLIENTS = 3
SEED = 20111209
IMPORTS = [
    "perennial.retrain.service",
    "sqlalchemy.dialects.sqlite.pysqlite",
    "uvicorn.protocols.http.h11_impl",
    "uvicorn.lifespan.off",
    "anyio._backends._asyncio",
]


@dataclass
class Killed:
    """What was left after all kills, restarts and resends."""

    acknowledged: set[str] = field(default_factory=set)
    sent: int = 0
    kills: int = 0
    exit_code: int | None = None
    runs: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    integrity: str = ""

    @property
    def lost(self) -> set[str]:
        return {name for name in self.acknowledged if not self.runs[name]}


class Driver:
    """Starts the service, sends events from several threads, and kills it again and again."""

    def __init__(self, url: str, naive: bool) -> None:
        self.url = url
        inbox_server.prepare(url)
        self.naive = naive
        self.port = free_port()
        self.found = Killed()
        self._numbers = iter(range(1_000_000))
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._context = multiprocessing.get_context("forkserver")
        # The children are forked from a process that has done the imports: a start takes moments.
        self._context.set_forkserver_preload(IMPORTS)

    def run(self, kills: int) -> Killed:
        pauses = random.Random(SEED)
        clients = [threading.Thread(target=self._client) for _ in range(CLIENTS)]
        server = self._start()
        for client in clients:
            client.start()
        for _ in range(kills):
            time.sleep(pauses.uniform(0.02, 0.4))
            server.kill()
            server.join()
            self.found.kills += server.exitcode == -9
            server = self._start()
        # A busy machine acknowledges little between two kills.
        wait_until(lambda: len(self.found.acknowledged) >= 3 * kills, 120)
        self._over.set()
        for client in clients:
            client.join()
        self._drain()
        server.terminate()
        server.join(20)
        self.found.exit_code = server.exitcode
        self._count()
        return self.found

    def _start(self) -> ForkServerProcess:
        server = self._context.Process(
            target=inbox_server.main, args=(self.url, self.port, KEY, self.naive)
        )
        server.start()
        wait_until(lambda: ask(self.port, "GET", "/healthz") == 200)
        return server

    def _client(self) -> None:
        while not self._over.is_set():
            with self._lock:
                number = next(self._numbers)
            self._until_acknowledged(number)
            # Every fifth is sent once more, as a sender does that lost the answer.
            if number % 5 == 0:
                self._send(number)
            time.sleep(0.03)

    def _until_acknowledged(self, number: int) -> None:
        while self._send(number) != 202:
            time.sleep(0.05)
        with self._lock:
            self.found.acknowledged.add(loop.event(number).id)

    def _send(self, number: int) -> int | None:
        with self._lock:
            self.found.sent += 1
        event = loop.event(number, datetime.now(UTC))
        mode: events.Mode = "binary" if number % 2 else "structured"
        headers, body = events.to_http(event, KEY, mode)
        return ask(self.port, "POST", "/", body, headers)

    def _drain(self) -> None:
        engine = make_engine(self.url)

        def settled() -> bool:
            entries = Ledger(engine).entries("churn", "run.finished")
            return self.naive or len(entries) >= len(self.found.acknowledged)

        wait_until(settled, 60)
        engine.dispose()
        time.sleep(0.5)

    def _count(self) -> None:
        engine = make_engine(self.url)
        ledger = Ledger(engine)
        ledger.verify()
        entries = ledger.entries("churn")
        triggers = {e.subject: e.body["trigger"] for e in entries if e.kind == "run.started"}
        ends = [e for e in entries if e.kind == "run.finished" and e.body["state"] == "succeeded"]
        self.found.runs.update(triggers[e.subject] for e in ends)
        self.found.decisions.update(e.subject for e in entries if e.kind == "decision")
        self.found.integrity = integrity(engine)
        engine.dispose()


def integrity(engine: Engine) -> str:
    """What the database says of its own files."""
    with reading(engine) as connection:
        if engine.dialect.name != "sqlite":
            return "ok"
        return str(connection.exec_driver_sql("PRAGMA integrity_check").scalar_one())


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> int | None:
    """Status of one request, None when there was no answer."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as client:
        try:
            client.request(method, path, body, headers or {})
            return client.getresponse().status
        except (OSError, http.client.HTTPException):
            return None


def free_port() -> int:
    with contextlib.closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def wait_until(done, seconds: float = 30.0) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, f"not done after {seconds} s"
        time.sleep(0.01)


@pytest.fixture
def kill(database_url: str) -> Iterator:
    def run(kills: int, naive: bool = False) -> Killed:
        return Driver(database_url, naive).run(kills)

    yield run
    for child in multiprocessing.active_children():
        child.kill()


def test_twenty_kills_lose_no_acknowledged_event_and_double_no_retraining(kill):
    found = kill(20)

    assert found.kills == 20
    assert len(found.acknowledged) >= 60
    assert found.sent > len(found.acknowledged)
    assert found.lost == set()
    assert found.runs.most_common(1)[0][1] == 1
    assert found.decisions.most_common(1)[0][1] == 1
    assert found.integrity == "ok"
    assert found.exit_code == 0


def test_a_naive_inbox_loses_acknowledged_events_under_the_same_kills(kill):
    found = kill(8, naive=True)

    assert found.kills == 8
    assert found.lost != set()
