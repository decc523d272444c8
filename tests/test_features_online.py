"""What is online is what training saw, is written once, and survives kills and full disks."""

import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import forks
import numpy as np
import pandas as pd
import pytest
import redis
import redis_server
from redis.connection import Connection

from perennial.data import simulator
from perennial.errors import RunFailed, Unavailable
from perennial.features import known, online, parity, store, table
from perennial.project import Project, Simulator, load
from perennial.settings import Settings
from perennial.store import scratch

ROOT = Path(__file__).parents[1]
AS_OF = datetime(2011, 12, 12, tzinfo=UTC)
EARLIER = datetime(2011, 5, 2, tzinfo=UTC)
LATER = datetime(2011, 6, 6, tzinfo=UTC)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)
POINTS = 20


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(ROOT / "examples" / "retail")


@pytest.fixture(scope="module")
def purchases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of invented purchases."""
    path = tmp_path_factory.mktemp("purchases") / "snapshot.parquet"
    simulator.simulate(Simulator(seed=5, days=200, customers=150)).to_parquet(
        path, coerce_timestamps="us"
    )
    return path


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server.running() as url:
        yield url


def offline(settings: Settings, project: Project, snapshot: Path, as_of: datetime) -> None:
    """Make the rows that features are looked up from, as the step does."""
    with store.opened(settings, project) as found, scratch.folder(found.folder) as near:
        table.draft(project, found, snapshot, as_of, near)


def materialize(settings: Settings, project: Project) -> online.Materialized:
    with store.opened(settings, project) as found:
        return online.materialize(found, project)


def measured(settings: Settings, project: Project, entities: int = 1000) -> parity.Report:
    with store.opened(settings, project) as found:
        return parity.measure(found, project, entities, seed=7)


def online_rows(settings: Settings, project: Project) -> pd.DataFrame:
    """All rows of the SQLite store, as it keeps them."""
    path = settings.state(project.name).feast / "online.sqlite"
    with sqlite3.connect(path) as connection:
        rows = pd.read_sql(
            "select hex(entity_key) as key, feature_name, hex(value) as value, event_ts"
            " from retail_customer_purchases order by 1, 2",
            connection,
        )
    connection.close()
    return rows


@pytest.fixture(scope="module")
def real(data_folder: Path, retail: Project, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """The public file's features, made once."""
    settings = Settings(home=tmp_path_factory.mktemp("real"))
    offline(settings, retail, data_folder / "online_retail.parquet", AS_OF)
    return settings


@pytest.mark.parametrize("place", ["sqlite", "redis"])
def test_a_thousand_customers_have_the_same_features_online_and_offline(
    real: Settings, retail: Project, redis_url: str, place: str
):
    settings = real.model_copy(update={"features_online": redis_url if place == "redis" else ""})

    done = materialize(settings, retail)
    report = measured(settings, retail)

    assert done.written == done.rows > 2000
    assert report.entities == 1000
    assert report.mismatches == ()
    assert {r.feature for r in report.rows} >= set(retail.feature_names)
    assert all(r.values + r.missing == 1000 for r in report.rows)


@pytest.mark.parametrize("place", ["sqlite", "redis"])
def test_a_value_that_differs_online_is_named(
    real: Settings, retail: Project, redis_url: str, tmp_path: Path, place: str
):
    shutil.copytree(real.home / "retail", tmp_path / "retail")
    url = redis_url.removesuffix("/0") + "/1" if place == "redis" else ""
    settings = Settings(home=tmp_path, features_online=url)
    with store.opened(settings, retail) as found:
        found.apply()
        moment = online.materialize(found, retail).moment
        customer = 12347
        row = found.read([customer], moment).assign(event_time=moment)
        row["spend"] = row["spend"].astype(float) + 1e-6
        row["recency_days"] = None
        found.write(row)
        report = parity.measure(found, retail, 5000, seed=1)

    told = [m.sentence for m in report.mismatches]
    assert [m.feature for m in report.mismatches] == ["recency_days", "spend"]
    assert all(m.entity == customer for m in report.mismatches)
    assert told[0].startswith("recency_days of 12347 is None online, ")


