"""Which number does a model bear: v1, v2, ... in the order of registration."""

from datetime import datetime

from sqlalchemy import ColumnElement, Connection, Engine, RowMapping, func, insert, select

from perennial.records import Version
from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import versions


def next_version(
    engine: Engine,
    project: str,
    digest: str,
    run_id: str,
    as_of: datetime,
    guard: fence.Guard = fence.free,
) -> Version:
    """Give a model its number; a digest that has one keeps it, whoever asks again.

    Raises what the guard raises, and then nothing was written.
    """
    with engine.begin() as connection:
        guard(connection)
        known = _find(connection, versions.c.project == project, versions.c.digest == digest)
        if known:
            return known[0]
        newest = select(func.max(versions.c.number)).where(versions.c.project == project)
        number = (connection.execute(newest).scalar() or 0) + 1
        new = Version(number=number, digest=digest, run_id=run_id, as_of=as_of)
        connection.execute(
            insert(versions).values(
                project=project,
                number=number,
                digest=digest,
                run_id=run_id,
                as_of=as_of.isoformat(),
            )
        )
        return new


def by_number(engine: Engine, project: str, number: int) -> Version | None:
    """The version with a number, None when there is none."""
    with reading(engine) as connection:
        found = _find(connection, versions.c.project == project, versions.c.number == number)
    return found[0] if found else None


def all_versions(engine: Engine, project: str) -> list[Version]:
    """Every version of a project, oldest first."""
    with reading(engine) as connection:
        return _find(connection, versions.c.project == project)


def _find(connection: Connection, *where: ColumnElement[bool]) -> list[Version]:
    query = select(versions).where(*where).order_by(versions.c.number)
    return [_version(row) for row in connection.execute(query).mappings()]


def _version(row: RowMapping) -> Version:
    return Version(
        number=row["number"],
        digest=row["digest"],
        run_id=row["run_id"],
        as_of=datetime.fromisoformat(row["as_of"]),
    )
