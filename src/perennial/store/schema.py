"""Which version do the tables of a database have, and how do they become what this code wants?"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect

from perennial.store import tables

if TYPE_CHECKING:
    from alembic.config import Config

VERSION_TABLE = "perennial_version"
MIGRATIONS = Path(__file__).parent / "migrations"


def version(connection: Connection) -> int:
    """Number of the newest change that the tables have seen; 0 where there are none."""
    if connection.dialect.name == "sqlite":
        return int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if connection.exec_driver_sql(f"SELECT to_regclass('{VERSION_TABLE}')").scalar() is None:
        return 0
    found = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalar()
    return int(found or 0)


def is_current(connection: Connection) -> bool:
    """May this code use the tables? Newer ones it may: a change only ever adds."""
    return version(connection) >= tables.SCHEMA


def upgrade(connection: Connection) -> None:
    """Change the tables step by step to the newest version, in the caller's transaction."""
    from alembic import command  # noqa: PLC0415  only who changes tables waits for it

    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = _config(connection)
    before = version(connection)
    if before and not inspect(connection).has_table(VERSION_TABLE):
        # A database of one machine that was made before Alembic wrote down what it did.
        command.stamp(config, f"{before:04d}")
    command.upgrade(config, "head")
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA user_version={tables.SCHEMA}")


def _config(connection: Connection) -> "Config":
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
