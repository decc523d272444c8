"""Invented purchases look alike each week, until a shift is planted."""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from perennial.data import churn, sources
from perennial.data.simulator import simulate
from perennial.project import Shift, Simulator

SHIFT = datetime(2011, 4, 4, tzinfo=UTC)
NUMBERS = [name for name in churn.FEATURES if name != "country"]


def calm(**changes: object) -> Simulator:
    return Simulator(seed=7, days=220, customers=400).model_copy(update=changes)


def shifted(kind: str, size: float) -> Simulator:
    return calm(shifts=(Shift.model_validate({"kind": kind, "start": SHIFT, "size": size}),))


def at(raw: pd.DataFrame, month: int, day: int) -> pd.DataFrame:
    return churn.churn_features(raw, [datetime(2011, month, day, tzinfo=UTC)])


def drifted(before: pd.DataFrame, after: pd.DataFrame) -> list[str]:
    limit = 0.05 / len(NUMBERS)
    return [n for n in NUMBERS if stats.ks_2samp(before[n].dropna(), after[n].dropna())[1] < limit]


def test_the_same_settings_give_the_same_rows():
    pd.testing.assert_frame_equal(simulate(calm(days=60)), simulate(calm(days=60)))


def test_another_seed_gives_other_rows():
    assert not simulate(calm(days=60)).equals(simulate(calm(days=60, seed=8)))


def test_rows_have_the_schema_of_the_public_file(data_folder: Path):
    real = pd.read_parquet(data_folder / "online_retail.parquet")

    raw = simulate(calm(days=60))

    assert raw.columns.tolist() == real.columns.tolist() == list(sources.TRANSACTIONS)


def test_rows_have_the_faults_that_real_files_have():
    raw = simulate(calm(days=60))
    cancelled = raw["InvoiceNo"].str.startswith("C")

    assert 0.05 < raw["CustomerID"].isna().mean() < 0.3
    assert 0 < raw["Description"].isna().mean() < 0.01
    assert 0 < (raw["UnitPrice"] <= 0).mean() < 0.01
    assert 0 < raw.duplicated().mean() < 0.03
    assert (raw.loc[cancelled, "Quantity"] < 0).all()
    assert (raw.loc[~cancelled, "Quantity"] > 0).all()
    assert cancelled.any()


@pytest.mark.parametrize("seed", [7, 11, 23])
def test_without_a_shift_no_feature_drifts(seed: int):
    raw = simulate(calm(seed=seed))

    assert drifted(at(raw, 3, 7), at(raw, 6, 27)) == []


@pytest.mark.parametrize(
    ("kind", "size", "moved"),
    [
        ("newcomers", 0.8, "unit_price"),
        ("misbooked", 0.95, "spend"),
        ("prices", 1.5, "unit_price"),
    ],
)
def test_a_shift_moves_features_after_it_and_none_before(kind: str, size: float, moved: str):
    raw = simulate(shifted(kind, size))

    assert moved not in drifted(at(raw, 3, 7), at(raw, 4, 4))
    assert moved in drifted(at(raw, 3, 7), at(raw, 5, 16))


def test_wrong_bookings_leave_the_past_as_it_was():
    before = simulate(calm())
    after = simulate(shifted("misbooked", 0.95))

    early = before["InvoiceDate"] < SHIFT
    pd.testing.assert_frame_equal(before[early], after[early])
    moved = before["CustomerID"].fillna(0) != after["CustomerID"].fillna(0)
    assert 0.8 < moved[~early & before["CustomerID"].notna()].mean() < 0.96


def test_a_planted_price_is_the_old_one_times_its_size():
    before, after = simulate(calm()), simulate(shifted("prices", 2.0))
    late = before["InvoiceDate"] >= SHIFT

    ratio = after["UnitPrice"][late].sum() / before["UnitPrice"][late].sum()
    assert ratio == pytest.approx(2.0, abs=0.001)
