"""The same rows are the same snapshot, wherever they come from: files, an object store, SQL."""

import gzip
import sqlite3
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg
import pyarrow as pa
import pytest
from sqlalchemy.engine import make_url

from perennial.data import query, sources, staging
from perennial.errors import BadInput, Unavailable
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import ingest

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = 500
FRAME = pd.DataFrame(
    {
        "day": pd.date_range("2020-01-01", periods=ROWS // 2, freq="h").repeat(2)[::-1],
        "x": [i / 7 if i % 5 else None for i in range(ROWS)],
        "n": [i % 9 for i in range(ROWS)],
        "job": [None if i % 11 == 0 else f"clerk, {i % 3}%" for i in range(ROWS)],
        "up": [i % 2 for i in range(ROWS)],
        "unused": "secret",
    }
)
QUERY = "SELECT * FROM days ORDER BY place"


def project(**source: str) -> Project:
    return Project.model_validate(
        {
            "name": "days",
            "kind": "table",
            "source": source,
            "time": {"column": "day"},
            "label": {"column": "up", "known_after": "1d"},
            "features": [
                {"name": "x", "type": "number"},
                {"name": "n", "type": "category"},
                {"name": "job", "type": "category"},
            ],
        }
    )


def digest(settings: Settings, folder: Path, source: str = "", **own: str) -> str:
    taken = ingest.ingest(
        *(settings, project(**own), folder, source, None, folder / "out"),
        run="r",
        trigger="t",
        now=NOW,
    )
    return taken.digest


@pytest.fixture
def wanted(settings: Settings, tmp_path: Path) -> str:
    """Digest of the rows as one CSV."""
    FRAME.to_csv(tmp_path / "days.csv", index=False)
    return digest(settings, tmp_path, str(tmp_path / "days.csv"))


def parts(folder: Path) -> None:
    for i in range(4):
        part = FRAME.iloc[i * ROWS // 4 : (i + 1) * ROWS // 4]
        part.to_parquet(folder / f"part-{i}.parquet")
        part.to_csv(folder / f"part-{i}.csv.gz", index=False)


def sqlite(folder: Path) -> Path:
    path = folder / "days.db"
    with sqlite3.connect(path) as connection:
        FRAME.assign(day=FRAME["day"].astype(str)).to_sql(
            "days", connection, index_label="place", if_exists="replace"
        )
    connection.close()
    return path


def test_files_of_any_form(settings: Settings, tmp_path: Path, wanted: str):
    parts(tmp_path)
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "days.csv").read_bytes()))
    FRAME.to_parquet(tmp_path / "days.parquet", row_group_size=7)

    for name in ("packed", "days.parquet", "part-*.parquet", "part-*.csv.gz", "part-[0-3].*[!z]"):
        assert digest(settings, tmp_path, path=name) == wanted, name


def test_batches_of_any_size(settings: Settings, tmp_path: Path, wanted: str, monkeypatch):
    monkeypatch.setattr("perennial.data.delimited.BATCH", 3)
    monkeypatch.setattr("perennial.data.delimited._BLOCK", 200)
    monkeypatch.setattr("perennial.data.table.BATCH", 2048)
    FRAME.to_parquet(tmp_path / "days.parquet")

    for name in ("days.csv", "days.parquet"):
        assert digest(settings, tmp_path, path=name) == wanted, name


def test_a_table_of_sqlite(settings: Settings, tmp_path: Path, wanted: str):
    sqlite(tmp_path)

    assert digest(settings, tmp_path, url="sqlite:///days.db", query=QUERY) == wanted


@pytest.mark.stores
def test_a_folder_of_objects(settings: Settings, tmp_path: Path, s3: str, wanted: str):
    parts(tmp_path)
    put(tmp_path, s3, "part-*.parquet")

    assert digest(settings, tmp_path, f"{s3}/part-*.parquet") == wanted
    assert digest(settings, tmp_path, path=f"{s3}/part-?.parquet") == wanted


@pytest.mark.stores
def test_one_object_whose_name_looks_like_a_pattern(
    settings: Settings, tmp_path: Path, s3: str, wanted: str
):
    (tmp_path / "days [1].csv").write_bytes((tmp_path / "days.csv").read_bytes())
    put(tmp_path, s3, "days *.csv")

    assert digest(settings, tmp_path, f"{s3}/days [1].csv") == wanted


@pytest.mark.stores
def test_a_table_of_postgresql(settings: Settings, tmp_path: Path, postgres, wanted: str):
    fill(postgres.admin_url)
    mine = settings.model_copy(update={"source_url": postgres.admin_url})

    assert digest(mine, tmp_path, url="sqlite:///nowhere", query=QUERY) == wanted


