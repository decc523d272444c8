"""A snapshot holds what was known at one moment, and its digest names what it holds."""

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from perennial.data import snapshots
from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import ingest
from perennial.store import files
from perennial.store.engine import make_engine

NOW = datetime(2026, 1, 1, tzinfo=UTC)
START = datetime(2020, 1, 1, tzinfo=UTC)


def table(**changes: object) -> Project:
    given = {
        "name": "days",
        "kind": "table",
        "source": {"path": "days.csv"},
        "time": {"column": "day"},
        "label": {"column": "up", "known_after": "5d"},
        "features": [{"name": "x", "type": "number"}],
    }
    return Project.model_validate(given | changes)


def shop() -> Project:
    simulator = {"seed": 1, "days": 60, "customers": 50, "start": START.isoformat()}
    return table(
        name="shop",
        kind="transactions",
        source={"simulator": simulator},
        time={"column": "InvoiceDate"},
        label={"known_after": "60d"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    days = pd.date_range("2020-01-01", periods=30, freq="D").strftime("%Y-%m-%d")
    rows = pd.DataFrame({"day": days, "x": range(30), "up": [0, 1] * 15})
    rows.to_csv(tmp_path / "days.csv", index=False)
    return tmp_path


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def take(
    settings: Settings, folder: Path, as_of: datetime | None, project: Project | None = None
) -> tuple[ingest.Snapshot, pd.DataFrame]:
    out = folder / "out" / "snapshot"
    found = ingest.ingest(
        settings, project or table(), folder, "", as_of, out, run="r1", trigger="e1", now=NOW
    )
    return found, pd.read_parquet(out)


def test_the_same_source_gives_the_same_digest(settings: Settings, folder: Path):
    first, _ = take(settings, folder, None)
    second, _ = take(settings, folder, None)

    assert first.digest == second.digest
    assert first.digest == files.digest_file(first.path)
    assert first.path.stem == first.digest.removeprefix("sha256:")


def test_one_changed_value_gives_another_digest(settings: Settings, folder: Path):
    first, _ = take(settings, folder, None)
    path = folder / "days.csv"
    path.write_text(path.read_text().replace("2020-01-30,29", "2020-01-30,30"))

    assert take(settings, folder, None)[0].digest != first.digest


def test_rows_at_and_after_the_moment_are_absent(settings: Settings, folder: Path):
    taken, rows = take(settings, folder, START + timedelta(days=20))

    assert taken.rows == len(rows) == 20
    assert rows["event_time"].max() == START + timedelta(days=19)


def test_a_label_that_was_not_known_by_then_is_blank(settings: Settings, folder: Path):
    _, rows = take(settings, folder, START + timedelta(days=20))

    known = rows["event_time"] + timedelta(days=5) <= START + timedelta(days=20)
    assert known.sum() == 16
    assert (rows["label"].notna() == known).all()


def test_without_a_moment_every_row_is_there(settings: Settings, folder: Path):
    taken, rows = take(settings, folder, None)

    assert len(rows) == 30
    assert taken.as_of > rows["event_time"].max()


def test_purchases_are_kept_raw(settings: Settings, folder: Path):
    moment = START + timedelta(days=30)

    _, rows = take(settings, folder, moment, shop())

    assert {"InvoiceNo", "CustomerID", "UnitPrice"} < set(rows.columns)
    assert rows["InvoiceDate"].max() < moment


def test_a_moment_before_all_rows_is_told(settings: Settings, folder: Path):
    with pytest.raises(RunFailed, match="no row before 2019-01-01"):
        take(settings, folder, datetime(2019, 1, 1, tzinfo=UTC))


def test_a_source_that_is_refused_leaves_nothing_behind(settings: Settings, folder: Path):
    (folder / "days.csv").write_text("day,x\n2020-01-01,1\n")

    with pytest.raises(BadInput, match="no column up"):
        take(settings, folder, None)

    assert not (folder / "out").exists()
    assert files_below(settings.state("days").root) == []


@pytest.mark.parametrize("written", range(4), ids=["snapshot", "record", "DVC's file", "copy"])
def test_a_write_that_breaks_off_leaves_no_half_file(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, written: int
):
    synced, real = [], os.fsync

    def fsync(handle: int) -> None:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return real(handle)
        synced.append(handle)
        if len(synced) > written:
            raise OSError("no space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(OSError, match="no space"):
        take(settings, folder, None)

    assert not (folder / "out" / "snapshot").exists()
    kept = list(settings.state("days").snapshots.glob("*.parquet"))
    assert len(kept) == (written == 3)
    assert all(files.digest_file(p).endswith(p.stem) for p in kept)
    assert not (settings.state("days").root / "state.db").exists(), "the run counts as started"


def test_the_record_lies_where_every_pod_sees_it(settings: Settings, folder: Path, monkeypatch):
    monkeypatch.setenv("PERENNIAL_ARTIFACTS", (folder / "shared").as_uri())

    taken, _ = take(Settings.load(), folder, None)

    (record,) = (folder / "shared").rglob("snapshots/*.json")
    assert json.loads(record.read_text())["digest"] == taken.digest
    assert record.read_bytes() == snapshots.record_of(taken.path).read_bytes()


def test_a_copy_of_a_run_that_an_event_brought_stands_as_by_hand(settings: Settings, folder: Path):
    engine = make_engine(settings.state("days").url)
    ledger = Ledger(engine)

    def tell(kind: str, subject: str, **body: str) -> None:
        ledger.append(kind, project="days", subject=subject, body=body, now=NOW)

    tell("decision", "e1", event_id="e1")
    tell("run.started", "r0", run="r0", trigger="e1")
    tell("run.finished", "r0", run="r0", state="lost", reason="")
    take(settings, folder, None)
    tell("run.finished", "r0", run="r0", state="succeeded", reason="")
    take(settings, folder, None)

    told = [e.body["trigger"] for e in ledger.entries("days", "run.started")]
    engine.dispose()
    assert told == ["e1", "e1", "by hand, as for e1"]


def test_the_ledger_says_what_the_run_began_with(settings: Settings, folder: Path):
    taken, _ = take(settings, folder, START + timedelta(days=20))

    engine = make_engine(settings.state("days").url)
    (entry,) = Ledger(engine).entries("days", "run.started")
    engine.dispose()
    assert entry.subject == "r1"
    assert entry.body["data_digest"] == taken.digest
    assert (entry.body["rows"], entry.body["trigger"]) == (20, "e1")
    assert entry.body["as_of"] == "2020-01-21T00:00:00+00:00"
