"""Who may do exclusive work now: one row a name, with a number that only ever grows."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, RowMapping, delete, insert, select, update

from perennial.errors import Unavailable
from perennial.store import fence as fences
from perennial.store.engine import reading
from perennial.store.tables import leases

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """Who has a lease, and the number of the work that it is held for."""

    holder: str
    number: int


def acquire(
    engine: Engine, name: str, holder: str, ttl_s: float, now: float, *, goes_on: bool = False
) -> int | None:
    """Take a lease that is free or over; gives the fencing number, None while another holds it.

    ``goes_on`` says that what the holder had begun under it goes on: then the number stays.
    """
    with engine.begin() as connection:
        row = _row(connection, name)
        if row is None:
            values = {"name": name, "holder": holder, "fence": 1, "expires": now + ttl_s}
            connection.execute(insert(leases).values(values))
            return 1
        if row["expires"] > now:
            return None
        fence = int(row["fence"]) + (not goes_on or row["holder"] != holder)
        _set(connection, name, holder=holder, fence=fence, expires=now + ttl_s)
        return fence


def renew(engine: Engine, name: str, fence: int, ttl_s: float, now: float) -> bool:
    """Hold on for longer; False when somebody else took the lease meanwhile."""
    with engine.begin() as connection:
        if not _is_mine(connection, name, fence):
            return False
        _set(connection, name, expires=now + ttl_s)
        return True


def release(engine: Engine, name: str, fence: int) -> None:
    """Give the lease back; nothing happens when it is no longer ours."""
    with engine.begin() as connection:
        if _is_mine(connection, name, fence):
            _set(connection, name, expires=0.0)


def hold(
    engine: Engine, name: str, holder: str, ttl_s: float, now: float, *, after: str = ""
) -> Held:
    """Take a lease, or hold on to it for longer, by the holder's name; gives who has it then.

    ``after`` is who held it for this holder's work before: then it is the same work still.
    """
    with engine.begin() as connection:
        row = _row(connection, name)
        if row is None:
            values = {"name": name, "holder": holder, "fence": 1, "expires": now + ttl_s}
            connection.execute(insert(leases).values(values))
            return Held(holder, 1)
        fence, last = int(row["fence"]), str(row["holder"])
        if row["expires"] > now and last != holder:
            return Held(last, fence)
        fence += last not in (holder, after)
        _set(connection, name, holder=holder, fence=fence, expires=now + ttl_s)
        return Held(holder, fence)


def let_go(engine: Engine, name: str, holder: str) -> None:
    """Give back what ``hold`` took; nothing happens when it is no longer ours."""
    with engine.begin() as connection:
        row = _row(connection, name)
        if row is not None and row["holder"] == holder:
            _set(connection, name, expires=0.0)


def forget(engine: Engine, prefix: str, before: float) -> None:
    """Delete leases by the beginning of their name that were over then.

    Their numbers begin anew: only for leases whose number no writer is fenced by.
    """
    old = (leases.c.name.startswith(prefix, autoescape=True), leases.c.expires < before)
    with engine.begin() as connection:
        connection.execute(delete(leases).where(*old))


def holder(engine: Engine, name: str, now: float) -> str | None:
    """Who holds the lease now, None when it is free."""
    with reading(engine) as connection:
        row = _row(connection, name)
    return str(row["holder"]) if row is not None and row["expires"] > now else None


def _is_mine(connection: Connection, name: str, fence: int) -> bool:
    row = _row(connection, name)
    return row is not None and row["fence"] == fence and row["expires"] > 0


def _row(connection: Connection, name: str) -> RowMapping | None:
    return connection.execute(select(leases).where(leases.c.name == name)).mappings().one_or_none()


def _set(connection: Connection, name: str, **values: object) -> None:
    connection.execute(update(leases).where(leases.c.name == name).values(**values))


class Leader:
    """One of several like processes does the work; another takes over when it falls silent."""

    def __init__(
        self, engine: Engine, name: str, holder: str, ttl_s: float, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._name = name
        self._holder = holder
        self._ttl_s = ttl_s
        self._clock = clock
        self._fence: int | None = None
        self._sure_until = -math.inf

    @property
    def term(self) -> int | None:
        """The fencing number, None while another process leads."""
        return self._fence

    def leads(self) -> bool:
        """Is this process the one, for at least the next third of the lease?"""
        now = self._clock()
        if self._fence is not None and (now < self._sure_until or self._renew(now)):
            return True
        self._fence = acquire(self._engine, self._name, self._holder, self._ttl_s, now)
        self._sure_until = now + self._ttl_s / 3
        if self._fence is not None:
            log.info("leads lease=%s holder=%s term=%d", self._name, self._holder, self._fence)
        return self._fence is not None

    def keep(self) -> None:
        """Stay the one through work that takes long; what was lost is not taken anew by this."""
        now = self._clock()
        if self._fence is not None and now >= self._sure_until:
            self._renew(now)

    def check(self) -> None:
        """Nothing, while this process leads. Raises Unavailable when another one took over."""
        if self._fence is None or not self._renew(self._clock()):
            raise Unavailable(f"another {self._name} leads now")

    def guard(self, connection: Connection) -> None:
        """As ``check``, in the transaction of a write: who hung since then writes nothing."""
        fences.check(connection, self._name, self._fence)

    def resign(self) -> None:
        """Let another process begin at once."""
        if self._fence is not None:
            release(self._engine, self._name, self._fence)
            self._fence = None

    def _renew(self, now: float) -> bool:
        assert self._fence is not None
        if renew(self._engine, self._name, self._fence, self._ttl_s, now):
            self._sure_until = now + self._ttl_s / 3
            return True
        log.warning("lost lease=%s holder=%s term=%d", self._name, self._holder, self._fence)
        self._fence = None
        return False