def test_files_that_a_step_needs_stay_while_another_process_looks_features_up(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER)
    folder = settings.state("retail").feast
    with store.opened(settings, retail) as found, scratch.folder(found.folder) as near:
        needed = near / "examples.parquet"
        needed.write_text("half")

        materialize(settings, retail)
        measured(settings, retail)

        assert needed.read_text() == "half"
        assert [path for path in folder.iterdir() if path.is_dir()] == [near]
    assert [path for path in folder.iterdir() if path.is_dir()] == []


def test_a_library_that_reads_timestamps_of_sqlite_its_own_way_changes_nothing(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, AS_OF)
    first = materialize(settings, retail)
    sqlite3.register_converter("timestamp", lambda v: datetime.fromisoformat(v.decode()))

    again = materialize(settings, retail)

    assert first.written > 0 and again.written == 0


def test_doing_it_twice_writes_nothing_the_second_time(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER)
    first = materialize(settings, retail)
    before = online_rows(settings, retail)

    second = materialize(settings, retail)

    assert first.written == first.rows > 0
    assert second == replace(first, written=0)
    pd.testing.assert_frame_equal(online_rows(settings, retail), before)


def test_only_rows_newer_than_the_mark_are_written(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER - timedelta(days=7))
    first = materialize(settings, retail)
    offline(settings, retail, purchases, LATER)

    second = materialize(settings, retail)

    newest = pd.read_parquet(settings.state("retail").feast / store.ROWS)
    assert second.moment == first.moment + timedelta(days=7)
    assert second.written == (newest["event_time"] == second.moment).sum() < second.rows
    assert measured(settings, retail).mismatches == ()


def test_rows_that_were_mended_are_written_again(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path
):
    offline(settings, retail, purchases, LATER)
    materialize(settings, retail)
    mended = pd.read_parquet(purchases)
    mended["UnitPrice"] *= 1.5
    mended.to_parquet(tmp_path / "mended.parquet", coerce_timestamps="us")
    offline(settings, retail, tmp_path / "mended.parquet", LATER)

    done = materialize(settings, retail)

    assert done.written == done.rows
    assert measured(settings, retail).mismatches == ()


def test_mended_rows_take_the_place_of_those_in_redis(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path, redis_url: str
):
    url = redis_url.removesuffix("/0") + "/2"
    settings = settings.model_copy(update={"features_online": url})
    offline(settings, retail, purchases, LATER)
    materialize(settings, retail)
    mended = pd.read_parquet(purchases)
    mended["UnitPrice"] *= 1.5
    mended.to_parquet(tmp_path / "mended.parquet", coerce_timestamps="us")
    offline(settings, retail, tmp_path / "mended.parquet", LATER)

    materialize(settings, retail)

    assert measured(settings, retail).mismatches == ()


def test_a_run_about_the_past_takes_nothing_back(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER)
    newest = materialize(settings, retail)
    before = online_rows(settings, retail)
    offline(settings, retail, purchases, EARLIER)

    done = materialize(settings, retail)

    assert (done.moment, done.written) == (newest.moment, 0)
    pd.testing.assert_frame_equal(online_rows(settings, retail), before)
    with pytest.raises(RunFailed, match="offline rows end at 2011-04-25"):
        measured(settings, retail)


def test_a_row_that_tells_nothing_any_more_is_missing_online_as_offline(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, EARLIER)
    done = materialize(settings, retail)
    with store.opened(settings, retail) as found:
        keys = pd.read_parquet(found.rows)["customer_id"].unique()[:5].tolist()

        late = found.read(keys, done.moment + found.ttl + timedelta(days=8))
        stranger = found.read([99], done.moment)

    assert late[list(retail.feature_names)].isna().all().all()
    assert stranger[list(retail.feature_names)].isna().all().all()
    assert late["customer_id"].tolist() == keys


def without(purchases: Path, to: Path, customer: int, since: datetime = LONG_AGO) -> Path:
    """The snapshot without what a customer bought since then."""
    rows = pd.read_parquet(purchases)
    rows[(rows["CustomerID"] != customer) | (rows["InvoiceDate"] < since)].to_parquet(
        to, coerce_timestamps="us"
    )
    return to


def fell_silent(purchases: Path, to: Path) -> tuple[int, Path]:
    """A customer, and a snapshot in which they buy nothing after the first days of the year."""
    rows = pd.read_parquet(purchases)
    rows = rows[rows["InvoiceDate"] < LATER].dropna(subset="CustomerID")
    first, last = (rows.groupby("CustomerID")["InvoiceDate"].agg(how) for how in ("min", "max"))
    is_told = (first >= datetime(2010, 12, 20, tzinfo=UTC)) & (last > LATER - timedelta(days=30))
    customer = int(first[is_told].idxmin())
    return customer, without(purchases, to, customer, first[customer] + timedelta(days=7))


