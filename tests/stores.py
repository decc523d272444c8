"""Stores that tests ask for: SQLite and folders always, PostgreSQL and S3 where they are named."""

import os
import secrets
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import Engine
from sqlalchemy.engine import make_url

from perennial.store import tenant
from perennial.store.engine import make_engine, open_engine
from perennial.store.migrate import migrate

POSTGRES = os.environ.get("PERENNIAL_TEST_POSTGRES", "")
NO_POSTGRES = "no PostgreSQL: set PERENNIAL_TEST_POSTGRES, as 'stores up' prints it"
S3 = os.environ.get("PERENNIAL_TEST_S3", "")
NO_S3 = "no S3 store: set PERENNIAL_TEST_S3, as 'stores up' prints it"


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """A bucket of this test session's own."""
    if not S3:
        pytest.skip(NO_S3)
    from pyarrow import fs

    store = fs.S3FileSystem(endpoint_override=S3, allow_bucket_creation=True)
    bucket = f"test-{secrets.token_hex(6)}"
    store.create_dir(bucket)
    yield bucket


@pytest.fixture
def s3(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in a bucket that only this test uses, with the address set as pods have it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", S3)
    return f"s3://{s3_bucket}/{secrets.token_hex(4)}"


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.stores)])
def place(request: pytest.FixtureRequest) -> str:
    """The URI of an empty folder, once on this disk and once in an object store."""
    if request.param == "s3":
        return str(request.getfixturevalue("s3"))
    return str(request.getfixturevalue("tmp_path").as_uri() + "/artifacts")


class Postgres:
    """A database of this test session's own, with one tenant whose tables are made anew."""

    def __init__(self, server: str) -> None:
        self.name = f"test_{secrets.token_hex(6)}"
        self._server = server
        self.roles: set[str] = set()
        self.run(f"CREATE DATABASE {self.name}", at=server)
        self.admin_url = make_url(server).set(database=self.name).render_as_string(False)

    def run(self, *statements: str, at: str = "") -> None:
        """Run statements as the administrator."""
        with psycopg.connect(at or self.admin_url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement)

    def tenant(self, name: str = "tenant") -> str:
        """URL of a tenant of this session with empty schemas."""
        role = f"{self.name}-{name}"
        self.run(*[f'DROP SCHEMA IF EXISTS "{s}" CASCADE' for s in (role, f"{role}_mlflow")])
        tenant.make(self.admin_url, role, f"secret of {role}")
        self.roles.add(role)
        return tenant.state_url(self.admin_url, role, f"secret of {role}")

    def migrated(self, name: str = "tenant") -> str:
        """URL of a tenant with empty tables of the newest version."""
        url = self.tenant(name)
        engine = open_engine(url)
        migrate(engine)
        engine.dispose()
        return url

    def tracking_uri(self, name: str = "tenant") -> str:
        """Where MLflow of that tenant keeps its tables."""
        role = f"{self.name}-{name}"
        return tenant.tracking_uri(self.admin_url, role, f"secret of {role}")

    def close(self) -> None:
        """Leave nothing on the server."""
        self.run(
            f"DROP DATABASE {self.name} WITH (FORCE)",
            *[f'DROP ROLE "{role}"' for role in self.roles],
            at=self._server,
        )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A database on the PostgreSQL that PERENNIAL_TEST_POSTGRES names."""
    if not POSTGRES:
        pytest.skip(NO_POSTGRES)
    found = Postgres(POSTGRES)
    yield found
    found.close()


@pytest.fixture
def tenant_url(postgres: Postgres) -> str:
    """A tenant with empty tables of the newest version."""
    return postgres.migrated()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.stores)])
def database_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty state database, once of each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("tenant_url"))
    return f"sqlite:///{request.getfixturevalue('tmp_path')}/state.db"


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An empty state database, once of each kind."""
    found = make_engine(database_url)
    yield found
    found.dispose()
