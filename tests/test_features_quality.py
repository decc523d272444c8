"""Features that go online are compared with those before, and only what is no chance is told."""

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sqlalchemy import Engine

from perennial.features import quality
from perennial.features.quality import BAD, GOOD, WARN
from perennial.project import Feature
from perennial.store import quality as records
from perennial.store.quality import Record

NOW = datetime(2020, 5, 1, tzinfo=UTC)
NUMBER = Feature(name="spend", type="number")
COUNTRY = Feature(name="country", type="category")


def numbers(count: int = 2000, seed: int = 0, shift: float = 0.0) -> pd.Series:
    return pd.Series(np.random.default_rng(seed).normal(size=count) + shift)


def judged(feature: Feature, now: pd.Series, before: pd.Series | None) -> quality.Quality:
    like = quality.profile(feature, before, None) if before is not None else None
    return quality.judge(feature, quality.profile(feature, now, like), now, like)


def some_null(values: pd.Series, share: float) -> pd.Series:
    return values.mask(np.arange(len(values)) < share * len(values))


@pytest.mark.parametrize(
    ("now", "verdict", "reason"),
    [
        pytest.param(numbers(seed=1), GOOD, "as before", id="is as before"),
        pytest.param(numbers(seed=1, shift=0.4), WARN, "stability index", id="moved a little"),
        pytest.param(numbers(seed=1, shift=1.5), BAD, "stability index", id="moved far"),
        pytest.param(some_null(numbers(seed=1), 0.2), WARN, "20.0% have no value", id="has gaps"),
        pytest.param(some_null(numbers(seed=1), 0.02), GOOD, "as before", id="has a few gaps"),
        pytest.param(pd.concat([numbers(seed=1), pd.Series([np.inf])]), BAD, "infinite", id="blew"),
    ],
)
def test_a_number_that(now: pd.Series, verdict: str, reason: str):
    found = judged(NUMBER, now, numbers())

    assert found.verdict == verdict
    assert reason in found.reason


def test_numbers_beyond_the_known_range_are_told():
    found = judged(NUMBER, pd.concat([numbers(seed=1), pd.Series([99.0] * 50)]), numbers())

    assert found.verdict == WARN
    assert "lie outside" in found.reason
    assert found.outside == pytest.approx(50 / 2050, abs=0.002)


def test_few_rows_that_differ_by_chance_are_no_drift():
    drifts = [judged(NUMBER, numbers(40, seed), numbers(60, 1000 + seed)) for seed in range(200)]

    large = [q for q in drifts if q.drift is not None and q.drift > quality.DRIFT_WARN]
    assert len(large) > 100
    assert sum("stability" in q.reason for q in drifts) <= 4


def test_a_category_that_grows_is_drift():
    before = pd.Series(["France"] * 500 + ["EIRE"] * 500)
    now = pd.Series(["France"] * 900 + ["EIRE"] * 50 + ["Norway"] * 50)

    found = judged(COUNTRY, now, before)

    assert found.verdict == BAD
    assert found.drift == pytest.approx(1.5, abs=0.3)


def test_the_index_is_that_of_its_formula():
    before = quality.Profile(100, 0, 0.0, 1.0, (0.5,), {"0": 50, "1": 50})
    now = quality.Profile(100, 0, 0.0, 1.0, (0.5,), {"0": 70, "1": 30})

    half = 0.5
    here, there = np.array([70 + half, 30 + half]) / 101, np.array([50 + half, 50 + half]) / 101
    wanted = ((here - there) * np.log(here / there)).sum()
    assert quality.stability_index(now, before) == pytest.approx(wanted)
    assert quality.stability_index(before, before) == 0.0


def test_a_feature_that_none_may_miss_is_bad_without_a_value():
    feature = Feature(name="spend", type="number", missing="fail")

    found = judged(feature, some_null(numbers(), 0.001), None)

    assert found.verdict == BAD
    assert "2 of 2,000 rows have no value" in found.reason


def test_the_first_one_has_nothing_to_compare_with():
    found = judged(NUMBER, numbers(), None)

    assert (found.verdict, found.drift, found.reason) == (GOOD, None, "nothing to compare with yet")


def test_the_worst_verdict_counts():
    def one(verdict: str) -> quality.Quality:
        return quality.Quality("x", quality.profile(NUMBER, numbers(), None), 0, None, verdict, "")

    assert quality.worst([one(GOOD), one(WARN)]) == WARN
    assert quality.worst([one(WARN), one(BAD), one(GOOD)]) == BAD
    assert quality.worst([one(GOOD)]) == GOOD


def test_a_column_without_any_value_can_be_measured():
    found = judged(NUMBER, pd.Series([np.nan] * 10), numbers())

    assert found.profile.null_rate == 1.0
    assert found.verdict == WARN


def record(feature: str, days: int, verdict: str = GOOD) -> Record:
    told: dict[str, Any] = asdict(quality.profile(NUMBER, numbers(50), None))
    told["edges"] = list(told["edges"])
    moment = NOW + timedelta(days=days)
    return Record(feature, moment, "run-1", verdict, "as before", 0.25, told)


def test_records_are_kept_and_the_one_before_is_found(engine: Engine):
    records.keep(engine, "shop", [record("spend", 0), record("orders", 0)], NOW)
    records.keep(engine, "shop", [record("spend", 7, BAD)], NOW)
    records.keep(engine, "bank", [record("spend", 3)], NOW)

    before = records.before(engine, "shop", NOW + timedelta(days=7))
    newest = records.newest(engine, "shop")

    assert {name: r.verdict for name, r in newest.items()} == {"spend": BAD, "orders": GOOD}
    assert before == {"spend": record("spend", 0), "orders": record("orders", 0)}
    assert records.before(engine, "shop", NOW) == {}


def test_a_record_of_the_same_moment_takes_the_place_of_the_old_one(engine: Engine):
    records.keep(engine, "shop", [record("spend", 0)], NOW)

    records.keep(engine, "shop", [record("spend", 0, BAD)], NOW)

    assert records.newest(engine, "shop")["spend"].verdict == BAD


def test_who_lost_the_lease_keeps_no_record(engine: Engine):
    def refuse(_connection: Any) -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        records.keep(engine, "shop", [record("spend", 0)], NOW, refuse)

    assert records.newest(engine, "shop") == {}