def current_row(settings: Settings, project: Project) -> tuple[int, datetime]:
    """A customer who tells at the newest moment, and that moment."""
    rows = pd.read_parquet(settings.state(project.name).feast / store.ROWS)
    newest = rows["event_time"].max()
    customer = rows.loc[rows["event_time"] == newest, "customer_id"].min()
    return int(customer), newest.to_pydatetime()


def looked_up(settings: Settings, project: Project, customer: int) -> dict[str, Any]:
    """What is online of a customer, however old it is."""
    with store.opened(settings, project) as found:
        return dict(found.read([customer], LONG_AGO + found.ttl)[list(found.names)].iloc[0])


@pytest.mark.parametrize("place", ["sqlite", "redis"])
def test_an_entity_that_is_offline_no_more_is_told_by_parity_and_becomes_unknown(
    settings: Settings, retail: Project, purchases: Path, redis_url: str, tmp_path: Path, place: str
):
    url = redis_url.removesuffix("/0") + "/3" if place == "redis" else ""
    settings = settings.model_copy(update={"features_online": url})
    offline(settings, retail, purchases, LATER)
    first = materialize(settings, retail)
    customer, _ = current_row(settings, retail)
    offline(settings, retail, without(purchases, tmp_path / "fewer", customer), LATER)

    told = measured(settings, retail, entities=5).mismatches
    second = materialize(settings, retail)
    third = materialize(settings, retail)

    assert {m.entity for m in told} == {customer}
    assert {m.offline for m in told} == {None}
    assert second.rows == first.rows - 1
    assert third == replace(second, written=0)
    assert set(looked_up(settings, retail, customer).values()) == {None}
    assert measured(settings, retail).mismatches == ()


def test_an_entity_that_comes_back_is_known_again(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path
):
    offline(settings, retail, purchases, LATER)
    materialize(settings, retail)
    customer, _ = current_row(settings, retail)
    wanted = looked_up(settings, retail, customer)
    offline(settings, retail, without(purchases, tmp_path / "fewer", customer), LATER)
    materialize(settings, retail)
    offline(settings, retail, purchases, LATER)

    materialize(settings, retail)

    assert looked_up(settings, retail, customer) == wanted
    assert measured(settings, retail).mismatches == ()


def test_an_entity_whose_newest_rows_went_has_the_last_one_of_those_before(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path
):
    offline(settings, retail, purchases, LATER)
    materialize(settings, retail)
    customer, fewer = fell_silent(purchases, tmp_path / "fewer")
    offline(settings, retail, fewer, LATER)

    materialize(settings, retail)

    left = pd.read_parquet(settings.state("retail").feast / store.ROWS)
    wanted = left[left["customer_id"] == customer].sort_values("event_time").iloc[-1]
    assert wanted["event_time"] < LATER - timedelta(days=30)
    assert looked_up(settings, retail, customer)["spend"] == wanted["spend"]


def test_an_entity_that_only_fell_silent_stays_as_it_was(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path
):
    customer, silent = fell_silent(purchases, tmp_path / "silent")
    offline(settings, retail, silent, datetime(2011, 3, 14, tzinfo=UTC))
    materialize(settings, retail)
    before = looked_up(settings, retail, customer)
    offline(settings, retail, silent, LATER)

    materialize(settings, retail)

    assert before["spend"] > 0
    assert looked_up(settings, retail, customer) == before
    assert measured(settings, retail).mismatches == ()


def killed_at(call: int, what: str, settings: Settings, project: Project) -> int:
    """Materialize in a fork that is killed when a method of the store is called so often."""

    def work() -> None:
        online._CHUNK = 40
        setattr(store.Store, what, forks.kill_at(call, getattr(store.Store, what)))
        materialize(settings, project)

    return forks.run(work)


