"""An event reaches a listener that is away for long, and nothing waits for it meanwhile."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import numpy as np
import pytest
import servers
import tiny
from launchers import eventually

from perennial import bundle, events, signing
from perennial.contract import Contract
from perennial.drift import detectors, segments
from perennial.drift.windows import Served
from perennial.records import Event
from perennial.serving import outbox as outboxes
from perennial.serving import watcher as watchers
from perennial.serving.outbox import Outbox, Patience

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY = b"k" * signing.KEY_BYTES
HOUR = 3600


def event(name: str = "1") -> Event:
    return Event(name, "/p", events.DRIFT, "p", NOW, {})


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.s)


class Listener:
    """Answers with a status that a test may change, or not at all while it is silent."""

    def __init__(self, status: int = 202) -> None:
        self.status = status
        self.seen: list[tuple[str, datetime]] = []
        self.taken: list[str] = []
        self.speaks = threading.Event()
        self.speaks.set()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        found, signature = events.from_http(request.headers, request.content)
        assert signing.verify(KEY, events.message(found), signature)
        self.seen.append((found.id, found.time))
        self.speaks.wait(30)
        if self.status == 202:
            self.taken.append(found.id)
        return httpx.Response(self.status)

    @property
    def ids(self) -> list[str]:
        return [name for name, _ in self.seen]


def outbox(
    listener: Listener, clock: Callable[[], float] = time.monotonic, **patience: float
) -> Outbox:
    now = clock.now if isinstance(clock, Clock) else lambda: NOW
    given = Patience(**patience)  # type: ignore[arg-type]
    transport = httpx.MockTransport(listener)
    return Outbox("http://sink/", KEY, now, patience=given, clock=clock, transport=transport)


def counted(outcome: str) -> float:
    return float(outboxes.EVENTS.labels(outcome)._value.get())


@pytest.fixture
def silent() -> Iterator[Listener]:
    """A listener that takes requests and does not answer."""
    listener = Listener()
    listener.speaks.clear()
    yield listener
    listener.speaks.set()


# By a clock that a test moves.


def test_an_event_is_sent_once_when_it_is_taken():
    listener, clock = Listener(), Clock()
    box = outbox(listener, clock)
    box.put(event())

    for clock.s in range(10):
        box.send_due()

    assert listener.ids == ["1"]


def test_a_receiver_that_is_away_for_90_seconds_gets_the_event_with_the_time_of_its_try():
    listener, clock = Listener(503), Clock()
    box = outbox(listener, clock)
    box.put(event())

    for clock.s in range(200):
        listener.status = 503 if clock.s < 90 else 202
        box.send_due()

    assert listener.taken == ["1"]
    assert set(listener.ids) == {"1"}, "receivers know an event by its id, whenever it comes"
    assert listener.seen[-1][1] >= NOW + timedelta(seconds=90), "an old time would be refused"


def test_a_receiver_that_stays_away_is_asked_ever_more_rarely_and_given_up_after_an_hour(caplog):
    listener, clock = Listener(503), Clock()
    box = outbox(listener, clock)
    box.put(event())
    failed = counted("failed")

    asked_at = []
    for half in range(2 * (HOUR + 600)):
        clock.s, before = half / 2, len(listener.seen)
        box.send_due()
        asked_at += [clock.s] * (len(listener.seen) - before)

    pauses = np.diff(asked_at)
    assert list(pauses) == sorted(pauses)
    assert max(pauses) == 60
    assert HOUR - 60 <= asked_at[-1] <= HOUR
    assert caplog.text.count("drift event lost id=1") == 1
    assert caplog.text.count("not taken yet") == 1
    assert counted("failed") - failed == 1


def test_a_new_event_goes_before_those_that_failed():
    listener, clock = Listener(503), Clock()
    box = outbox(listener, clock)
    for name in "abc":
        box.put(event(name))
    box.send_due()
    clock.s = 300.0
    box.put(event("new"))

    box.send_due()

    assert listener.ids == ["a", "b", "c", "new", "a", "b", "c"]


def test_of_too_many_the_oldest_is_dropped_and_told_once(caplog):
    listener, clock = Listener(503), Clock()
    box = outbox(listener, clock, letters=3)
    dropped = counted("dropped")
    for clock.s, name in enumerate("abcd"):
        box.put(event(name))
        box.send_due()
    listener.status = 202

    clock.s = 100.0
    box.send_due()

    assert sorted(listener.taken) == ["b", "c", "d"]
    assert caplog.text.count("drift event lost id=a sink=http://sink/: 3 newer ones wait") == 1
    assert caplog.text.count("lost") == 1
    assert counted("dropped") - dropped == 1


def test_a_fault_of_one_event_does_not_keep_the_others():
    listener, clock = Listener(), Clock()
    box = outbox(listener, clock)
    box.put(Event("odd", "/p", events.DRIFT, "p", NOW, {"x": object()}))
    box.put(event())

    box.send_due()

    assert listener.taken == ["1"]


# By its own thread.


class Slow(servers.Sink):
    """Over a socket: takes a request at once, and answers seconds later."""

    def __init__(self, silent_s: float) -> None:
        super().__init__()
        self.silent_s = silent_s

    def answer(self) -> int:
        time.sleep(self.silent_s)
        return super().answer()


def test_a_listener_that_is_silent_for_long_and_then_answers_gets_the_event_once():
    sink = Slow(2.5)
    box = Outbox(sink.url, KEY, lambda: NOW)
    sent = counted("sent")
    box.start()

    box.put(event())
    taken = eventually(lambda: counted("sent") - sent == 1, 15)

    box.finish()
    sink.close()
    assert taken
    assert len(sink.got) == 1


def test_an_answer_is_awaited_for_longer_than_a_trigger_tries():
    """What hangs up on a Broker cancels what is undelivered."""
    import yaml

    text = (Path(__file__).parents[1] / "kustomize" / "base" / "events.yaml").read_text()
    [trigger] = [d for d in yaml.safe_load_all(text) if d["kind"] == "Trigger"]
    timeouts = []

    def told(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        return httpx.Response(202)

    box = outbox(told, Clock())  # type: ignore[arg-type]
    box.put(event())
    box.send_due()

    [wait] = timeouts
    assert wait["read"] > sum(2**n for n in range(trigger["spec"]["delivery"]["retry"]))
    assert wait["connect"] <= 2.0


def test_finish_returns_in_time_while_a_post_hangs_and_tries_what_waits_once_more(silent, caplog):
    box = outbox(silent, last_s=0.5)
    box.start()
    box.put(event("hangs"))
    assert eventually(lambda: silent.ids == ["hangs"])
    box.put(event("waits"))

    began = time.monotonic()
    box.finish()

    assert time.monotonic() - began < 1.5
    assert silent.ids == ["hangs", "waits"]
    for name in ("hangs", "waits"):
        assert caplog.text.count(f"drift event lost id={name}") == 1


def test_finish_delivers_what_waits_for_its_next_try():
    listener = Listener(503)
    box = outbox(listener, first_pause_s=60.0)
    box.start()
    box.put(event())
    assert eventually(lambda: listener.ids == ["1"])
    listener.status = 202

    box.finish()

    assert listener.taken == ["1"]


def test_a_post_that_is_refused_while_the_server_ends_is_tried_once_more(silent, caplog):
    silent.status = 503
    box = outbox(silent, first_pause_s=60.0)
    box.start()
    box.put(event())
    assert eventually(lambda: silent.ids == ["1"])
    ending = threading.Thread(target=box.finish)
    ending.start()
    assert eventually(box._ending.is_set)

    silent.speaks.set()
    assert eventually(lambda: len(silent.ids) == 2)
    ending.join(10)

    assert silent.ids == ["1", "1"]
    assert caplog.text.count("drift event lost id=1") == 1


# Under a watcher.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> bundle.Parts:
    folder = tmp_path_factory.mktemp("outbox") / "tiny"
    tiny.bundle(folder)
    return bundle.parts(folder)


def test_windows_are_closed_and_written_while_a_post_hangs(parts, silent, tmp_path, caplog):
    contract = Contract.from_plain(parts.contract)
    writer = segments.Writer.new(tmp_path, "v1", contract.names)
    box = outbox(silent, last_s=0.2)
    watch = detectors.watch(parts, "scipy")
    watcher = watchers.Watcher(parts.project, watch, writer, box, lambda: NOW)
    window = tiny.WINDOW_ROWS * tiny.STEP

    def serve(number: int) -> None:
        matrix = contract.encode(tiny.rows(50, seed=number, shift=2.0))
        moment = tiny.START + number * window
        watcher.offer(Served(moment, f"w{number}", matrix, np.full(50, 0.5)))

    watcher.start()
    for number in range(2):
        serve(number)
    assert eventually(lambda: len(silent.seen) == 1)
    for number in range(2, 5):
        serve(number)
    written = eventually(lambda: segments.reports(tmp_path, tiny.START + 3 * window))

    assert written
    assert len(silent.seen) == 1, "the first post still hangs"
    began = time.monotonic()
    watcher.finish()
    assert time.monotonic() - began < 3.0
    assert segments.starts(tmp_path)[-1] == tiny.START + 4 * window
    assert "drift event lost" in caplog.text, "the outbox was ended too"


def test_finish_returns_in_time_while_the_queue_is_full_and_the_store_hangs(
    parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(watchers, "_DRAIN_S", 0.3)
    monkeypatch.setattr(watchers, "QUEUE", 1)
    monkeypatch.setattr(watchers, "SPILL_ROWS", 1)
    contract = Contract.from_plain(parts.contract)
    writer = segments.Writer.new(tmp_path, "v1", contract.names)
    writing, goes_on = threading.Event(), threading.Event()
    monkeypatch.setattr(
        type(writer), "write", lambda *_: (writing.set(), goes_on.wait(30)), raising=True
    )
    box = outboxes.Silence()
    watch = detectors.watch(parts, "scipy")
    watcher = watchers.Watcher(parts.project, watch, writer, box, lambda: NOW)
    one = Served(tiny.START, "w", contract.encode(tiny.rows(1)), np.full(1, 0.5))
    watcher.start()
    watcher.offer(one)
    assert writing.wait(10)
    watcher.offer(one)

    began = time.monotonic()
    ending = threading.Thread(target=watcher.finish, daemon=True)
    ending.start()
    ending.join(5.0)

    took_s = time.monotonic() - began
    goes_on.set()
    assert took_s < 2.0
