"""The feature table holds each row as it was known at its own time, and no label too early."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from perennial.data import history, simulator, sources
from perennial.errors import RunFailed
from perennial.project import Project, Simulator, load
from perennial.settings import Settings
from perennial.steps import features

LONG_AGO = datetime.min.replace(tzinfo=UTC)
AS_OF = datetime(2011, 6, 6, tzinfo=UTC)


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

    made = features.build(settings, retail, written(tmp_path, purchases), AS_OF, out)

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

    features.build(
        settings, project, written(tmp_path, rows), datetime(2021, 1, 1, tzinfo=UTC), out
    )

    found = pd.read_parquet(out)
    pd.testing.assert_frame_equal(found[rows.columns], rows, check_dtype=False, rtol=0.0, atol=1e-9)


def test_the_newest_window_can_be_looked_up_online(
    settings: Settings, tmp_path: Path, retail: Project, purchases: pd.DataFrame
):
    from feast import FeatureStore

    out = tmp_path / "table"
    features.build(settings, retail, written(tmp_path, purchases), AS_OF, out)
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
        features.build(
            settings, early(retail, 0), written(tmp_path, purchases), AS_OF, tmp_path / "table"
        )

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
        features.build(
            settings,
            retail,
            written(tmp_path, short),
            datetime(2011, 1, 1, tzinfo=UTC),
            tmp_path / "table",
        )