def test_an_entity_becomes_unknown_after_a_kill_before_its_row_was_emptied(
    settings: Settings, retail: Project, purchases: Path, tmp_path: Path
):
    offline(settings, retail, purchases, LATER)
    materialize(settings, retail)
    customer, _ = current_row(settings, retail)
    offline(settings, retail, without(purchases, tmp_path / "fewer", customer), LATER)

    code = killed_at(1, "write", settings, retail)
    left = looked_up(settings, retail, customer)
    materialize(settings, retail)

    assert code == forks.KILLED
    assert left["spend"] > 0
    assert set(looked_up(settings, retail, customer).values()) == {None}


def test_an_older_run_takes_nothing_back_of_a_newer_one_that_was_killed(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, EARLIER)
    materialize(settings, retail)
    offline(settings, retail, purchases, LATER)
    assert killed_at(2, "write", settings, retail) == forks.KILLED
    before = online_rows(settings, retail)
    offline(settings, retail, purchases, LATER - timedelta(days=7))

    done = materialize(settings, retail)

    assert done.written == 0
    pd.testing.assert_frame_equal(online_rows(settings, retail), before)
    with pytest.raises(RunFailed, match="run the pipeline on the newest rows"):
        measured(settings, retail)
    offline(settings, retail, purchases, LATER)
    completed = materialize(settings, retail)
    assert completed.moment > done.moment - timedelta(days=1)
    assert completed.written >= completed.rows
    assert measured(settings, retail).mismatches == ()


def killed_while_writing(settings: Settings, project: Project, call: int) -> int:
    """Materialize in a fork that is killed at the given row, in the middle of a transaction."""
    from feast.infra.online_stores import sqlite

    def work() -> None:
        store._CHUNK = 40
        sqlite.serialize_entity_key = forks.kill_at(call, sqlite.serialize_entity_key)
        materialize(settings, project)

    return forks.run(work)


def keys_of_rows(settings: Settings, project: Project) -> int:
    """How many rows of the SQLite store hold anything, after a look that all of them are known."""
    with store.opened(settings, project) as found:
        keys = np.frombuffer(b"".join(found.read_keys(range(known.PARTS))), dtype="<i8").tolist()
        told = found.read(keys, LONG_AGO + found.ttl)[store.TIME].notna().sum()
    rows = online_rows(settings, project)
    held = rows[(rows["feature_name"] == store.TIME) & (rows["value"] != "")]
    assert len(held) == told
    return len(held)


