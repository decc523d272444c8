"""Which events did we promise to handle: none is lost, none counts twice, no poison blocks."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import Connection, Engine, RowMapping, func, insert, select, true, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from perennial import signing
from perennial.errors import Unavailable
from perennial.records import Event
from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import inbox

ATTEMPTS = 3

PENDING, SETTLED, DEAD = "pending", "settled", "dead"


class Inbox:
    """Events in the order of their arrival, kept by source and id for ever."""

    def __init__(self, engine: Engine, project: str = "") -> None:
        """Of one project, where several share a database; of all without one."""
        self._engine = engine
        self._mine = inbox.c.subject == project if project else true()

    def put(self, event: Event) -> bool:
        """Keep an event; on the disk when this returns. False when it was known already.

        Raises Unavailable when the disk does not take it: then it must not be acknowledged.
        """
        same = (inbox.c.source == event.source) & (inbox.c.id == event.id)
        with _disk_faults(), self._engine.begin() as connection:
            if connection.execute(select(inbox.c.seq).where(same)).first():
                return False
            newest = connection.execute(select(func.max(inbox.c.seq))).scalar() or 0
            connection.execute(insert(inbox).values(seq=newest + 1, **_columns(event)))
        return True

    def pending(self, limit: int | None = None) -> list[tuple[int, Event]]:
        """Events that nobody settled, oldest first, with their numbers."""
        query = (
            select(inbox)
            .where(inbox.c.state == PENDING, self._mine)
            .order_by(inbox.c.seq)
            .limit(limit)
        )
        with reading(self._engine) as connection:
            return [(row["seq"], _event(row)) for row in connection.execute(query).mappings()]

    def settle(self, seq: int, outcome: str, guard: fence.Guard = fence.free) -> None:
        """Handled, with what came of it; never handled again. Raises what the guard raises."""
        with self._engine.begin() as connection:
            guard(connection)
            _update(connection, seq, state=SETTLED, outcome=outcome)

    def fail(self, seq: int, reason: str, guard: fence.Guard = fence.free) -> bool:
        """Handling raised an error. True when that was once too often: the event is set aside.

        Raises what the guard raises.
        """
        with self._engine.begin() as connection:
            guard(connection)
            tried = connection.execute(select(inbox.c.attempts).where(inbox.c.seq == seq))
            attempts = tried.scalar_one() + 1
            state = DEAD if attempts >= ATTEMPTS else PENDING
            _update(connection, seq, state=state, attempts=attempts, outcome=reason)
        return state == DEAD

    def dead(self) -> list[tuple[Event, str]]:
        """Events that were set aside, with the reason."""
        query = select(inbox).where(inbox.c.state == DEAD, self._mine).order_by(inbox.c.seq)
        with reading(self._engine) as connection:
            rows = connection.execute(query).mappings()
            return [(_event(row), row["outcome"]) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many events are pending, settled and dead."""
        query = select(inbox.c.state, func.count()).where(self._mine).group_by(inbox.c.state)
        with reading(self._engine) as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {state: found.get(state, 0) for state in (PENDING, SETTLED, DEAD)}


def _update(connection: Connection, seq: int, **values: str | int) -> None:
    connection.execute(update(inbox).where(inbox.c.seq == seq).values(**values))


@contextmanager
def _disk_faults() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout) as exc:
        raise Unavailable("the inbox cannot be written now; send the event again") from exc


def _columns(event: Event) -> dict[str, str | int]:
    return {
        "source": event.source,
        "id": event.id,
        "type": event.type,
        "subject": event.subject,
        "time": event.time.astimezone(UTC).isoformat(),
        "data": signing.canonical(event.data).decode(),
        "state": PENDING,
        "attempts": 0,
        "outcome": "",
    }


def _event(row: RowMapping) -> Event:
    return Event(
        id=row["id"],
        source=row["source"],
        type=row["type"],
        subject=row["subject"],
        time=datetime.fromisoformat(row["time"]),
        data=json.loads(row["data"]),
    )
