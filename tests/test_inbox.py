"""The inbox keeps what it acknowledged, once, and lets no poison block it."""

import threading
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from sqlalchemy import Engine

from perennial.errors import Unavailable
from perennial.records import Event
from perennial.retrain.inbox import Inbox
from perennial.store.engine import make_engine

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def event(name: str = "e1", source: str = "/a") -> Event:
    data = {"window_start": "2011-05-29T00:00:00+00:00", "p": [0.1, None], "t": "ü"}
    return Event(name, source, "dev.perennial.drift.detected", "churn", NOW, data)


@pytest.fixture
def inbox(engine: Engine) -> Inbox:
    return Inbox(engine)


def test_events_wait_in_the_order_of_their_arrival_as_they_were(inbox: Inbox):
    for name in ("b", "a", "c"):
        assert inbox.put(event(name))

    assert inbox.pending() == [(1, event("b")), (2, event("a")), (3, event("c"))]
    assert inbox.pending(limit=1) == [(1, event("b"))]


def test_an_event_is_known_by_source_and_id_for_ever(inbox: Inbox):
    assert inbox.put(event("e1"))
    assert not inbox.put(replace(event("e1"), time=datetime.now(UTC)))
    inbox.settle(1, "declined")

    assert not inbox.put(event("e1"))
    assert inbox.put(event("e1", source="/b"))
    assert inbox.counts() == {"pending": 1, "settled": 1, "dead": 0}


def test_source_and_id_are_not_glued_together(inbox: Inbox):
    assert inbox.put(event("bc", source="a"))
    assert inbox.put(event("c", source="ab"))


def test_a_settled_event_does_not_come_back(inbox: Inbox):
    inbox.put(event("e1"))
    inbox.put(event("e2"))
    inbox.settle(1, "retrain: 2 windows drifted")

    assert [e.id for _, e in inbox.pending()] == ["e2"]


def test_an_event_that_fails_three_times_is_set_aside_with_the_reason(inbox: Inbox):
    inbox.put(event("poison"))
    inbox.put(event("good"))

    set_aside = [inbox.fail(1, f"try {n}") for n in (1, 2, 3)]

    assert set_aside == [False, False, True]
    assert inbox.dead() == [(event("poison"), "try 3")]
    assert [e.id for _, e in inbox.pending()] == ["good"]
    assert not inbox.put(event("poison"))


def test_another_process_sees_what_was_acknowledged(inbox: Inbox, database_url: str):
    inbox.put(event())

    other = make_engine(database_url)
    assert Inbox(other).pending() == inbox.pending()
    other.dispose()


def test_an_inbox_that_cannot_write_says_so(engine: Engine, inbox: Inbox):
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE inbox")

    with pytest.raises(Unavailable, match="cannot be written now; send the event again"):
        inbox.put(event())


def test_eight_senders_of_the_same_events_make_each_event_once(inbox: Inbox):
    new: list[bool] = []

    def send() -> None:
        new.extend(inbox.put(event(f"e{n}")) for n in range(20))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(new) == 20
    assert len(new) == 160
    assert [seq for seq, _ in inbox.pending()] == list(range(1, 21))
