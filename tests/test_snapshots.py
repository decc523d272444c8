"""A snapshot stands beside its record and can be tracked by DVC; no row of the source is lost."""

import json
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from perennial.data import snapshots
from perennial.errors import RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import ingest
from perennial.store import files
from perennial.store.engine import make_engine

NOW = datetime(2020, 3, 1, tzinfo=UTC)
START = datetime(2020, 1, 1, tzinfo=UTC)
PASSWORD = "hunter" + "2"


def project(**changes: object) -> Project:
    given = {
        "name": "days",
        "kind": "table",
        "source": {"path": "days.csv"},
        "time": {"column": "day"},
        "label": {"column": "up", "known_after": "5d"},
        "features": [{"name": "x", "type": "number"}],
    }
    return Project.model_validate(given | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    days = pd.date_range("2020-01-01", periods=30, freq="D").strftime("%Y-%m-%d")
    rows = pd.DataFrame({"day": days, "x": range(30), "up": [0, 1] * 15})
    rows.to_csv(tmp_path / "days.csv", index=False)
    return tmp_path


def take(
    settings: Settings,
    folder: Path,
    as_of: datetime | None = None,
    now: datetime = NOW,
    **more: Any,
) -> ingest.Snapshot:
    where = (settings, project(**more), folder, "", as_of, folder / "out")
    return ingest.ingest(*where, run="r1", trigger="e1", now=now)


def record(taken: ingest.Snapshot) -> dict[str, Any]:
    return dict(json.loads(taken.path.with_suffix(".json").read_text()))


def test_its_record_says_what_it_holds_and_where_that_is_from(settings: Settings, folder: Path):
    taken = take(settings, folder, START + timedelta(days=20))

    told = record(taken)
    source = told.pop("source")
    path = folder / "days.csv"
    assert told == {
        "digest": taken.digest,
        "schema": [
            {"name": "row_id", "type": "int64"},
            {"name": "event_time", "type": "timestamp[us, tz=UTC]"},
            {"name": "label", "type": "double"},
            {"name": "label_known_at", "type": "timestamp[us, tz=UTC]"},
            {"name": "x", "type": "double"},
        ],
        "rows": 20,
        "rows_read": 30,
        "rows_later_than_as_of": 10,
        "rows_in_future": 0,
        "position": "2020-01-20T00:00:00+00:00",
        "as_of": "2020-01-21T00:00:00+00:00",
        "taken_at": "2020-03-01T00:00:00+00:00",
    }
    assert source == {
        "kind": "files",
        "told": "days.csv",
        "parts": [
            {
                "name": str(path),
                "rows": 30,
                "bytes": path.stat().st_size,
                "sha256": files.digest_file(path).removeprefix("sha256:"),
            }
        ],
    }


def test_the_ledger_says_how_many_rows_were_read_and_left_for_later(
    settings: Settings, folder: Path
):
    take(settings, folder, START + timedelta(days=20))

    engine = make_engine(settings.state("days").url)
    (entry,) = Ledger(engine).entries("days", "run.started")
    engine.dispose()
    assert [entry.body[k] for k in ("rows", "rows_read", "rows_later")] == [20, 30, 10]


def test_values_that_are_no_number_are_counted_with_one_of_them(settings: Settings, folder: Path):
    days = pd.date_range("2020-01-01", periods=600, freq="h").strftime("%Y-%m-%d %H:%M")
    rows = pd.DataFrame({"day": days, "x": range(600), "y": range(600), "up": [0, 1] * 300})
    features = [{"name": "x", "type": "number"}, {"name": "y", "type": "number"}]
    rows.assign(x=rows["x"].astype(object).mask(rows.index < 3, None)).to_csv(folder / "days.csv")
    blank = take(settings, folder, features=features)
    odd = rows.assign(x=rows["x"].astype(str))
    odd.loc[[0, 1, 2], "x"] = ["12,5", "7 %", "none" * 100]
    odd.to_csv(folder / "days.csv")

    taken = take(settings, folder, features=features, name="odd")

    engine = make_engine(settings.state("odd").url)
    (entry,) = Ledger(engine).entries("odd", "run.started")
    engine.dispose()
    assert entry.body["unreadable"] == {"x": {"rows": 3, "example": "12,5"}}
    assert record(taken)["unreadable"] == entry.body["unreadable"]
    # They are missing, no more and no less.
    assert taken.digest == blank.digest
    assert "unreadable" not in record(blank)


def test_a_record_tells_no_password(settings: Settings, folder: Path, monkeypatch):
    import sqlite3

    with sqlite3.connect(folder / "days.db") as connection:
        pd.read_csv(folder / "days.csv").to_sql("days", connection)
    connection.close()
    url = f"sqlite:///days.db?password={PASSWORD}"
    mine = settings.model_copy(update={"source_url": url})

    taken = take(mine, folder, source={"query": "SELECT * FROM days ORDER BY 1"})

    text = taken.path.with_suffix(".json").read_text()
    assert record(taken)["source"]["kind"] == "query"
    assert record(taken)["source"]["parts"] == [{"name": "source.query", "rows": 30, "bytes": 0}]
    assert PASSWORD not in text


def test_what_is_taken_again_keeps_its_first_record(settings: Settings, folder: Path):
    first = take(settings, folder)
    told = record(first)

    again = take(settings, folder, now=NOW + timedelta(days=1))

    assert again.digest == first.digest
    assert record(again) == told


def test_a_record_that_is_missing_is_written(settings: Settings, folder: Path):
    taken = take(settings, folder)
    taken.path.with_suffix(".json").unlink()

    take(settings, folder)

    assert record(taken)["digest"] == taken.digest


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: data[:-9], id="a file that broke off"),
        pytest.param(lambda data: bytes([data[0] ^ 1]) + data[1:], id="a bit that turned"),
        pytest.param(lambda data: b"", id="an empty file"),
    ],
)
def test_what_only_has_the_name_of_a_snapshot_is_replaced(settings: Settings, folder: Path, spoil):
    taken = take(settings, folder)
    good = taken.path.read_bytes()
    taken.path.write_bytes(spoil(good))

    again = take(settings, folder)

    assert again.path == taken.path
    assert taken.path.read_bytes() == (folder / "out").read_bytes() == good