@pytest.mark.slow
def test_a_kill_while_rows_are_written_leaves_whole_rows_and_the_next_one_completes(
    settings: Settings,
    retail: Project,
    purchases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    from feast.infra.online_stores import sqlite

    offline(settings, retail, purchases, EARLIER)
    materialize(settings, retail)
    customer, _ = current_row(settings, retail)
    old = online_rows(settings, retail)
    saved = settings.home / "saved"
    shutil.copytree(settings.home / "retail", saved)
    offline(settings, retail, without(purchases, tmp_path / "fewer", customer), LATER)
    with monkeypatch.context() as patched:
        counted = Mock(wraps=sqlite.serialize_entity_key)
        patched.setattr(sqlite, "serialize_entity_key", counted)
        materialize(settings, retail)
    new = online_rows(settings, retail)
    whole = {key: set(map(tuple, part.values)) for key, part in new.groupby("key")}
    older = {key: set(map(tuple, part.values)) for key, part in old.groupby("key")}
    for point in range(POINTS):
        shutil.copy(saved / "feast" / "online.sqlite", settings.state("retail").feast)

        last = counted.call_count - 1
        code = killed_while_writing(settings, retail, 1 + round(point * last / (POINTS - 1)))

        seen = online_rows(settings, retail)
        assert code == forks.KILLED
        for key, part in seen.groupby("key"):
            assert set(map(tuple, part.values)) in (whole.get(key), older.get(key))
        assert keys_of_rows(settings, retail) > 0
        materialize(settings, retail)
        pd.testing.assert_frame_equal(online_rows(settings, retail), new)


def killed_while_sending(settings: Settings, project: Project, call: int) -> int:
    """Materialize in a fork that is killed when half of what it sends to Redis is sent."""

    def half(connection: Any, command: Any, *_more: object, **_told: object) -> None:
        nonlocal left
        left -= 1
        if left:
            whole(connection, command, *_more, **_told)
            return
        data = b"".join(command) if isinstance(command, list) else command
        connection._sock.sendall(data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    left, whole = call, Connection.send_packed_command

    def work() -> None:
        store._CHUNK = 10
        Connection.send_packed_command = half
        materialize(settings, project)

    return forks.run(work)


def rows_of(settings: Settings, project: Project, purchases: Path) -> dict[int, tuple[Any, ...]]:
    """What is online of each customer of a snapshot, by their keys."""
    keys = pd.read_parquet(purchases)["CustomerID"].dropna().astype("int64").unique().tolist()
    with store.opened(settings, project) as found:
        rows = found.read(keys, LONG_AGO + found.ttl)
    told = rows[rows[store.TIME].notna()].astype("object").where(rows.notna(), None)
    return {int(row[0]): row for row in told.itertuples(index=False, name=None)}


def restore(client: redis.Redis, saved: dict[bytes, bytes]) -> None:
    client.flushdb()
    for key, value in saved.items():
        client.restore(key, 0, value)


@pytest.mark.slow
def test_a_kill_while_rows_are_sent_to_redis_leaves_whole_rows_and_the_next_one_completes(
    settings: Settings,
    retail: Project,
    purchases: Path,
    redis_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    url = redis_url.removesuffix("/0") + "/4"
    settings = settings.model_copy(update={"features_online": url})
    offline(settings, retail, purchases, EARLIER)
    materialize(settings, retail)
    customer, _ = current_row(settings, retail)
    older = rows_of(settings, retail, purchases)
    with redis.Redis.from_url(url) as client:
        saved = {key: client.dump(key) for key in client.scan_iter()}
        offline(settings, retail, without(purchases, tmp_path / "fewer", customer), LATER)
        with monkeypatch.context() as patched:
            counted = Mock(side_effect=Connection.send_packed_command)
            patched.setattr(Connection, "send_packed_command", lambda *a, **k: counted(*a, **k))
            patched.setattr(store, "_CHUNK", 10)
            materialize(settings, retail)
        newer = rows_of(settings, retail, purchases)
        assert (customer in older, customer in newer) == (True, False)
        begun = 0
        for point in range(POINTS):
            restore(client, saved)

            last = counted.call_count - 1
            code = killed_while_sending(settings, retail, 1 + round(point * last / (POINTS - 1)))

            seen = rows_of(settings, retail, purchases)
            assert code == forks.KILLED
            assert all(row in (newer.get(key), older.get(key)) for key, row in seen.items())
            begun += seen not in (older, newer)
            materialize(settings, retail)
            assert rows_of(settings, retail, purchases) == newer
        assert begun >= POINTS // 4


def test_what_a_killed_materialization_left_is_not_called_current(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER)

    code = killed_at(2, "set_mark", settings, retail)

    assert code == forks.KILLED
    with pytest.raises(RunFailed, match="was cut off; run 'perennial features materialize'"):
        measured(settings, retail)


@pytest.mark.slow
def test_a_full_disk_while_rows_are_written_is_told_and_the_next_one_completes(
    settings: Settings, retail: Project, purchases: Path
):
    offline(settings, retail, purchases, LATER)
    done = materialize(settings, retail)
    wanted = online_rows(settings, retail)
    path = settings.state("retail").feast / "online.sqlite"
    full = path.stat().st_size
    for point in range(POINTS):
        path.unlink()
        with store.opened(settings, retail) as found:
            found.apply()

        def work(limit: int = 20_000 + point * (full - 20_000) // POINTS) -> None:
            forks.no_file_above(limit)
            with pytest.raises(Unavailable, match="a store of features does not answer"):
                materialize(settings, retail)

        assert forks.run(work) == 0
        assert materialize(settings, retail).written == done.rows
        pd.testing.assert_frame_equal(online_rows(settings, retail), wanted)


def test_a_store_that_does_not_answer_is_named_without_its_password(
    settings: Settings, retail: Project, purchases: Path
):
    settings = settings.model_copy(update={"features_online": "redis://me:s3cret@127.0.0.1:1/0"})
    offline(settings, retail, purchases, LATER)

    with pytest.raises(Unavailable) as told:
        materialize(settings, retail)

    assert "redis://127.0.0.1:1/0" in str(told.value)
    assert "s3cret" not in str(told.value)


def test_redis_with_a_password_is_used(settings: Settings, retail: Project, purchases: Path):
    with redis_server.running("0123 @é/x") as url:
        settings = settings.model_copy(update={"features_online": url})
        offline(settings, retail, purchases, LATER)
        materialize(settings, retail)

        assert measured(settings, retail).mismatches == ()
