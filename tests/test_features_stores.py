"""Where features lie is a matter of settings; passwords are neither shown nor open to others."""

import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from stores import Postgres

from perennial.data import simulator
from perennial.errors import BadInput, Unavailable
from perennial.features import config, offline, online, parity, store, table
from perennial.project import Project, Simulator, load
from perennial.settings import Settings
from perennial.store import scratch

ROOT = Path(__file__).parents[1]
AS_OF = datetime(2011, 6, 6, tzinfo=UTC)
SECRET = "s3cret"


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(ROOT / "examples" / "retail")


@pytest.fixture(scope="module")
def purchases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("purchases") / "snapshot.parquet"
    simulator.simulate(Simulator(seed=5, days=200, customers=100)).to_parquet(
        path, coerce_timestamps="us"
    )
    return path


def built(settings: Settings, project: Project, snapshot: Path, to: Path) -> pd.DataFrame:
    """The feature table of a snapshot, and its newest features online."""
    with store.opened(settings, project) as found:
        with scratch.folder(found.folder) as near:
            made = table.draft(project, found, snapshot, AS_OF, near)
            table.publish(made.path, to)
        online.materialize(found, project)
    return pd.read_parquet(to)


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """A database of a role of its own, whose password has signs that a URL must write otherwise."""
    role, schema = f"{postgres.name}_f{secrets.token_hex(3)}", "features"
    postgres.run(
        f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}@/:?'",
        f"CREATE SCHEMA {schema} AUTHORIZATION {role}",
        f"GRANT CONNECT, CREATE ON DATABASE {postgres.name} TO {role}",
        f"GRANT CREATE, USAGE ON SCHEMA public TO {role}",
    )
    place = postgres.admin_url.split("@", 1)[1]
    yield f"postgresql://{role}:{SECRET}%40%2F%3A%3F@{place}"
    postgres.run(f"DROP OWNED BY {role} CASCADE", f"DROP ROLE {role}")


@pytest.mark.stores
def test_postgresql_joins_and_registers_what_duckdb_and_sqlite_do(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path, postgres_url: str
):
    wanted = built(settings, retail, purchases, tmp_path / "wanted.parquet")
    there = settings.model_copy(
        update={
            "home": tmp_path / "there",
            "features_registry": postgres_url,
            "features_offline": f"{postgres_url}?schema=features",
        }
    )

    found = built(there, retail, purchases, tmp_path / "found.parquet")

    pd.testing.assert_frame_equal(found, wanted, rtol=0.0, atol=1e-9)
    with store.opened(there, retail) as opened:
        report = parity.measure(opened, retail, 100, seed=0)
        assert [v.number for v in opened.versions()] == [0]
    assert (report.entities, report.mismatches) == (100, ())
    assert not (there.state("retail").feast / config.REGISTRY).exists()


@pytest.mark.stores
def test_a_tenant_whose_role_has_a_schema_needs_to_name_none(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path, postgres: Postgres
):
    url = postgres.tenant("features")
    there = settings.model_copy(update={"features_registry": url, "features_offline": url})

    found = built(there, retail, purchases, tmp_path / "found.parquet")

    with store.opened(there, retail) as opened:
        report = parity.measure(opened, retail, 100, seed=0)
    assert len(found) > 100
    assert (report.entities, report.mismatches) == (100, ())


@pytest.mark.stores
def test_rows_on_postgresql_are_replaced_as_a_whole(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path, postgres_url: str
):
    there = settings.model_copy(update={"features_offline": f"{postgres_url}?schema=features"})
    built(there, retail, purchases, tmp_path / "found.parquet")
    rows = there.state("retail").feast / store.ROWS
    broken = pd.read_parquet(rows).astype({"country": object})
    broken["country"] = "nul\x00s are no text to PostgreSQL"
    broken.to_parquet(rows, coerce_timestamps="us")

    with pytest.raises(Exception, match="NUL"):
        offline.upload(there, retail, rows)

    with store.opened(there, retail) as opened:
        keys = broken["customer_id"].head(3).tolist()
        moment = pd.Timestamp(broken["event_time"].max())
        joined = opened.join(pd.DataFrame({"customer_id": keys, table.MOMENT: moment}))
    assert joined.num_rows == 3


