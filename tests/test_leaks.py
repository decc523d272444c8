"""A feature that knows too much is named, and an honest one is left alone."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest

from perennial.data import alone, labels, leaks
from perennial.data.leaks import Leak, Limits, Table, View

COUNT = 2000
NOISE = np.random.default_rng(5).normal(size=COUNT)
START = pd.Timestamp("2020-01-01", tz="UTC")


def table(key: tuple[str, ...] = (), known_after: str = "0d", **columns: object) -> Table:
    """Rows an hour apart with a label that ``hint`` tells a little of."""
    rng = np.random.default_rng(0)
    times = START + pd.to_timedelta(range(COUNT), unit="h")
    hint = rng.normal(size=COUNT)
    label = (rng.random(COUNT) < 1 / (1 + np.exp(-hint))).astype(float)
    rows = pd.DataFrame({"event_time": times, "label": label, "hint": hint})
    rows["label_known_at"] = rows["event_time"] + pd.Timedelta(known_after)
    made = {name: value(rows) if callable(value) else value for name, value in columns.items()}
    rows = rows.assign(**made)
    return Table(rows, ("hint", *(n for n in columns if n not in key)), "churned", key)


def found(told: Table, **given: object) -> list[tuple[str, str, str]]:
    return [(leak.severity, leak.feature, leak.kind) for leak in leaks.check(told, **given)]


@cache
def data_set(name: str, data: Path, root: Path) -> planted.Set:
    return planted.read(name, data, root)


# Planted in public data


@pytest.mark.parametrize("case", planted.PLANTED, ids=str)
def test_a_planted_leak_is_blocked_under_its_name(case: str, data_folder: Path, root: Path):
    name, plant, feature = planted.PLANTED[case]

    told = leaks.check(plant(data_set(name, data_folder, root)))

    severity = "warning" if case == planted.NOT_FOUND else "critical"
    assert [leak.feature for leak in told if leak.severity == severity and feature in leak.feature]
    assert all(leak.measure > leak.limit for leak in told)


@pytest.mark.parametrize("name", planted.FILES)
def test_nothing_honest_is_blocked(name: str, data_folder: Path, root: Path):
    for told in planted.clean(data_set(name, data_folder, root)):
        assert [one for one in leaks.check(told) if one.severity == "critical"] == []


def test_the_honest_join_is_as_good_as_its_task_and_the_leaky_one_too_good(
    data_folder: Path, root: Path
):
    retail = data_set("retail", data_folder, root)

    honest, leaky = (planted.joined(retail, honest=h) for h in (True, False))

    assert leaks.check(honest) == ()
    assert 0.66 < leaks.learned(honest.rows, honest.features) < 0.76
    assert leaks.learned(leaky.rows, leaky.features) > 0.95
    first = leaks.check(leaky)[0]
    assert (first.kind, first.feature) == ("point in time", "recency_days, orders, spend")
    # Without the features' own clock, only a person can judge.
    assert ("warning", "recency_days", "together") in found(replace(leaky, views=()))


# One rule at a time


def test_a_table_without_leaks_is_silent():
    assert found(table(age=lambda r: np.arange(COUNT) % 60)) == []


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        pytest.param(lambda r: r["label"], "copy", id="the label"),
        pytest.param(lambda r: np.where(r["label"] > 0, "a", "b"), "copy", id="in other words"),
        pytest.param(lambda r: -r["label"] + r["hint"] / 9, "alone", id="turned and blurred"),
        pytest.param(
            lambda r: (r["label"] - 0.5).abs() * r["hint"] + 9 * r["label"], "alone", id="far apart"
        ),
        pytest.param(
            lambda r: np.where(r["label"] > 0, 5.0, np.arange(COUNT) % 2 * 10.0),
            "alone",
            id="between two others",
        ),
        pytest.param(lambda r: r["hint"].where(r["label"] > 0), "missing", id="there for one"),
    ],
)
def test_what_tells_the_label_alone_is_critical(column, kind: str):
    assert found(table(x=column))[0] == ("critical", "x", kind)


def test_a_feature_is_accused_once():
    assert found(table(churned_too=lambda r: r["label"])) == [("critical", "churned_too", "copy")]


def test_many_texts_that_each_name_a_row_tell_nothing():
    names = [f"customer {i}" for i in range(COUNT)]

    measured = alone.measure(pd.Series(names), table().rows["label"])

    assert measured.auc < 0.56


def test_a_few_labels_say_nothing():
    truth = pd.Series([1.0] * (alone.LEAST_EACH - 1) + [0.0] * 500)

    assert alone.measure(truth, truth).auc == 0.5
    assert alone.measure(pd.concat([truth, truth]), pd.concat([truth, truth])).auc == 1


def test_a_name_is_a_warning_and_with_a_raised_auc_a_leak():
    weak = table(churn_score=lambda r: np.arange(COUNT) % 7)
    strong = table(churn_score=lambda r: 1.5 * r["label"] + NOISE)

    assert found(weak) == [("warning", "churn_score", "name")]
    assert ("critical", "churn_score", "name") in found(strong)


@pytest.mark.parametrize(
    ("name", "target", "word"),
    [
        ("churnReason", "churned", "churn"),
        ("paid_after", "churned", "after"),
        ("outcome", "y", "outcome"),
        ("poutcome", "y", ""),
        ("previous_outcome", "y", ""),
        ("workclass", "class", ""),
        ("y_pos", "y", ""),
        ("MonthlyCharges", "Churn", ""),
    ],
)
def test_a_name_speaks_of_the_label(name: str, target: str, word: str):
    assert leaks.speaks_of(name, target) == word


def test_a_word_that_all_names_share_says_nothing():
    columns = {f"column_{i}": (lambda r: r["hint"]) for i in range(1, 9)}

    assert found(replace(table(**columns), target="column_15")) == []


def test_values_of_later_than_the_row_name_the_features_of_their_view():
    late = table(of=lambda r: r["event_time"].where(r.index > 0, r["event_time"].iloc[5]))
    told = replace(late, features=("hint",), views=(View("purchases", ("hint",), "of"),))

    (leak,) = leaks.check(told)

    assert (leak.severity, leak.feature, leak.kind) == ("critical", "hint", "point in time")
    assert leak.sentence.startswith("purchases gives hint values from after the row's time")


def test_values_of_the_very_moment_are_in_time():
    told = table(of=lambda r: r["event_time"])

    assert found(replace(told, features=("hint",), views=(View("v", ("hint",), "of"),))) == []


@pytest.mark.parametrize(("days", "is_leak"), [(3, True), (-3, False)])
def test_dates_after_the_row_are_a_leak(days: int, is_leak: bool):
    moved = pd.Timedelta(days=days)
    told = table(ended=lambda r: (r["event_time"] + moved).dt.strftime("%Y-%m-%d"))

    assert (("critical", "ended", "time") in found(told)) == is_leak


@pytest.mark.parametrize(
    ("known_after", "is_leak"),
    [pytest.param("2h", True, id="not known yet"), pytest.param("1h", False, id="known by then")],
)
def test_the_label_of_an_older_row_is_a_leak_until_it_is_known(known_after: str, is_leak: bool):
    told = table(known_after=known_after, before=lambda r: r["label"].shift(1))

    assert (("critical", "before", "early label") in found(told)) == is_leak


def test_the_label_of_an_older_row_of_the_same_customer_is_found():
    told = table(
        ("customer",),
        known_after="9d",
        customer=lambda r: np.arange(COUNT) % 9,
        before=lambda r: r["label"].shift(9),
    )

    assert ("critical", "before", "early label") in found(told)


def test_a_price_is_a_leak_where_the_label_says_how_it_moves():
    rng = np.random.default_rng(4)
    price = pd.Series(rng.normal(size=COUNT)).cumsum()
    up = (price > price.shift(1).rolling(24).mean()).astype(float)
    told = table(price=lambda r: price)
    rows = told.rows.assign(label=up)

    assert found(replace(told, rows=rows)) == [("critical", "price", "moves")]


@pytest.mark.parametrize(
    ("twice", "severity"),
    [pytest.param(5, "warning", id="few"), pytest.param(200, "critical", id="many")],
)
def test_rows_of_the_same_key_are_told(twice: int, severity: str):
    told = table(("customer",), customer=lambda r: np.arange(COUNT))
    rows = pd.concat([told.rows, told.rows.head(twice)])

    assert (severity, "customer, event_time", "key") in found(replace(told, rows=rows))


def test_newer_rows_that_older_ones_hold_are_a_warning():
    told = table()
    rows = pd.concat([told.rows.tail(300), told.rows])

    assert found(replace(told, rows=rows)) == [("warning", "event_time", "copies")]


@pytest.mark.parametrize(
    ("now", "vouched", "jumped"),
    [
        pytest.param(1.6, frozenset(), True, id="far better"),
        pytest.param(0.2, frozenset(), False, id="as before"),
        pytest.param(0.8, frozenset(), False, id="better, as one feature well may"),
        pytest.param(1.6, frozenset({"x"}), False, id="far better, as somebody knows"),
    ],
)
def test_a_feature_that_tells_far_more_than_last_time_is_a_warning(now, vouched, jumped):
    last = labels.learn(table(x=lambda r: 0.2 * r["label"] + NOISE))
    told = replace(table(x=lambda r: now * r["label"] + NOISE), vouched=vouched)

    change = labels.jumped(last, labels.learn(told), told)

    assert change and (change.is_broken, change.severity) == (jumped, "warning")
    assert not jumped or change.sentence.startswith("x alone tells")


def test_of_few_labels_no_feature_is_said_to_tell_more():
    told = table(x=lambda r: r["label"])
    few = labels.learn(replace(told, rows=told.rows.head(40)))

    assert labels.jumped(few, labels.learn(told), told) is None


def test_a_feature_that_somebody_vouches_for_is_accused_by_the_clock_only():
    known = frozenset({"x", "ended"})
    told = table(
        x=lambda r: r["label"],
        ended=lambda r: (r["event_time"] + pd.Timedelta("3d")).dt.strftime("%Y-%m-%d"),
    )

    assert found(replace(told, vouched=known)) == [("critical", "ended", "time")]


def test_limits_are_an_argument():
    told = table(x=lambda r: 2.5 * r["label"] + NOISE)

    assert ("critical", "x", "alone") in found(told)
    assert found(told, limits=Limits(alone=1, outweighs=1, together=1)) == []


def test_the_same_rows_give_the_same_answer_and_stay_as_they_are():
    told = table(x=lambda r: r["label"])
    before = told.rows.copy()

    assert leaks.check(told) == leaks.check(told)
    pd.testing.assert_frame_equal(told.rows, before)


@pytest.mark.parametrize("rows", [0, 1, 40], ids=["none", "one", "few"])
def test_too_few_rows_accuse_nobody(rows: int):
    told = table(x=lambda r: r["label"])

    assert leaks.check(replace(told, rows=told.rows.head(rows))) == ()


def test_a_table_whose_labels_are_not_known_accuses_nobody():
    told = table(x=lambda r: r["label"])

    assert leaks.check(replace(told, rows=told.rows.assign(label=np.nan))) == ()


def test_a_large_table_is_judged_by_rows_of_all_its_length():
    rows = leaks.spaced(pd.DataFrame({"x": range(10)}), 4)

    assert rows["x"].tolist() == [0, 3, 6, 9]


def test_a_sentence_names_the_feature_the_measure_the_limit_and_the_remedy():
    leak = leaks.check(table(x=lambda r: r["label"]))[0]

    assert leak.sentence == (
        "x is churned under another name: AUC 1.000, wanted at most 0.880; leave it out if it is"
        " filled in later"
    )
    assert isinstance(leak, Leak)


# Labels against the last accepted ones


def changes(last: Table, now: Table) -> dict[str, bool]:
    kept = labels.from_json(json.loads(json.dumps(labels.learn(last).as_json())))
    return {change.kind: change.is_broken for change in labels.judge(kept, now)}


def exchanged(told: Table) -> Table:
    return replace(told, rows=told.rows.assign(label=1 - told.rows["label"]))


@pytest.mark.parametrize("name", planted.FILES)
def test_labels_of_a_longer_history_come_as_before_and_exchanged_ones_do_not(
    name: str, data_folder: Path, root: Path
):
    whole = data_set(name, data_folder, root).table
    for part in (5, 6, 7, 8, 9):
        older, newer = (
            replace(whole, rows=whole.rows.head(len(whole.rows) * n // 10))
            for n in (part, part + 1)
        )

        assert changes(older, newer) == {"prior": False, "turned": False}
        assert changes(older, exchanged(newer))["turned"]


@pytest.mark.parametrize(
    ("positives", "rows", "is_broken"),
    [
        pytest.param(300, 1000, False, id="as before"),
        pytest.param(500, 1000, True, id="more"),
        pytest.param(100, 1000, True, id="fewer"),
        pytest.param(330_000, 1_000_000, False, id="certain but small"),
        pytest.param(9, 20, False, id="large by chance"),
    ],
)
def test_a_share_has_jumped_if_it_is_no_chance_and_matters(
    positives: int, rows: int, is_broken: bool
):
    change = labels.prior(positives, rows, 30_000, 100_000)

    assert change.is_broken == is_broken
    assert "30.0% of 100,000" in change.sentence


def test_a_label_that_is_always_the_same_has_jumped():
    told = table()
    always = replace(told, rows=told.rows.assign(label=1.0))

    assert changes(told, always) == {"prior": True}


def test_labels_that_nobody_knows_yet_are_not_judged():
    told = table()

    assert changes(told, replace(told, rows=told.rows.assign(label=np.nan))) == {}
