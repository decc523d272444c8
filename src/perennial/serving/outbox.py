"""How does an event reach a listener that may be away for long, while nobody waits for it?"""

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

import httpx
from prometheus_client import Counter

from perennial import events
from perennial.records import Event

log = logging.getLogger("perennial.watch")

EVENTS = Counter("perennial_drift_events", "Drift events by what became of them.", ["outcome"])

_TICK_S = 0.2


class Announcer(Protocol):
    """Tells somebody that a window drifted."""

    def start(self) -> None:
        """Begin to send."""
        ...

    def put(self, event: Event) -> None:
        """Take an event; it is sent later, and nobody waits for that."""
        ...

    def finish(self) -> None:
        """End within seconds; what waits is tried once more."""
        ...


@dataclass(frozen=True)
class Patience:
    """How long an outbox waits, and how much it keeps meanwhile."""

    # A Broker answers when its Trigger has tried for up to 255 s (kustomize/base/events.yaml), and
    # drops what nobody waits for. Not much longer: its next tries are for the dead letter sink,
    # where an event leads to no training, while a new post of it does.
    post_s: float = 300.0
    connect_s: float = 2.0
    try_for_s: float = 3600.0
    first_pause_s: float = 0.5
    longest_pause_s: float = 60.0
    last_s: float = 2.0  # for all that waits when the server ends
    letters: int = 100


PATIENCE = Patience()


@dataclass(eq=False)
class _Letter:
    event: Event
    given_up: float
    due: float
    pause: float


class Outbox:
    """Posts signed events to a sink from a thread of its own, again with growing pauses."""

    def __init__(
        self,
        sink: str,
        key: bytes | None,
        now: Callable[[], datetime],
        *,
        patience: Patience = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._sink = sink
        self._key = key
        self._now = now
        self._patience = patience
        self._clock = clock
        self._letters: list[_Letter] = []
        self._under_way: list[_Letter] = []
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._sender = threading.Thread(target=self._send, name="outbox", daemon=True)
        self._client = httpx.Client(trust_env=False, transport=transport)

    def start(self) -> None:
        """Begin to send."""
        self._sender.start()

    def put(self, event: Event) -> None:
        """Take an event; where too many wait, the oldest goes."""
        moment = self._clock()
        pause = self._patience.first_pause_s
        letter = _Letter(event, moment + self._patience.try_for_s, moment, pause)
        with self._lock:
            oldest = self._add(letter)
        self._drop(oldest)

    def send_due(self) -> None:
        """Send what is due, one after the other; what was tried least goes first."""
        while not self._ending.is_set() and (letter := self._next(self._clock())):
            self._try(letter, self._patience.post_s)

    def finish(self) -> None:
        """Try all that waits once more and end, within seconds; what stays is told as lost."""
        until = self._clock() + self._patience.last_s
        self._ending.set()
        # Beside the sender, which a silent sink may hold.
        last = threading.Thread(target=self._send_last, name="outbox-last", daemon=True)
        last.start()
        last.join(max(0.0, until - self._clock()))
        with self._lock:
            left = [*self._letters, *self._under_way]
            self._letters.clear()
            self._under_way.clear()
        for letter in left:
            self._lose(letter, "failed", "no answer before this server ended")

    def _send(self) -> None:
        while not self._ending.wait(_TICK_S):
            self.send_due()

    def _send_last(self) -> None:
        self._send_left()
        # A try that was under way when the end came may put its event back.
        self._sender.join()
        self._send_left()

    def _send_left(self) -> None:
        while letter := self._next(math.inf):
            self._try(letter, self._patience.last_s, last=True)

    def _next(self, moment: float) -> _Letter | None:
        with self._lock:
            due = [letter for letter in self._letters if letter.due <= moment]
            if not due:
                return None
            letter = min(due, key=lambda one: (one.pause, one.due))
            self._letters.remove(letter)
            self._under_way.append(letter)
            return letter

    def _add(self, letter: _Letter) -> _Letter | None:
        """Let a letter wait; what had to go for it. Needs the lock."""
        self._letters.append(letter)
        if len(self._letters) <= self._patience.letters:
            return None
        oldest = min(self._letters, key=lambda one: one.given_up)
        self._letters.remove(oldest)
        return oldest

    def _drop(self, letter: _Letter | None) -> None:
        if letter is not None:
            self._lose(letter, "dropped", f"{self._patience.letters} newer ones wait")

    def _try(self, letter: _Letter, answer_s: float, last: bool = False) -> None:
        trouble = self._post(letter.event, answer_s)
        moment = self._clock()
        again = trouble is not None and not last and moment + letter.pause <= letter.given_up
        first = letter.pause == self._patience.first_pause_s
        oldest = None
        with self._lock:
            if letter not in self._under_way:
                return  # Told as lost meanwhile.
            # In one step: a letter is always in one of the two lists until its fate is told.
            self._under_way.remove(letter)
            if again:
                letter.due = moment + letter.pause
                letter.pause = min(2 * letter.pause, self._patience.longest_pause_s)
                oldest = self._add(letter)
        if trouble is None:
            EVENTS.labels("sent").inc()
        elif not again:
            self._lose(letter, "failed", trouble)
        elif first:
            log.warning("drift event not taken yet id=%s: %s", letter.event.id, trouble)
        self._drop(oldest)

    def _lose(self, letter: _Letter, outcome: str, why: str) -> None:
        EVENTS.labels(outcome).inc()
        log.error("drift event lost id=%s sink=%s: %s", letter.event.id, self._sink, why)

    def _post(self, event: Event, answer_s: float) -> str | None:
        """What kept an event from being taken, None when it was."""
        wait = httpx.Timeout(answer_s, connect=min(answer_s, self._patience.connect_s))
        try:
            headers, body = events.to_http(events.restamped(event, self._now()), self._key)
            answer = self._client.post(self._sink, headers=headers, content=body, timeout=wait)
        except Exception as exc:
            # Whatever it is must not end the thread: it sends all the others too.
            return f"{type(exc).__name__} {exc}".strip()
        return None if answer.is_success else f"HTTP {answer.status_code} {answer.text[:200]}"


class Silence:
    """For a server that nobody listens to: drift is written, but not told."""

    def start(self) -> None:
        """Nothing is ever sent."""

    def put(self, event: Event) -> None:
        """Count the event."""
        EVENTS.labels("untold").inc()

    def finish(self) -> None:
        """Nothing ever waits."""