@pytest.mark.stores
def test_a_percent_in_a_query_is_what_it_says(settings: Settings, tmp_path: Path, postgres):
    fill(postgres.admin_url)
    asked = "SELECT * FROM days WHERE job LIKE '%0\\%%' ORDER BY place"

    with query.answer(postgres.admin_url, asked, tmp_path) as answer:
        jobs = {job for batch in answer.batches for job in batch.column("job").to_pylist()}

    assert jobs == {"clerk, 0%"}


@pytest.mark.stores
@pytest.mark.parametrize(
    ("asked", "kind", "said"),
    [
        pytest.param("SELEC 1", BadInput, "source.query fails .* syntax error", id="is no SQL"),
        pytest.param("SELECT * FROM nowhere", BadInput, "does not exist", id="names no table"),
        pytest.param("DELETE FROM days", BadInput, "source.query fails", id="deletes"),
        pytest.param(
            "WITH d AS (DELETE FROM days RETURNING 1) SELECT * FROM d",
            BadInput,
            "source.query fails",
            id="deletes on the side",
        ),
        pytest.param("SELECT nextval('numbers')", BadInput, "read-only", id="counts on"),
        pytest.param("SELECT 1 AS a, 2 AS a", BadInput, "two columns of one name", id="is twice"),
    ],
)
def test_postgresql_refuses_a_query_that(
    tmp_path: Path, postgres, asked: str, kind: type[Exception], said: str
):
    fill(postgres.admin_url)

    with (
        pytest.raises(kind, match=said) as caught,
        query.answer(postgres.admin_url, asked, tmp_path) as answer,
    ):
        list(answer.batches)

    assert_silent(str(caught.value), postgres.admin_url)
    with psycopg.connect(driver(postgres.admin_url)) as connection:
        assert connection.execute("SELECT count(*) FROM days").fetchone() == (ROWS,)


@pytest.mark.stores
def test_an_answer_is_streamed(tmp_path: Path, postgres):
    fill(postgres.admin_url)
    many = "SELECT a.place FROM days a, days b, days c, days d"

    with query.answer(postgres.admin_url, many, tmp_path) as answer:
        first = next(answer.batches)

    assert len(first) == query.BATCH < ROWS**4


@pytest.mark.parametrize(
    ("url", "asked", "kind", "said"),
    [
        pytest.param("sqlite:///none.db", "SELECT 1", BadInput, "no SQLite file at", id="no file"),
        pytest.param("sqlite:///days.db", "SELEC 1", BadInput, "syntax error", id="no SQL"),
        pytest.param("sqlite:///days.db", "SELECT a FROM b", BadInput, "no such table", id="none"),
        pytest.param("sqlite:///days.db", "DELETE FROM days", BadInput, "readonly", id="writes"),
        pytest.param("what", "SELECT 1", BadInput, "no URL of a database", id="no URL"),
        pytest.param("oracle://u:secret@h/d", "SELECT 1", BadInput, "driver", id="no driver"),
        pytest.param(
            "postgresql://u:secret@127.0.0.1:1/d", "SELECT 1", Unavailable, "now", id="nobody there"
        ),
    ],
)
def test_one_sentence_says_what_is_wrong_with(
    tmp_path: Path, url: str, asked: str, kind: type[Exception], said: str
):
    sqlite(tmp_path)

    with pytest.raises(kind, match=said) as caught, query.answer(url, asked, tmp_path) as answer:
        list(answer.batches)

    assert_silent(str(caught.value), url)


@pytest.mark.parametrize("rest", ["hidden@h:1/d", "hidden/x@h:1/d", "hidden?x@h:1/d"])
def test_a_password_with_an_at_is_refused_and_no_piece_of_it_told(tmp_path: Path, rest: str):
    url = f"postgresql://u:p@{rest}"

    with (
        pytest.raises(BadInput, match="write @ : / . of a password as %40") as caught,
        query.answer(url, "SELECT 1", tmp_path),
    ):
        pass

    assert "hidden" not in "".join(traceback.format_exception(caught.value))


def test_a_query_without_a_database_is_told(tmp_path: Path):
    with pytest.raises(BadInput, match="set PERENNIAL_SOURCE_URL, or source.url without"):
        sources.read(project(query="SELECT 1"), None, tmp_path)


