"""The feature table holds each row as it was known at its own time, and no label too early."""

import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import forks
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.metrics import roc_auc_score

from perennial.data import history, simulator, sources
from perennial.data.labels import Change
from perennial.errors import RunFailed, Unavailable
from perennial.features import parity, store, truth
from perennial.project import Project, Simulator, load
from perennial.settings import Settings
from perennial.steps import features
from perennial.store import quality
from perennial.store.engine import make_engine

LONG_AGO = datetime.min.replace(tzinfo=UTC)
AS_OF = datetime(2011, 6, 6, tzinfo=UTC)
NOW = datetime(2026, 11, 1, tzinfo=UTC)
POINTS = 20


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(Path(__file__).parents[1] / "examples" / "retail")


@pytest.fixture(scope="module")
def purchases() -> pd.DataFrame:
    raw = simulator.simulate(Simulator(seed=5, days=200, customers=150))
    return raw[raw["InvoiceDate"] < AS_OF].reset_index(drop=True)


def written(folder: Path, frame: pd.DataFrame) -> Path:
    path = folder / "snapshot"
    frame.to_parquet(path, coerce_timestamps="us")
    return path


def build(
    settings: Settings, project: Project, snapshot: Path, as_of: datetime, out: Path
) -> features.FeatureTable:
    """The step as the component calls it."""
    return features.build(
        settings,
        project,
        snapshot,
        as_of,
        out,
        page=out.with_name("page.html"),
        origin=features.Origin("run-1", NOW),
    )


def early(project: Project, days: int) -> Project:
    """The same project that takes labels for known after so many days."""
    label = project.label.model_copy(update={"known_after": timedelta(days=days)})
    return project.model_copy(update={"label": label})


def table() -> tuple[Project, pd.DataFrame]:
    project = Project.model_validate(
        {
            "name": "rows",
            "kind": "table",
            "time": {"column": "t"},
            "label": {"column": "y", "known_after": "2d"},
            "features": [
                {"name": "x.1", "type": "number"},
                {"name": "colour", "type": "category"},
            ],
            "sensitive": ["sex"],
        }
    )
    raw = pd.DataFrame(
        {
            # Two rows an hour share their time: a join by time alone would mix them up.
            "t": pd.date_range("2020-01-01", periods=100, freq="h").repeat(2),
            "y": [0, 1] * 100,
            "x.1": [None, *range(199)],
            "colour": ["red", None, "blue", "blue"] * 50,
            "sex": ["f", "m"] * 100,
        }
    )
    return project, sources.table_rows(project, raw)


