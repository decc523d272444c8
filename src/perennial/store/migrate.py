"""Are the tables on PostgreSQL what this release wants? Makes them so: ``perennial.store.migrate``.

It waits for a database that is still starting, changes nothing twice, and may run beside others.
"""

import sys
import time
from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.exc import ProgrammingError

from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.settings import Settings
from perennial.store import schema
from perennial.store.engine import make_engine, migrating, open_engine, reading, shown

WAIT_S = 60.0
_AGAIN_S = 1.0


def migrate(engine: Engine) -> int:
    """Bring the tables to the newest version and give its number; all of it or nothing."""
    try:
        with migrating(engine) as connection:
            schema.upgrade(connection)
            return schema.version(connection)
    except ProgrammingError as exc:
        said = " ".join(str(exc.orig).split())
        raise BadInput(
            f"the tables at {shown(engine)} cannot be made: {said}; does the role have a schema"
            " of its own? 'python -m perennial.store.tenant' makes one"
        ) from exc


def await_database(engine: Engine, wait_s: float) -> None:
    """Wait until the database answers. Raises Unavailable when it does not in time."""
    _await(lambda: _silence(engine), wait_s, time.sleep)


def await_tables(
    url: str, wait_s: float = WAIT_S, pause: Callable[[float], object] = time.sleep
) -> None:
    """Wait until the tables are those of this release: pods come up in any order.

    Raises Unavailable when they are not in time.
    """
    _await(lambda: _lack(url), wait_s, pause)


def _await(
    fault: Callable[[], Unavailable | None], wait_s: float, pause: Callable[[float], object]
) -> None:
    until = time.monotonic() + wait_s
    while (found := fault()) and time.monotonic() + _AGAIN_S < until:
        print(f"{found}; trying again", file=sys.stderr, flush=True)
        pause(_AGAIN_S)
    if found:
        raise found


def _lack(url: str) -> Unavailable | None:
    try:
        make_engine(url).dispose()
    except Unavailable as exc:
        return exc
    return None


def _silence(engine: Engine) -> Unavailable | None:
    try:
        with reading(engine) as connection:
            schema.version(connection)
    except Unavailable as exc:
        return exc
    return None


def told(program: str, work: Callable[[str], str]) -> int:
    """Work on the database that PERENNIAL_STATE_URL names, and print what came of it.

    An error is one line on stderr and an exit code.
    """
    try:
        print(work(Settings.load().state_url))
    except PerennialError as exc:
        print(f"{program}: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _migrated(url: str) -> str:
    if not url:
        raise BadInput(
            "PERENNIAL_STATE_URL is empty; SQLite in the state folder is migrated by itself"
        )
    engine = open_engine(url)
    await_database(engine, WAIT_S)
    return f"the tables at {shown(engine)} have version {migrate(engine)}"


def main() -> int:
    """Migrate the database that PERENNIAL_STATE_URL names."""
    return told("perennial.store.migrate", _migrated)


if __name__ == "__main__":
    sys.exit(main())
