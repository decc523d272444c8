"""May who writes still write? Its lease is looked at in the transaction of the write itself."""

from collections.abc import Callable

from sqlalchemy import Connection, select

from perennial.errors import Unavailable
from perennial.store.tables import leases

# Says nothing, or raises Unavailable in the transaction that it is given.
Guard = Callable[[Connection], None]


def free(_connection: Connection) -> None:
    """Nobody else writes here, as on one machine."""


def check(connection: Connection, name: str, number: int | None) -> None:
    """Nothing, while a lease has this number. Raises Unavailable when another process took it."""
    query = select(leases.c.fence).where(leases.c.name == name, leases.c.expires > 0)
    if number is None or connection.execute(query).scalar_one_or_none() != number:
        raise Unavailable(f"another {name} leads now; this one writes no more")


def check_run(connection: Connection, name: str, number: int | None) -> None:
    """As ``check``, but a lease that was given back is still that of its last holder's work."""
    query = select(leases.c.fence, leases.c.holder).where(leases.c.name == name)
    row = connection.execute(query).one_or_none()
    if row is None or number is None or row.fence != number:
        holder = row.holder if row else "nobody"
        raise Unavailable(f"the lease {name} went to {holder}; this one writes no more")
