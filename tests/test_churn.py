"""Features know nothing later than their cut-off, and labels nothing later than their horizon."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.metrics import roc_auc_score

from perennial.data import churn, history, simulator, sources
from perennial.project import Project, Simulator, load

CUT = datetime(2011, 4, 4, tzinfo=UTC)
HORIZON = timedelta(days=60)
LONG_AGO = datetime.min.replace(tzinfo=UTC)


def purchases(*rows: tuple[float, int, str, str, int, float]) -> pd.DataFrame:
    """Lines as (days after the cut-off, customer, invoice, product, units, price)."""
    names = ["day", "CustomerID", "InvoiceNo", "StockCode", "Quantity", "UnitPrice"]
    raw = pd.DataFrame(rows, columns=names)
    raw["InvoiceDate"] = pd.Timestamp(CUT) + pd.to_timedelta(raw.pop("day"), unit="D")
    return raw.assign(Country="France", Description="MUG")


def features_of(raw: pd.DataFrame, customer: int = 1) -> pd.Series:
    rows = churn.churn_features(raw, [CUT])
    return rows[rows["customer_id"] == customer].iloc[0]


def test_features_count_what_a_customer_bought():
    raw = purchases(
        (-50, 1, "10", "A", 2, 5.0),
        (-50, 1, "10", "B", 4, 1.0),
        (-10, 1, "11", "A", 2, 3.0),
        (-9, 1, "C12", "A", -2, 3.0),
    )

    found = features_of(raw)

    assert found["recency_days"] == pytest.approx(10)
    assert (found["orders"], found["orders_recent"], found["products"]) == (2, 1, 2)
    assert found["spend"] == pytest.approx(20)
    assert found["spend_share_recent"] == pytest.approx(6 / 20)
    assert found["spend_per_order"] == pytest.approx(10)
    assert found["lines_per_order"] == pytest.approx(1.5)
    assert found["units_per_line"] == pytest.approx(8 / 3)
    assert found["unit_price"] == pytest.approx(3)
    assert found["days_between_orders"] == pytest.approx(40)
    assert found["cancelled_share"] == pytest.approx(0.25)
    assert found["country"] == "France"


def test_one_order_has_no_time_between_orders():
    assert np.isnan(features_of(purchases((-3, 1, "10", "A", 1, 1.0)))["days_between_orders"])


@pytest.mark.parametrize(
    "line",
    [
        pytest.param((-91.0, 2, "20", "A", 1, 1.0), id="bought longer ago"),
        pytest.param((0.01, 2, "20", "A", 1, 1.0), id="buys only later"),
        pytest.param((-5.0, 2, "C20", "A", -1, 1.0), id="only cancelled"),
        pytest.param((-5.0, 2, "20", "A", 1, 0.0), id="paid nothing"),
    ],
)
def test_there_is_no_row_for_a_customer_who(line: tuple[float, int, str, str, int, float]):
    rows = churn.churn_features(purchases((-3, 1, "10", "A", 1, 1.0), line), [CUT])

    assert rows["customer_id"].tolist() == [1]


def test_lines_without_a_customer_count_for_nobody():
    raw = purchases((-3, 1, "10", "A", 1, 1.0))
    nobody = raw.assign(CustomerID=np.nan)

    assert len(churn.churn_features(pd.concat([raw, nobody]), [CUT])) == 1


def test_features_stay_the_same_when_the_future_is_cut_away():
    raw = simulator.simulate(Simulator(seed=3, days=200, customers=200))
    past = raw[raw["InvoiceDate"] <= CUT]

    pd.testing.assert_frame_equal(
        churn.churn_features(raw, [CUT]), churn.churn_features(past, [CUT])
    )


@pytest.mark.parametrize(
    ("day", "label"),
    [
        pytest.param(0.0, 1.0, id="at the cut-off is the past"),
        pytest.param(0.01, 0.0, id="just after it counts"),
        pytest.param(60.0, 0.0, id="on the last day counts"),
        pytest.param(60.01, 1.0, id="after the horizon is too late"),
    ],
)
def test_a_purchase(day: float, label: float):
    raw = purchases((-3, 1, "10", "A", 1, 1.0), (day, 1, "11", "A", 1, 1.0))
    rows = churn.churn_features(raw, [CUT])

    assert churn.churn_labels(raw, rows, HORIZON).tolist() == [label]


def test_a_cancellation_is_no_purchase():
    raw = purchases((-3, 1, "10", "A", 1, 1.0), (5, 1, "C11", "A", -1, 1.0))

    assert churn.churn_labels(raw, churn.churn_features(raw, [CUT]), HORIZON).tolist() == [1.0]


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(Path(__file__).parents[1] / "examples" / "retail")


def test_the_project_names_the_features_that_the_code_makes(retail: Project):
    assert retail.feature_names == churn.FEATURES


def test_a_row_keeps_its_id_in_a_longer_history(retail: Project):
    raw = simulator.simulate(Simulator(seed=3, days=200, customers=100))
    past = raw[raw["InvoiceDate"] < CUT]

    short = history.examples(retail, past, LONG_AGO, None)
    long = history.examples(retail, raw, LONG_AGO, CUT)

    assert short["row_id"].is_unique
    assert short["row_id"].tolist() == long["row_id"].tolist()


def test_rows_stand_at_starts_of_windows_with_a_full_look_back(retail: Project):
    raw = simulator.simulate(Simulator(seed=3, days=200, customers=100))

    rows = history.examples(retail, raw, LONG_AGO, None)

    starts = rows["event_time"].map(lambda t: retail.window_start(t.to_pydatetime()))
    assert (starts == rows["event_time"]).all()
    assert rows["event_time"].min() >= raw["InvoiceDate"].min() + churn.LOOK_BACK


def test_a_label_that_cannot_be_known_yet_is_blank(retail: Project):
    raw = simulator.simulate(Simulator(seed=3, days=200, customers=100))
    end = raw["InvoiceDate"].max() + timedelta(days=7)

    rows = history.examples(retail, raw, LONG_AGO, None)

    assert rows.loc[rows["label_known_at"] > end, "label"].isna().all()
    assert rows.loc[rows["label_known_at"] < end - timedelta(days=7), "label"].notna().all()


def test_since_and_until_cut_the_rows(retail: Project):
    raw = simulator.simulate(Simulator(seed=3, days=200, customers=100))

    rows = history.examples(retail, raw, CUT, CUT + timedelta(days=7))

    assert rows["event_time"].unique().tolist() == [pd.Timestamp(CUT)]


def matrix(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[list(churn.FEATURES)].assign(country=rows["country"].astype("category"))


def weekly_auc(rows: pd.DataFrame, known: timedelta) -> float:
    """AUC over weeks, each scored by a model of what counts as known at its start."""
    inputs, scores = matrix(rows), pd.Series(np.nan, index=rows.index)
    for week in sorted(rows["event_time"].unique())[10::3]:
        past = rows["event_time"] + known < week
        model = xgboost.XGBClassifier(
            n_estimators=200, max_depth=4, learning_rate=0.1, enable_categorical=True, n_jobs=1
        ).fit(inputs[past], rows["label"][past])
        now = rows["event_time"] == week
        scores[now] = model.predict_proba(inputs[now])[:, 1]
    seen = scores.notna()
    return float(roc_auc_score(rows["label"][seen], scores[seen]))


def test_on_the_real_file_honest_skill_is_moderate_and_early_labels_look_better(
    data_folder: Path, retail: Project
):
    raw = sources.read(retail, str(data_folder / "online_retail.parquet"), data_folder)
    rows = history.examples(retail, raw, LONG_AGO, None).dropna(subset="label")
    rows = rows.reset_index(drop=True)

    honest, early = weekly_auc(rows, HORIZON), weekly_auc(rows, timedelta(0))

    assert 0.66 <= honest <= 0.76
    assert early > 0.76
