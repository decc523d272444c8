"""Which rows are kept aside, why, and what became of them?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from perennial.errors import BadInput
from perennial.store.engine import reading
from perennial.store.tables import quarantine

# Renewed is a batch whose rows are in other batches now.
HELD, RENEWED, REPLAYED, DROPPED = "held", "renewed", "replayed", "dropped"


@dataclass(frozen=True)
class Batch:
    """Rows of one snapshot that broke its rules; their id follows from the run and the rows.

    ``rules`` counts rows by the rule that they break; a row may break several. ``digest`` is that
    of the file with the rows; of dropped ones it holds only what they are known by.
    """

    id: str
    at: datetime
    run: str
    snapshot: str
    digest: str
    rows: int
    rules: Mapping[str, int]
    state: str = HELD
    told: str = ""

    @property
    def file(self) -> str:
        """Name of the file with the rows: other rows lie in another file."""
        return f"{self.id}.{self.digest.removeprefix('sha256:')[:16]}.parquet"


def hold(connection: Connection, project: str, batch: Batch) -> None:
    """Write down a new batch."""
    connection.execute(insert(quarantine).values(project=project, **_values(batch)))


def exchange(
    connection: Connection, project: str, known: Batch, now: Batch, parts: Sequence[Batch] = ()
) -> None:
    """Let a batch be as it is ``now``, and its ``parts`` be known.

    Raises BadInput where the batch is not any more as it was ``known``.
    """
    mine = (quarantine.c.project == project) & (quarantine.c.id == known.id)
    as_known = (quarantine.c.state == known.state) & (quarantine.c.digest == known.digest)
    change = update(quarantine).where(mine & as_known).values(_values(now))
    if not connection.execute(change).rowcount:
        raise BadInput(
            f"batch {known.id} of {project} was changed meanwhile; look at it again with"
            f" 'perennial quarantine show {known.id}'"
        )
    for part in parts:
        hold(connection, project, part)


def batches(engine: Engine, project: str) -> list[Batch]:
    """All batches of a project, oldest first."""
    query = select(quarantine).where(quarantine.c.project == project)
    with reading(engine) as connection:
        rows = connection.execute(query.order_by(quarantine.c.at, quarantine.c.id)).mappings()
        return [_batch(row) for row in rows]


def _values(batch: Batch) -> dict[str, object]:
    return {
        "id": batch.id,
        "state": batch.state,
        "at": batch.at.isoformat(),
        "run": batch.run,
        "snapshot": batch.snapshot,
        "digest": batch.digest,
        "rows": batch.rows,
        "rules": json.dumps(batch.rules, sort_keys=True),
        "told": batch.told,
    }


def _batch(row: RowMapping) -> Batch:
    return Batch(
        id=row["id"],
        at=datetime.fromisoformat(row["at"]),
        run=row["run"],
        snapshot=row["snapshot"],
        digest=row["digest"],
        rows=row["rows"],
        rules=json.loads(row["rules"]),
        state=row["state"],
        told=row["told"],
    )