@pytest.mark.parametrize("twin", ["X", "Label"], ids=["two of the source", "one of ours"])
@pytest.mark.parametrize(
    ("own", "where"),
    [
        pytest.param({"path": "days.csv"}, r"days\.csv", id="a file"),
        pytest.param(
            {"url": "sqlite:///days.db", "query": "SELECT *, n AS {twin} FROM days"},
            r"source\.query",
            id="a query",
        ),
    ],
)
def test_columns_that_only_capitals_tell_apart_are_refused(
    settings: Settings, tmp_path: Path, own: dict[str, str], where: str, twin: str
):
    FRAME.assign(**{twin: FRAME["n"]}).to_csv(tmp_path / "days.csv", index=False)
    sqlite(tmp_path)
    found = project(**{key: value.replace("{twin}", twin) for key, value in own.items()})
    more = found.features[0].model_copy(update={"name": twin})
    both = found.model_copy(update={"features": (*found.features, more)})
    given = (tmp_path, "", None, tmp_path / "out")

    with pytest.raises(
        BadInput, match=rf"{where} would have .*: {twin.lower()} and {twin}; rename"
    ):
        ingest.ingest(settings, both, *given, run="r", trigger="t", now=NOW)

    # A twin that nobody wants does no harm.
    assert ingest.ingest(settings, found, *given, run="r", trigger="t", now=NOW).rows == ROWS


@pytest.mark.parametrize(
    "name",
    [
        *("quarantine_row", "quarantine_rules", "quarantine_digest", "quarantine_copy"),
        *("quarantine_was", "Quarantine_Row", "file_row_number", "FILE_row_number"),
        *("__rows", "__ROW", "__"),
    ],
)
def test_columns_with_a_name_of_our_own_are_refused(settings: Settings, tmp_path: Path, name: str):
    FRAME.assign(**{name: FRAME["n"]}).to_csv(tmp_path / "days.csv", index=False)
    found = project(path="days.csv")
    more = found.features[0].model_copy(update={"name": name})
    wants = found.model_copy(update={"features": (*found.features, more)})
    given = (tmp_path, "", None, tmp_path / "out")

    with pytest.raises(BadInput, match=rf"days\.csv has a column {name}, .* taken: .*; rename it"):
        ingest.ingest(settings, wants, *given, run="r", trigger="t", now=NOW)

    # One that nobody wants does no harm.
    assert ingest.ingest(settings, found, *given, run="r", trigger="t", now=NOW).rows == ROWS


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        pytest.param([1, 2.5, None], pa.float64(), id="numbers"),
        pytest.param([1, "a", None], pa.string(), id="anything"),
        pytest.param([2**70, 1], pa.string(), id="numbers beyond 64 bits"),
        pytest.param([datetime(2020, 1, 1), None], pa.timestamp("us"), id="times"),
    ],
)
def test_values_of_a_query_become(values: list[Any], kind: pa.DataType):
    assert query.array(values).type == kind


def test_types_of_a_query_may_change_on_the_way(tmp_path: Path):
    found = staging.Staging(tmp_path, staging.Wanted())
    chunks = [[None, None], [1, 2], [None, None], [2.5, 3], ["x", None]]
    batches = [pa.RecordBatch.from_arrays([query.array(c)], names=["a"]) for c in chunks]

    found.add("q", ["a"], iter(batches))

    assert (found.rows, len(found.files)) == (10, 4)


@pytest.mark.stores
@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        pytest.param({}, BadInput, "nothing lies at s3://", id="an empty pattern"),
        pytest.param({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, Unavailable, "now", id="no store"),
    ],
)
def test_an_object_store_tells(tmp_path: Path, s3: str, monkeypatch, change, kind, said):
    for key, value in change.items():
        monkeypatch.setenv(key, value)

    with pytest.raises(kind, match=said) as caught:
        sources.read(project(), f"{s3}/*.csv", tmp_path)

    assert "AKIA" not in str(caught.value)


def put(folder: Path, uri: str, pattern: str) -> None:
    from s3fs import S3FileSystem

    store = S3FileSystem(skip_instance_cache=True)
    for path in folder.glob(pattern):
        store.pipe_file(f"{uri}/{path.name}", path.read_bytes())


def driver(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def fill(url: str) -> None:
    with psycopg.connect(driver(url)) as connection:
        connection.execute("CREATE SEQUENCE IF NOT EXISTS numbers")
        connection.execute("DROP TABLE IF EXISTS days")
        connection.execute(
            "CREATE TABLE days (place int, day timestamp, x double precision, n smallint,"
            " job text, up numeric, unused text)"
        )
        copy = "COPY days FROM STDIN"
        with connection.cursor().copy(copy) as rows:
            for i, row in enumerate(FRAME.astype(object).itertuples(index=False)):
                rows.write_row([i, *(None if pd.isna(v) else v for v in row)])


def assert_silent(told: str, url: str) -> None:
    """No message quotes a password."""
    password = make_url(url).password if "://" in url else None
    assert password is None or str(password) not in told.replace("postgresql at", "")
