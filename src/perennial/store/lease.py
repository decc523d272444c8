"""Who may do exclusive work now: one row a name, with a number that only ever grows."""

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from perennial.store.engine import reading
from perennial.store.tables import leases


def acquire(engine: Engine, name: str, holder: str, ttl_s: float, now: float) -> int | None:
    """Take a lease that is free or over; gives the fencing number, None while another holds it."""
    with engine.begin() as connection:
        row = _row(connection, name)
        if row is None:
            values = {"name": name, "holder": holder, "fence": 1, "expires": now + ttl_s}
            connection.execute(insert(leases).values(values))
            return 1
        if row["expires"] > now:
            return None
        fence = int(row["fence"]) + 1
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
