"""What judges a model is never what trained it, nor what gave the answer away."""

from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from tiny import STEP, project, rows

from perennial.data import churn, split
from perennial.errors import RunFailed
from perennial.project import Project

WEEK = timedelta(days=7)
DELAY = timedelta(days=60)
FIRST = datetime(2011, 1, 3, tzinfo=UTC)  # a Monday


def table(count: int = 1000, unknown: int = 0) -> pd.DataFrame:
    frame = rows(count)
    frame["label_known_at"] = frame["event_time"]
    frame.loc[count - unknown :, "label"] = np.nan
    return frame


def shop(weeks: int = 20, customers: int = 400) -> pd.DataFrame:
    """Every customer in every week, with labels that are known 60 days later."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {
            "customer_id": np.tile(np.arange(12_300, 12_300 + customers), weeks),
            "event_time": np.repeat([FIRST + i * WEEK for i in range(weeks)], customers),
        }
    )
    frame["row_id"] = churn.row_ids(frame)
    frame["label"] = rng.integers(0, 2, len(frame)).astype(float)
    frame["label_known_at"] = frame["event_time"] + DELAY
    frame.loc[frame["label_known_at"] > FIRST + weeks * WEEK, "label"] = np.nan
    return frame


def retail() -> Project:
    raw = {
        "name": "shop",
        "kind": "transactions",
        "time": {"column": "InvoiceDate"},
        "label": {"horizon": "60d", "known_after": "60d"},
        "features": [{"name": "orders", "type": "number"}],
        "window": {"every": "7d", "min_rows": 50},
    }
    return Project.model_validate(raw)


def with_gates(found: Project, **values: object) -> Project:
    return found.model_copy(update={"gates": found.gates.model_copy(update=values)})


def with_training(found: Project, **values: object) -> Project:
    return found.model_copy(update={"training": found.training.model_copy(update=values)})


def test_the_newest_labelled_window_judges_and_everything_before_it_trains():
    kept = split.split(project(), table(1000, unknown=70))

    assert (kept.window_start, kept.window_end) == (
        kept.holdout["event_time"].iloc[0],
        kept.window_start + 50 * STEP,
    )
    assert kept.holdout["row_id"].tolist() == list(range(900, 930))
    assert kept.train["row_id"].tolist() == list(range(900))


@pytest.mark.parametrize(
    ("found", "frame"),
    [
        pytest.param(project(), table(1000, unknown=70), id="table"),
        pytest.param(project(), table(1020), id="table with a short last window"),
        pytest.param(retail(), shop(), id="purchases"),
        pytest.param(
            with_training(retail(), keep=timedelta(days=30)), shop(), id="recent purchases"
        ),
    ],
)
def test_every_row_trains_judges_or_is_left_for_a_reason(found: Project, frame: pd.DataFrame):
    kept = split.split(found, frame)

    assert len(kept.train) + len(kept.holdout) + sum(kept.left.values()) == len(frame)
    assert not set(kept.train["row_id"]) & set(kept.holdout["row_id"])
    assert kept.left["no label yet"] == frame["label"].isna().sum()


def test_a_row_that_would_train_and_judge_stops_the_run(monkeypatch):
    monkeypatch.setattr(split, "_may_train", lambda _p, rows, _s, _j: np.ones(len(rows), bool))

    with pytest.raises(RunFailed, match="rows were lost or doubled: of 1,000 rows train 1,000"):
        split.split(project(), table(1000))


def test_a_window_with_too_few_labels_does_not_judge():
    kept = split.split(project(), table(1000, unknown=85))

    assert kept.holdout["row_id"].tolist() == list(range(850, 900))
    assert kept.train["row_id"].max() == 849


def test_more_windows_judge_where_the_project_says_so():
    kept = split.split(with_gates(project(), holdout_windows=3), table(1000))

    assert len(kept.holdout) == 150
    assert kept.window_end - kept.window_start == 150 * STEP


def test_too_few_rows_to_train_on_are_counted():
    with pytest.raises(RunFailed, match="250 labelled rows may train, wanted at least 300"):
        split.split(project(), table(300))


def test_no_full_window_to_judge_on_is_told_with_its_counts():
    frame = table(1000)
    frame.loc[frame["row_id"] % 10 > 0, "label"] = np.nan

    with pytest.raises(RunFailed, match="100 labelled rows and at most 5 in a window"):
        split.split(project(), frame)


def test_one_label_alone_is_not_trained_on():
    frame = table(1000)
    frame.loc[frame["row_id"] < 950, "label"] = 1.0

    with pytest.raises(RunFailed, match="all 950 training rows have the label 1"):
        split.split(project(), frame)


def test_old_rows_are_left_out_where_the_project_keeps_only_recent_ones():
    kept = split.split(with_training(project(), keep=400 * STEP), table(1000))

    assert kept.train["row_id"].tolist() == list(range(550, 950))


def test_no_customer_who_judges_trains_with_a_label_that_overlaps():
    kept = split.split(retail(), shop())

    judges = set(kept.holdout["customer_id"])
    theirs = kept.train[kept.train["customer_id"].isin(judges)]

    assert len(theirs)
    assert (theirs["label_known_at"] <= kept.window_start).all()
    assert (kept.train["event_time"] < kept.window_start).all()


def test_the_other_half_of_the_customers_trains_up_to_the_window():
    kept = split.split(retail(), shop())

    judges = set(kept.holdout["customer_id"])
    newest = kept.train[kept.train["event_time"] == kept.window_start - WEEK]

    assert 0.4 < len(judges) / 400 < 0.6
    assert len(newest) == 400 - len(judges)


def test_the_same_customers_judge_in_every_run():
    frame = shop()
    later = shop(weeks=30)

    first = set(split.split(retail(), frame).holdout["customer_id"])
    second = set(split.split(retail(), later).holdout["customer_id"])

    assert first == second


def test_a_fold_never_sees_later_rows():
    kept = split.split(project(), table(2000))

    found = split.folds(project(), kept.train)

    times = kept.train["event_time"].to_numpy()
    assert len(found) == 3
    assert all(times[f.train].max() < times[f.valid].min() for f in found)
    assert [len(f.train) for f in found] == sorted(len(f.train) for f in found)


def test_a_fold_of_purchases_never_sees_a_label_that_gives_its_own_away():
    kept = split.split(retail(), shop(40))

    found = split.folds(retail(), kept.train)

    assert found
    for fold in found:
        train, valid = kept.train.iloc[fold.train], kept.train.iloc[fold.valid]
        theirs = train[train["customer_id"].isin(set(valid["customer_id"]))]
        assert (theirs["label_known_at"] <= valid["event_time"].min()).all()


def test_rows_of_one_moment_are_never_torn_apart_by_a_fold():
    kept = split.split(retail(), shop(40))

    for fold in split.folds(retail(), kept.train):
        train = set(kept.train["event_time"].iloc[fold.train])
        assert not train & set(kept.train["event_time"].iloc[fold.valid])


def test_a_history_without_folds_is_refused():
    frame = table(400)
    frame["event_time"] = frame["event_time"].iloc[0]

    with pytest.raises(RunFailed, match="give a longer history"):
        split.folds(project(), frame)


def test_labels_from_the_future_are_counted():
    frame = shop()
    as_of = FIRST + 12 * WEEK

    early = split.early_labels(frame, as_of)

    known = frame["label"].notna()
    assert early == int((known & (frame["label_known_at"] > as_of)).sum()) > 0
    assert split.early_labels(frame, FIRST + 20 * WEEK) == 0
