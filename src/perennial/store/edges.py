"""What is each project's edge told: documents that every replica of the operator sees."""

from sqlalchemy import Engine, delete, insert, select

from perennial.store import fence
from perennial.store.engine import reading
from perennial.store.tables import edge_files


def read(engine: Engine, project: str, name: str) -> str | None:
    """One document, None when it was never written."""
    query = select(edge_files.c.body).where(
        edge_files.c.project == project, edge_files.c.name == name
    )
    with reading(engine) as connection:
        return connection.execute(query).scalar_one_or_none()


def write(
    engine: Engine,
    project: str,
    name: str,
    version: str,
    body: str,
    guard: fence.Guard = fence.free,
) -> None:
    """Put a document in the place of the one before; readers see the old one or the new one.

    Raises what the guard raises, and then nothing was written.
    """
    same = edge_files.c.project == project, edge_files.c.name == name
    values = {"project": project, "name": name, "version": version, "body": body}
    with engine.begin() as connection:
        guard(connection)
        connection.execute(delete(edge_files).where(*same))
        connection.execute(insert(edge_files).values(values))


def versions(engine: Engine) -> dict[tuple[str, str], str]:
    """The version of every document, by project and name."""
    query = select(edge_files.c.project, edge_files.c.name, edge_files.c.version)
    with reading(engine) as connection:
        return {(project, name): version for project, name, version in connection.execute(query)}