@pytest.mark.stores
def test_a_postgresql_that_refuses_is_told_without_the_password(
    settings: Settings, retail: Project, postgres_url: str
):
    wrong = postgres_url.replace(SECRET, f"{SECRET}wrong")
    there = settings.model_copy(update={"features_registry": wrong})

    with pytest.raises(Unavailable, match="a store of features does not answer") as told:
        store.Store(there, retail).apply()

    assert SECRET not in str(told.value)
    assert told.value.__cause__ is None


URLS = [
    pytest.param("features_online", f"http://a:{SECRET}@host/0", id="another kind"),
    pytest.param("features_online", f"redis://a:{SECRET}@host/x", id="a database with a name"),
    pytest.param("features_online", f"redis://a:{SECRET}@", id="no host"),
    pytest.param("features_online", f"redis://a:{SECRET}@host:port/0", id="a port with a name"),
    pytest.param("features_online", f"redis://a:{SECRET},x@host/0", id="a comma"),
    pytest.param("features_registry", f"mysql://a:{SECRET}@host/db", id="another registry"),
    pytest.param("features_offline", f"postgresql://a:{SECRET}@host", id="no database"),
    *(
        pytest.param(name, f"{kind}://a:p@{SECRET}{more}@host/0", id=f"{name} with @ and {more}")
        for name, kind in (
            ("features_online", "redis"),
            ("features_registry", "postgresql"),
            ("features_offline", "postgresql"),
        )
        for more in ("", "/", "?")
    ),
]


@pytest.mark.parametrize(("name", "url"), URLS)
def test_a_url_is_refused_without_being_quoted(
    settings: Settings, retail: Project, name: str, url: str
):
    with pytest.raises(BadInput, match=f"PERENNIAL_{name.upper()}") as told:
        config.feast(settings.model_copy(update={name: url}), retail)

    assert SECRET not in str(told.value)
    assert told.value.__cause__ is None


def connection(settings: Settings, retail: Project, url: str) -> dict[str, Any]:
    """What redis-py is told in the end."""
    from feast.infra.online_stores.redis import RedisOnlineStore

    told = config.feast(settings.model_copy(update={"features_online": url}), retail)
    nodes, options = RedisOnlineStore._parse_connection_string(
        told["online_store"]["connection_string"]
    )
    return {**nodes[0], **options}


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        pytest.param("redis://host", {"host": "host", "port": "6379", "db": 0}, id="a host"),
        pytest.param("redis://host:7/3", {"port": "7", "db": 3}, id="port and database"),
        pytest.param("rediss://host", {"ssl": True}, id="TLS"),
        pytest.param(
            "redis://me:p%40%3D%22w@host", {"username": "me", "password": 'p@="w'}, id="a user"
        ),
        pytest.param("redis://:0123@host", {"password": "0123"}, id="a password of digits"),
        pytest.param("redis://:true@host", {"password": "true"}, id="a password like a word"),
    ],
)
def test_redis_is_told(settings: Settings, retail: Project, url: str, wanted: dict[str, Any]):
    found = connection(settings, retail, url)

    assert wanted.items() <= found.items()


def test_feasts_own_file_is_readable_by_its_owner_only(settings: Settings, retail: Project):
    url = f"redis://me:{SECRET}@host:7/3"

    path = config.write(settings.model_copy(update={"features_online": url}), retail)

    assert path.stat().st_mode & 0o777 == 0o600
    assert yaml.safe_load(path.read_text())["project"] == "retail"


def test_a_url_is_shown_without_its_secrets():
    assert config.shown(f"redis://me:{SECRET}@host/3?x={SECRET}") == "redis://host:6379/3"
    assert config.shown("") == ""