def test_retail_features_come_back_as_they_were_made(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    out = tmp_path / "table"

    made = build(settings, retail, written(tmp_path, purchases), AS_OF, out)

    rows = pd.read_parquet(out)
    wanted = history.examples(retail, purchases, LONG_AGO, AS_OF)
    names = ["row_id", "event_time", *retail.feature_names]
    pd.testing.assert_frame_equal(
        rows[names], wanted[names], check_dtype=False, rtol=0.0, atol=1e-9
    )
    assert (made.rows, made.labelled) == (len(rows), int(rows["label"].notna().sum()))
    assert 0 < made.labelled < made.rows
    assert (rows.loc[rows["label"].notna(), "label_known_at"] <= AS_OF).all()


def test_a_table_comes_back_row_by_row(settings: Settings, tmp_path: Path):
    project, rows = table()
    out = tmp_path / "table"

    build(settings, project, written(tmp_path, rows), datetime(2021, 1, 1, tzinfo=UTC), out)

    found = pd.read_parquet(out)
    pd.testing.assert_frame_equal(found[rows.columns], rows, check_dtype=False, rtol=0.0, atol=1e-9)


def test_a_table_may_have_a_feature_of_any_name(settings: Settings, tmp_path: Path):
    project, rows = table()
    named = [f.model_copy(update={"name": "key"}) for f in project.features if f.name != "x.1"]
    project = project.model_copy(update={"features": tuple(named)})
    snapshot = written(tmp_path, rows.rename(columns={"colour": "key"}).drop(columns="x.1"))

    build(settings, project, snapshot, datetime(2021, 1, 1, tzinfo=UTC), tmp_path / "table")

    with store.opened(settings, project) as opened:
        assert parity.measure(opened, project, 50, seed=1).mismatches == ()


def test_columns_that_only_an_expectation_names_stay_out_of_the_table(
    settings: Settings, tmp_path: Path
):
    project, rows = table()
    snapshot = written(tmp_path, rows.assign(checked_only=1.0))

    build(settings, project, snapshot, datetime(2021, 1, 1, tzinfo=UTC), tmp_path / "table")

    found = pd.read_parquet(tmp_path / "table")
    assert set(found) == {*rows, "feature_time"}


def test_the_newest_window_can_be_looked_up_online(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    from feast import FeatureStore

    out = tmp_path / "table"
    build(settings, retail, written(tmp_path, purchases), AS_OF, out)
    newest = pd.read_parquet(out).iloc[-1]

    store = FeatureStore(repo_path=str(settings.state("retail").feast))
    found = store.get_online_features(
        features=["customer_purchases:spend"], entity_rows=[{"customer_id": newest["customer_id"]}]
    ).to_dict()

    assert found["spend"] == [pytest.approx(newest["spend"])]


def test_labels_used_before_they_are_known_are_caught(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    with pytest.raises(RunFailed, match="label-time check: .* rows use labels before"):
        build(settings, early(retail, 0), written(tmp_path, purchases), AS_OF, tmp_path / "table")

    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize("days", [0, 30, 55])
def test_the_label_time_check_counts_every_early_label(
    retail: Project, purchases: pd.DataFrame, days: int
):
    project = early(retail, days)
    rows = history.examples(project, purchases, LONG_AGO, AS_OF)
    known = rows["label"].where(rows["label_known_at"] <= AS_OF)
    wrong = int((known.notna() & (rows["event_time"] + timedelta(days=60) > AS_OF)).sum())

    with pytest.raises(RunFailed, match=f"label-time check: {wrong:,} of"):
        features.check_label_times(project, rows.assign(label=known), AS_OF)


def test_labels_that_take_their_time_pass(retail: Project, purchases: pd.DataFrame):
    rows = history.examples(retail, purchases, LONG_AGO, AS_OF)
    known = rows["label"].where(rows["label_known_at"] <= AS_OF)

    features.check_label_times(retail, rows.assign(label=known), AS_OF)

    assert known.notna().any()


def test_early_labels_of_the_real_file_are_caught(data_folder: Path, retail: Project, root: Path):
    raw = sources.read(retail, str(data_folder / "online_retail.parquet"), root)
    project = early(retail, 0)
    as_of = datetime(2011, 8, 1, tzinfo=UTC)
    rows = history.examples(project, raw, datetime(2011, 5, 1, tzinfo=UTC), as_of)

    with pytest.raises(RunFailed, match="label-time check"):
        features.check_label_times(project, rows, as_of)


def test_a_history_too_short_to_look_back_is_told(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    short = purchases[purchases["InvoiceDate"] < datetime(2011, 1, 1, tzinfo=UTC)]

    with pytest.raises(RunFailed, match="give a longer history"):
        build(
            settings,
            retail,
            written(tmp_path, short),
            datetime(2011, 1, 1, tzinfo=UTC),
            tmp_path / "table",
        )


def policy(project: Project, feature: str, **more: object) -> Project:
    """The same project with another policy for one feature."""
    told = project.model_dump()
    told["features"] = [{**f, **more} if f["name"] == feature else f for f in told["features"]]
    return Project.model_validate(told)


def test_every_row_of_the_snapshot_is_accounted_for(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    made = build(settings, retail, written(tmp_path, purchases), AS_OF, tmp_path / "table")

    cancelled = purchases["InvoiceNo"].str.startswith("C")
    nobody = purchases["CustomerID"].isna()
    assert sum(made.counts.values()) == len(purchases)
    assert made.counts["without a customer"] == nobody.sum() > 0
    assert made.counts["cancelled"] == (cancelled & ~nobody).sum() > 0
    assert made.told["rows_not_sold"] > 0


def test_the_public_files_rows_are_accounted_for_to_the_row(
    settings: Settings, tmp_path: Path, retail: Project, data_folder: Path
):
    snapshot = data_folder / "online_retail.parquet"

    made = build(settings, retail, snapshot, datetime(2011, 12, 12, tzinfo=UTC), tmp_path / "table")

    assert made.counts == {
        "bought": 397_884,
        "cancelled": 8_905,
        "not sold": 40,
        "without a customer": 135_080,
        "without an invoice": 0,
    }


def test_the_same_snapshot_gives_the_same_bytes(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    snapshot = written(tmp_path, purchases)

    build(settings, retail, snapshot, AS_OF, tmp_path / "one")
    build(settings, retail, snapshot, AS_OF, tmp_path / "two")

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_quality_is_recorded_and_drawn(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    week_before = purchases[purchases["InvoiceDate"] < AS_OF - timedelta(days=7)]
    build(settings, retail, written(tmp_path, week_before), AS_OF, tmp_path / "table")

    dearer = purchases.assign(UnitPrice=purchases["UnitPrice"] * 100)
    made = build(settings, retail, written(tmp_path, dearer), AS_OF, tmp_path / "table")

    engine = make_engine(settings.state("retail").url)
    found = quality.newest(engine, "retail")
    before = quality.before(engine, "retail", found["spend"].moment)
    engine.dispose()
    page = (tmp_path / "page.html").read_text()
    assert set(found) == {*retail.feature_names, truth.LABEL}
    assert set(before) == set(retail.feature_names)
    assert found["spend"].moment == before["spend"].moment + timedelta(days=7)
    assert (made.quality, found["spend"].verdict, found["unit_price"].verdict) == ("bad",) * 3
    assert found["orders"].verdict == "good"
    assert "without a customer" in page and "stability index" in page
    assert "://" not in page.replace("http://www.w3.org", "")


def test_a_feature_that_none_may_miss_ends_the_run_where_it_is_missing(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    project = policy(retail, "days_between_orders", missing="fail")

    with pytest.raises(RunFailed, match="days_between_orders has no value in .* its policy is"):
        build(settings, project, written(tmp_path, purchases), AS_OF, tmp_path / "table")

    assert not (tmp_path / "table").exists()


def test_a_missing_value_is_carried_on_from_the_last_known_within_its_age(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    days = "days_between_orders"
    carried = policy(retail, days, missing="last_known", max_age="21d")
    snapshot = written(tmp_path, purchases)
    build(settings, retail, snapshot, AS_OF, tmp_path / "plain")
    build(settings, carried, snapshot, AS_OF, tmp_path / "carried")
    plain = pd.read_parquet(tmp_path / "plain")

    found = pd.read_parquet(tmp_path / "carried")

    known = plain[["customer_id", "event_time", days]].dropna().rename(columns={days: "last"})
    known["then"] = known["event_time"]
    wanted = pd.merge_asof(
        plain, known, on="event_time", by="customer_id", tolerance=pd.Timedelta("21d")
    )
    pd.testing.assert_series_equal(found[days], wanted["last"], check_names=False)
    assert found[days].notna().sum() > plain[days].notna().sum()
    assert found.columns.tolist() == plain.columns.tolist()
    rows = pd.read_parquet(settings.state("retail").feast / store.ROWS)
    ages = (wanted["event_time"] - wanted["then"]).dt.total_seconds()
    pd.testing.assert_series_equal(rows[f"{days}__age_s"], ages, check_names=False)


@pytest.mark.slow
def test_a_kill_anywhere_leaves_no_half_table_and_the_next_run_completes(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    snapshot, out = written(tmp_path, purchases), tmp_path / "table"

    def once() -> None:
        build(settings, retail, snapshot, AS_OF, out)

    once()
    wanted = out.read_bytes()
    began = time.monotonic()
    assert forks.run(once) == 0
    took = time.monotonic() - began
    ends = []
    for point in range(POINTS):
        out.unlink(missing_ok=True)
        shutil.rmtree(settings.state("retail").feast)

        ends.append(forks.killed_after(took * point / POINTS, once))

        assert not out.exists() or out.read_bytes() == wanted
        once()
        assert out.read_bytes() == wanted
        with store.opened(settings, retail) as opened:
            assert parity.measure(opened, retail, 200, seed=point).mismatches == ()
    assert ends.count(forks.KILLED) >= POINTS // 2


@pytest.mark.slow
def test_a_full_disk_anywhere_leaves_no_half_table_and_the_next_run_completes(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    snapshot, out = written(tmp_path, purchases), tmp_path / "table"
    build(settings, retail, snapshot, AS_OF, out)
    wanted = out.read_bytes()
    largest = (settings.state("retail").feast / "online.sqlite").stat().st_size
    failed = 0
    for point in range(POINTS):
        out.unlink()
        shutil.rmtree(settings.state("retail").feast)

        def once(limit: int = 1000 + point * largest // POINTS) -> None:
            forks.no_file_above(limit)
            with pytest.raises((RunFailed, Unavailable, OSError)):
                build(settings, retail, snapshot, AS_OF, out)

        failed += forks.run(once) == 0
        assert not out.exists() or out.read_bytes() == wanted
        build(settings, retail, snapshot, AS_OF, out)
        assert out.read_bytes() == wanted
    assert failed == POINTS


WEEKS_LATER = AS_OF + timedelta(days=21)


@pytest.fixture(scope="module")
def longer() -> pd.DataFrame:
    """The purchases of ``purchases`` and some weeks more."""
    raw = simulator.simulate(Simulator(seed=5, days=230, customers=150))
    return raw[raw["InvoiceDate"] < WEEKS_LATER].reset_index(drop=True)


def misbooked(rows: pd.DataFrame) -> pd.DataFrame:
    """Purchases of which most customers' newest ones went to others."""
    changed = rows.copy()
    late = (rows["InvoiceDate"] >= AS_OF - timedelta(days=70)) & rows["CustomerID"].notna()
    changed.loc[late, "CustomerID"] += 1_000_000
    return changed


def test_labels_that_come_otherwise_than_last_time_end_the_run_under_their_name(
    settings: Settings, tmp_path: Path, retail: Project, longer: pd.DataFrame
):
    first = longer[longer["InvoiceDate"] < AS_OF]
    build(settings, retail, written(tmp_path, first), AS_OF, tmp_path / "first")
    snapshot = written(tmp_path, misbooked(longer))
    rows = (settings.state("retail").feast / store.ROWS).read_bytes()

    with pytest.raises(
        RunFailed, match="labels are not as they were: label: 76.2% of 2,056 rows"
    ) as told:
        build(settings, retail, snapshot, WEEKS_LATER, tmp_path / "second")

    assert "in the last accepted data; wanted a change of at most 10%" in str(told.value)
    assert not (tmp_path / "second").exists()
    assert (settings.state("retail").feast / store.ROWS).read_bytes() == rows
    assert "labels are not as they were" in (tmp_path / "page.html").read_text()


def test_labels_that_come_as_last_time_pass_and_are_told(
    settings: Settings, tmp_path: Path, retail: Project, longer: pd.DataFrame
):
    first = longer[longer["InvoiceDate"] < AS_OF]
    build(settings, retail, written(tmp_path, first), AS_OF, tmp_path / "first")
    assert "<h2>Labels" not in (tmp_path / "page.html").read_text()

    build(settings, retail, written(tmp_path, longer), WEEKS_LATER, tmp_path / "second")

    assert (tmp_path / "second").exists()
    assert "label: " in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"max_change": 1.0}, id="a project that wants no limit"),
        pytest.param({"horizon": timedelta(days=59)}, id="another question"),
    ],
)
def test_labels_may_change_with(
    settings: Settings,
    tmp_path: Path,
    retail: Project,
    longer: pd.DataFrame,
    change: dict[str, object],
):
    first = longer[longer["InvoiceDate"] < AS_OF]
    build(settings, retail, written(tmp_path, first), AS_OF, tmp_path / "first")
    label = retail.label.model_copy(update=change)

    build(
        settings,
        retail.model_copy(update={"label": label}),
        written(tmp_path, misbooked(longer)),
        WEEKS_LATER,
        tmp_path / "second",
    )

    assert (tmp_path / "second").exists()


def test_no_week_of_the_real_file_has_labels_that_stop_the_run(
    settings: Settings, data_folder: Path, retail: Project, tmp_path: Path
):
    raw = pd.read_parquet(data_folder / "online_retail.parquet")
    rows = history.examples(retail, raw, LONG_AGO, None)
    starts = sorted(rows["event_time"].unique())[10:]
    engine = make_engine(settings.state("retail").url)
    changes: list[Change] = []
    for week, start in enumerate(starts):
        as_of = start.to_pydatetime()
        known = rows[rows["event_time"] < as_of].copy()
        known.loc[known["label_known_at"] > as_of, "label"] = None
        known.to_parquet(tmp_path / "examples.parquet")

        derived = truth.judge(engine, retail, tmp_path / "examples.parquet", as_of)

        changes += derived.changes
        # Held against the week before, and later against one of many weeks before.
        if week < len(starts) // 2:
            truth.keep(engine, retail, derived, run=f"run-{week}", now=NOW)
    engine.dispose()
    assert len(changes) == 2 * (len(starts) - 1)
    assert not any(change.is_broken for change in changes)
    assert max(change.measure for change in changes if change.kind == "prior") < 0.03


def leaky_join(rows: pd.DataFrame, names: list[str], trained_at: datetime) -> pd.DataFrame:
    """Each row with its entity's newest features when a model is trained: a careless join.

    ``feature_time`` says when they were known, which is later than the row itself.
    """
    newest = (
        rows[rows["event_time"] <= trained_at]
        .sort_values("event_time")
        .drop_duplicates("customer_id", keep="last")
    )
    later = newest[["customer_id", *names]].assign(feature_time=newest["event_time"])
    return rows.drop(columns=[*names, "feature_time"]).merge(later, on="customer_id", how="left")


def auc(rows: pd.DataFrame, names: list[str]) -> float:
    """AUC of a model of earlier cut-offs on those of 2011-08-01 and the weeks around it."""
    inputs = rows[names].assign(**{n: rows[n].astype("category") for n in {"country"} & set(names)})
    judge = rows["customer_id"] % 2 == 0
    model = xgboost.XGBClassifier(
        n_estimators=100, max_depth=3, learning_rate=0.1, enable_categorical=True, n_jobs=1
    ).fit(inputs[~judge], rows["label"][~judge])
    return float(roc_auc_score(rows["label"][judge], model.predict_proba(inputs[judge])[:, 1]))


def test_an_honest_join_is_moderate_and_the_latest_values_know_the_label(
    settings: Settings, tmp_path: Path, retail: Project, data_folder: Path
):
    names = ["recency_days", "orders", "spend"]
    out = tmp_path / "table"
    snapshot = data_folder / "online_retail.parquet"
    build(settings, retail, snapshot, datetime(2011, 12, 12, tzinfo=UTC), out)
    table = pd.read_parquet(out)
    cut = table["event_time"] == datetime(2011, 8, 1, tzinfo=UTC)
    # When the labels of that week are known, two months later.
    leaky = leaky_join(table, names, datetime(2011, 10, 3, tzinfo=UTC))

    honest, wrong = auc(table[cut], names), auc(leaky[cut], names)

    assert not history.from_the_future(table).any()
    assert 0.66 <= honest <= 0.76
    assert wrong > 0.95
    assert history.from_the_future(leaky[cut]).mean() > 0.5


def leaking(vouched: bool) -> tuple[Project, pd.DataFrame]:
    """A table with a number that is filled in when the answer is known."""
    rng = np.random.default_rng(2)
    truth = rng.integers(0, 2, 600)
    raw = pd.DataFrame(
        {
            "t": pd.date_range("2020-01-01", periods=600, freq="h"),
            "y": truth,
            "size": rng.normal(size=600),
            "refund": truth * 5.0 + rng.normal(0, 0.5, 600),
        }
    )
    project = Project.model_validate(
        {
            "name": "rows",
            "kind": "table",
            "time": {"column": "t"},
            "label": {"column": "y"},
            "features": [
                {"name": "size", "type": "number"},
                {"name": "refund", "type": "number", "vouched": vouched},
            ],
        }
    )
    return project, sources.table_rows(project, raw)


def test_a_feature_that_knows_the_label_stops_the_run_under_its_name(
    settings: Settings, tmp_path: Path
):
    project, rows = leaking(vouched=False)
    out = tmp_path / "table"

    with pytest.raises(RunFailed, match="leak check: refund ") as caught:
        build(settings, project, written(tmp_path, rows), datetime(2021, 1, 1, tzinfo=UTC), out)

    assert not out.exists()
    page = (tmp_path / "page.html").read_text()
    assert "refund" in page and "Stopped" in page
    shown = Path(str(caught.value).rpartition("see file://")[2])
    assert shown.read_text() == page
    # Nor does Feast have any of it: nobody can bring it online by hand.
    with store.opened(settings, project) as feast:
        assert not feast.rows.exists()


def test_a_feature_that_somebody_vouches_for_is_not_accused(settings: Settings, tmp_path: Path):
    project, rows = leaking(vouched=True)
    out = tmp_path / "table"

    build(settings, project, written(tmp_path, rows), datetime(2021, 1, 1, tzinfo=UTC), out)

    assert out.exists()


def test_features_from_after_their_row_are_named_by_the_leak_check(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    out = tmp_path / "table"
    build(settings, retail, written(tmp_path, purchases), AS_OF, out)
    rows = pd.read_parquet(out)
    assert [x for x in features.find_leaks(retail, out) if x.severity == "critical"] == []

    late = rows.assign(feature_time=rows["event_time"] + timedelta(days=7))
    late.to_parquet(out, coerce_timestamps="us")

    (leak,) = (x for x in features.find_leaks(retail, out) if x.severity == "critical")
    assert leak.kind == "point in time"
    assert "spend" in leak.sentence and "recency_days" in leak.sentence
