"""Who may keep state in a PostgreSQL: one role a tenant, with schemas that nobody else can enter.

``python -m perennial.store.tenant NAME --password-file FILE`` makes the role and its two schemas,
for perennial's tables and for MLflow's, or brings them to the same rights again.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql
from sqlalchemy import URL
from sqlalchemy.engine import make_url

from perennial.errors import BadInput, Unavailable
from perennial.store.engine import POSTGRES, open_engine
from perennial.store.migrate import WAIT_S, await_database, told

# What is left of the server's connections is for the other tenants.
CONNECTIONS = 45

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,50}")
_CONNECT_S = 10

_ROLE = (
    "LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOREPLICATION NOBYPASSRLS"
    " CONNECTION LIMIT {limit} PASSWORD {password}"
)
_RIGHTS = (
    "REVOKE ALL ON DATABASE {database} FROM PUBLIC",
    "REVOKE ALL ON SCHEMA public FROM PUBLIC",
    "GRANT CONNECT ON DATABASE {database} TO {role}",
    "CREATE SCHEMA IF NOT EXISTS {role} AUTHORIZATION {role}",
    "CREATE SCHEMA IF NOT EXISTS {mlflow} AUTHORIZATION {role}",
    "ALTER ROLE {role} SET search_path = {role}",
    # A pod that died in the midst of writing must not keep the others waiting.
    "ALTER ROLE {role} SET idle_in_transaction_session_timeout = '60s'",
)


def make(admin_url: str, name: str, password: str) -> None:
    """Make a tenant, or bring what is there to the same rights and this password."""
    if not _NAME.fullmatch(name) or name.startswith("pg_"):
        raise BadInput(f"a tenant cannot be called {name!r}, wanted such as team-a")
    if not password:
        raise BadInput(f"the password of {name} is empty")
    try:
        with _connected(make_url(admin_url)) as connection:
            _make(connection, name, password)
    except psycopg.OperationalError as exc:
        raise Unavailable(f"PostgreSQL does not answer: {_line(exc)}") from exc
    except psycopg.Error as exc:
        raise BadInput(f"tenant {name} cannot be made: {_line(exc)}") from exc


def state_url(admin_url: str, name: str, password: str) -> str:
    """What a tenant's PERENNIAL_STATE_URL is."""
    return _told(_of(admin_url, name, password))


def tracking_uri(admin_url: str, name: str, password: str) -> str:
    """What a tenant's PERENNIAL_TRACKING_URI is: MLflow's tables have a schema of their own."""
    options = quote(f'-csearch_path="{mlflow_schema(name)}"')
    return f"{state_url(admin_url, name, password)}?options={options}"


def mlflow_schema(name: str) -> str:
    """The schema in which MLflow keeps a tenant's runs and models."""
    return f"{name}_mlflow"


def _make(connection: "psycopg.Connection", name: str, password: str) -> None:
    row = connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [name]).fetchone()
    if row and row[0]:
        raise BadInput(f"{name} is an administrator of this PostgreSQL, and so no tenant")
    verb = "ALTER" if row else "CREATE"
    # Only the hash goes over the wire and, where statements are logged, into the log.
    sealed = connection.pgconn.encrypt_password(
        password.encode(), name.encode(), b"scram-sha-256"
    ).decode()
    words = {
        "role": sql.Identifier(name),
        "mlflow": sql.Identifier(mlflow_schema(name)),
        "database": sql.Identifier(connection.info.dbname),
        "limit": sql.Literal(CONNECTIONS),
        "password": sql.Literal(sealed),
    }
    for statement in (f"{verb} ROLE {{role}} {_ROLE}", *_RIGHTS):
        connection.execute(sql.SQL(statement).format(**words))


def _of(admin_url: str, name: str, password: str) -> URL:
    return make_url(admin_url).set(drivername=POSTGRES, username=name, password=password)


def _told(url: URL) -> str:
    return url.render_as_string(hide_password=False)


def _connected(url: URL) -> "psycopg.Connection":
    words: dict[str, Any] = url.translate_connect_args(database="dbname", username="user")
    return psycopg.connect(**{"connect_timeout": _CONNECT_S, **words, **url.query})


def _line(exc: Exception) -> str:
    return " ".join(str(exc).split())


def main() -> int:
    """Make one tenant on the PostgreSQL that PERENNIAL_STATE_URL names, as its administrator."""
    parser = argparse.ArgumentParser(prog="python -m perennial.store.tenant")
    parser.add_argument("name", help="name of the role and of its schema")
    parser.add_argument("--password-file", type=Path, required=True, help="file with its password")
    asked = parser.parse_args()
    return told("perennial.store.tenant", partial(_made, asked.name, asked.password_file))


def _made(name: str, password_file: Path, url: str) -> str:
    try:
        password = password_file.read_text(encoding="utf-8").strip()
    except OSError as exc:
        raise BadInput(f"{password_file}: {exc.strerror}") from exc
    await_database(open_engine(url), WAIT_S)
    make(url, name, password)
    return f"tenant {name} has the schemas {name} and {mlflow_schema(name)}"


if __name__ == "__main__":
    sys.exit(main())