def test_rows_in_the_future_stop_a_run_that_takes_all(settings: Settings, folder: Path):
    with pytest.raises(
        RunFailed, match="5 of 30 rows lie in the future by day, such as 2020-01-30"
    ):
        take(settings, folder, now=START + timedelta(days=24))

    assert not settings.state("days").snapshots.exists()


def test_rows_in_the_future_are_later_for_a_run_that_says_as_of_when(
    settings: Settings, folder: Path
):
    moment = START + timedelta(days=24)

    told = record(take(settings, folder, moment, now=moment))

    assert (told["rows"], told["rows_later_than_as_of"], told["rows_in_future"]) == (24, 6, 5)


def test_rows_in_the_future_by_their_order_are_told_as_such(settings: Settings, folder: Path):
    ahead = {"row_order": {"start": "2020-02-20", "step": "1d"}}

    with pytest.raises(RunFailed, match="20 of 30 rows lie in the future by time.row_order"):
        take(settings, folder, now=START + timedelta(days=59), time=ahead)


def test_counts_that_do_not_add_up_keep_nothing(settings: Settings, folder: Path, monkeypatch):
    real = snapshots.write
    monkeypatch.setattr(
        snapshots, "write", lambda path, schema, batches: real(path, schema, batches) - 1
    )

    with pytest.raises(RunFailed, match="30 rows were read, but 29 are kept and 0 are later"):
        take(settings, folder)

    assert not settings.state("days").snapshots.exists()
    assert not (folder / "out").exists()


@pytest.mark.parametrize("size", [777, 65_536, 200_000])
def test_the_bytes_do_not_depend_on_the_batches(tmp_path: Path, size: int, monkeypatch):
    monkeypatch.setattr(snapshots, "ROW_GROUP", 60_000)
    count = 130_000
    rng = np.random.default_rng(0)
    texts = pa.array(rng.integers(0, 2**60, count).astype(str))
    table = pa.table({"a": rng.normal(size=count), "t": texts.cast(pa.string())})
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    snapshots.write(whole, table.schema, table.to_batches())
    snapshots.write(parts, table.schema, table.to_batches(size))

    assert whole.read_bytes() == parts.read_bytes()
    assert pq.ParquetFile(whole).metadata.num_row_groups == 3
    assert pq.read_table(whole).equals(table)


@pytest.fixture
def dvc(root: Path) -> Path:
    found = root / ".venv-dvc" / "bin" / "dvc"
    if not found.exists():
        pytest.skip("no DVC here: run 'make dvc'")
    return found


def test_dvc_tracks_and_restores_a_snapshot(
    settings: Settings, folder: Path, dvc: Path, monkeypatch
):
    taken = take(settings, folder)
    ours = taken.path.with_name(f"{taken.path.name}.dvc")
    mine = ours.read_text()
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(folder / "config"))

    def run(*command: str) -> str:
        done = subprocess.run(
            [dvc, *command], cwd=taken.path.parent, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("init", "--no-scm", "-q")
    ours.unlink()
    run("add", "-q", taken.path.name)
    assert ours.read_text() == mine
    taken.path.unlink()
    ours.write_text(mine)
    run("checkout", "-q")

    assert files.digest_file(taken.path) == taken.digest
    shutil.rmtree(taken.path.parent / ".dvc")
