"""What did the last accepted snapshot of a project show?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Engine, insert, select, update

from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import accepted


@dataclass(frozen=True)
class Accepted:
    """A snapshot that kept its rules; ``observed`` is JSON by expectation."""

    digest: str
    as_of: datetime
    at: datetime
    rows: int
    observed: Mapping[str, Any]


def record(
    engine: Engine, project: str, snapshot: Accepted, guard: fence.Guard = fence.free
) -> None:
    """Keep what an accepted snapshot showed; the same one again takes the place of the first.

    Raises what the guard raises, and then nothing was written.
    """
    values = {
        "as_of": snapshot.as_of.isoformat(),
        "at": snapshot.at.isoformat(),
        "rows": snapshot.rows,
        "observed": json.dumps(snapshot.observed, sort_keys=True, default=str),
    }
    mine = (accepted.c.project == project) & (accepted.c.digest == snapshot.digest)
    with engine.begin() as connection:
        guard(connection)
        if not connection.execute(update(accepted).where(mine).values(values)).rowcount:
            connection.execute(
                insert(accepted).values(project=project, digest=snapshot.digest, **values)
            )


def last(engine: Engine, project: str, before: datetime, other_than: str) -> Accepted | None:
    """The newest accepted snapshot as of ``before`` or earlier, other than the one at hand."""
    query = select(accepted).where(accepted.c.project == project, accepted.c.digest != other_than)
    with reading(engine) as connection:
        rows = connection.execute(query).mappings().all()
    found = [
        Accepted(
            digest=row["digest"],
            as_of=datetime.fromisoformat(row["as_of"]),
            at=datetime.fromisoformat(row["at"]),
            rows=row["rows"],
            observed=json.loads(row["observed"]),
        )
        for row in rows
    ]
    earlier = [one for one in found if one.as_of <= before]
    return max(earlier, key=lambda one: (one.as_of, one.at), default=None)
