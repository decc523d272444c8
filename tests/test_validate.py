"""Data that breaks a critical expectation stops the run, and a page says why."""

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from contexts import AS_OF, Step, opened, written

from perennial.data import checks, expectations, labels, leaks, rules, sift, simulator, sources
from perennial.data.checks import Last, Validation
from perennial.errors import BadInput, RunFailed
from perennial.project import Expectation, Project, Simulator, load
from perennial.settings import Settings
from perennial.steps import validate
from perennial.store import accepted, quarantine


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(Path(__file__).parents[1] / "examples" / "retail")


@pytest.fixture(scope="module")
def purchases() -> pd.DataFrame:
    return simulator.simulate(Simulator(seed=5, days=60, customers=120))


def judged(project: Project, frame: pd.DataFrame, folder: Path, last: Last | None = None):
    return validate.check(project, written(folder, frame), last, folder)


@pytest.fixture
def step(settings: Settings, tmp_path: Path) -> Step:
    return Step(settings, tmp_path)


def expecting(*wanted: Expectation, **changes: Any) -> Project:
    return Project.model_validate(
        {
            "name": "few",
            "kind": "table",
            "time": {"row_order": {}},
            "label": {"column": "label"},
            "features": [{"name": "x", "type": "number"}],
            "training": {"min_rows": 50},
            "expectations": [e.model_dump() for e in wanted],
        }
        | changes
    )


FEW = pd.DataFrame({"x": range(100), "label": [0.0, 1.0] * 50})
FEW["event_time"] = pd.date_range("2011-01-01", periods=100, freq="h", tz="UTC").as_unit("us")
BELOW_98 = Expectation(
    expect="ExpectColumnValuesToBeBetween", args={"column": "x", "max_value": 97}
)


def test_invented_purchases_pass(step: Step, retail: Project, purchases: pd.DataFrame):
    checked = step(retail, purchases)

    assert checked.found.passed
    assert len(checked.found.findings) > 20
    # Some invented customers take the same thing twice.
    twice = purchases.duplicated()
    assert (checked.kept, checked.aside) == (len(purchases) - twice.sum(), twice.sum())
    kept = purchases[~twice].reset_index(drop=True)
    pd.testing.assert_frame_equal(pd.read_parquet(step.out.kept), kept)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda r: r.rename(columns={"UnitPrice": "Cost"}), "UnitPrice", id="no price"),
        pytest.param(lambda r: r.assign(UnitPrice=None), "UnitPrice", id="empty prices"),
        pytest.param(lambda r: r.assign(UnitPrice=-r["UnitPrice"]), "UnitPrice", id="negative"),
        pytest.param(
            lambda r: r.assign(UnitPrice=r["UnitPrice"].where(r.index % 20 > 0, -1.0)),
            r"UnitPrice: .* rows break it, such as -1.0",
            id="one price in twenty negative",
        ),
        pytest.param(
            lambda r: r.assign(UnitPrice="£" + r["UnitPrice"].astype(str)),
            "UnitPrice: ExpectColumnValuesToBeInTypeList fails: .*, such as £",
            id="prices as texts",
        ),
        pytest.param(
            lambda r: r.assign(CustomerID="C" + r["CustomerID"].astype(str)),
            "CustomerID: ExpectColumnValuesToBeInTypeList",
            id="customers as texts",
        ),
        pytest.param(
            lambda r: r.assign(InvoiceNo=range(len(r))),
            "Quantity: .* Can only use .str accessor",
            id="a rule that cannot be tried",
        ),
        pytest.param(lambda r: r.assign(UnitPrice=r["UnitPrice"] * 1e3), "Median", id="in pence"),
        pytest.param(lambda r: r.assign(Quantity=-r["Quantity"]), "Quantity", id="turned round"),
        pytest.param(lambda r: r.assign(CustomerID=17_000.0), "CustomerID", id="one customer"),
        pytest.param(lambda r: r.head(100), "RowCount", id="too few rows"),
    ],
)
def test_spoiled_purchases_stop_the_run_after_the_page_is_written(
    step: Step, retail: Project, purchases: pd.DataFrame, spoil, said: str
):
    with pytest.raises(RunFailed, match=said) as caught:
        step(retail, spoil(purchases))

    for name in re.findall(r"Expect\w+", str(caught.value)):
        assert name in step.page
    assert "Stopped" in step.page
    shown = Path(str(caught.value).rpartition("see file://")[2])
    assert shown.read_text() == step.page
    assert not step.out.kept.exists() and not step.out.aside.exists()
    assert step.batches(retail) == []


@pytest.mark.parametrize("severity", ["warning", "info"])
def test_what_is_not_critical_is_only_reported(step: Step, severity: str):
    wanted = Expectation(
        expect="ExpectColumnMaxToBeBetween", severity=severity, args={"column": "x", "max_value": 5}
    )

    found = step(expecting(wanted), FEW).found

    assert found.passed
    assert [f.expectation.severity for f in found.warnings] == [severity]


def test_a_failure_counts_the_rows_and_shows_examples(tmp_path: Path):
    wanted = Expectation(
        expect="ExpectColumnValuesToBeBetween", args={"column": "x", "max_value": 90}
    )

    found = judged(expecting(wanted), FEW, tmp_path)

    assert found.too_many and not found.passed
    assert "9 of 100 rows (9.00%) would be quarantined" in found.reason
    assert "x: ExpectColumnValuesToBeBetween" in found.reason
    assert "91 (row 92)" in found.reason


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        pytest.param(
            Expectation(expect="ExpectMiracles"), "ExpectMiracles is not", id="an unknown name"
        ),
        pytest.param(
            Expectation(expect="ExpectColumnToExist", args={"colum": "x"}),
            "ExpectColumnToExist has wrong args",
            id="a wrong argument",
        ),
    ],
)
def test_a_wrong_expectation_is_the_projects_fault(wanted: Expectation, said: str, tmp_path: Path):
    with pytest.raises(BadInput, match=said):
        judged(expecting(wanted), FEW, tmp_path)


def test_what_data_says_is_escaped_on_the_page(step: Step):
    wanted = Expectation(
        expect="ExpectColumnValuesToBeInSet",
        severity="warning",
        args={"column": "x", "value_set": ["a"]},
    )
    frame = FEW.assign(x="<script>alert(1)</script>")

    with pytest.raises(RunFailed, match="x: ExpectColumnValuesToBeInTypeList"):
        step(expecting(wanted), frame)

    assert "<script>alert" not in step.page


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "none"),
        (
            {
                "unreadable": {
                    "x": {"rows": 1234, "example": "<b>"},
                    "y": {"rows": 2, "example": "?"},
                }
            },
            "x: 1,234 rows, such as &#x27;&lt;b&gt;&#x27;; y: 2 rows, such as &#x27;?&#x27;",
        ),
    ],
    ids=["without any", "with some"],
)
def test_the_page_says_what_was_taken_as_missing(
    step: Step, settings: Settings, tmp_path: Path, body: dict[str, Any], said: str
):
    with opened(settings, expecting(), tmp_path) as ctx:
        ctx.ledger.append("run.started", project="few", subject="r1", body=body, now=ctx.now)

    step(expecting(), FEW)

    assert f"<td>values that are no number, taken as missing</td><td>{said}</td>" in step.page


# Rules that are queries of their own.


def query(text: str) -> Expectation:
    args = {"unexpected_rows_query": text}
    return Expectation(expect="UnexpectedRowsExpectation", layer="business", args=args)


def test_a_rule_between_rows_is_a_query(tmp_path: Path):
    risen = "select a.x from {batch} a where exists (select 1 from {batch} b where b.x = a.x + 90)"
    ordered = f"{risen} order by a.x"

    found = judged(expecting(query(ordered)), FEW, tmp_path)

    (finding,) = found.critical
    assert finding.unexpected == 10
    assert len(finding.examples) == 3
    assert "10 of 100 rows break it, such as x=0, x=1, x=2" in found.reason
    assert judged(expecting(query(risen + " and a.x > 10")), FEW, tmp_path).passed


def test_an_account_is_as_old_as_its_registration_says(tmp_path: Path):
    rule = query("select * from {batch} where age_days <> date_diff('day', registered, event_time)")
    days = [n % 90 for n in range(100)]
    accounts = FEW.assign(age_days=[float(day) for day in days])
    accounts["registered"] = accounts["event_time"] - pd.to_timedelta(days, unit="D")

    assert judged(expecting(rule), accounts, tmp_path).passed
    accounts.loc[[7, 9], "age_days"] += 30
    (finding,) = judged(expecting(rule), accounts, tmp_path).critical

    assert finding.unexpected == 2


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("select * from read_csv('{file}')", id="reads another file"),
        pytest.param("select 1); copy (select 1) to '{file}'; select (1", id="writes"),
        pytest.param("select x from {batch}); set memory_limit = '9GB'; (select 1", id="settings"),
        pytest.param("select nothing from {batch}", id="no such column"),
        pytest.param("attach '{file}'", id="attaches"),
        pytest.param(
            "select 1); copy (select 7 as x) to '{snapshot}' (format parquet, use_tmp_file false);"
            " select * from (select 1 where false",
            id="rewrites the snapshot",
        ),
        pytest.param(
            "select 1); copy (select 7 as x) to '{scratch}/new.csv';"
            " select * from (select 1 where false",
            id="writes beside it",
        ),
    ],
)
def test_a_query_sees_the_rows_and_nothing_else(tmp_path: Path, text: str):
    other = tmp_path.parent / "other.csv"
    other.write_text("a,b\n1,2\n")

    places = {"{file}": other, "{snapshot}": tmp_path / "snapshot", "{scratch}": tmp_path}
    for word, place in places.items():
        text = text.replace(word, str(place))

    found = judged(expecting(query(text)), FEW, tmp_path)

    assert "the query does not run" in found.reason
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "snapshot"), FEW)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]
    assert other.read_text() == "a,b\n1,2\n"


# Rows that are kept aside.


def test_rows_that_break_a_rule_are_kept_aside_and_the_others_go_on(step: Step):
    checked = step(expecting(BELOW_98), FEW)

    assert (checked.kept, checked.aside) == (98, 2)
    pd.testing.assert_frame_equal(pd.read_parquet(step.out.kept), FEW.head(98))
    put = pd.read_parquet(step.out.aside)
    assert put["quarantine_row"].tolist() == [99, 100]
    assert [list(rules) for rules in put["quarantine_rules"]] == [[checks.tell(BELOW_98)]] * 2
    assert put["quarantine_digest"].str.fullmatch("[0-9a-f]{64}").all()
    (batch,) = step.batches(expecting())
    assert (batch.id, batch.rows, batch.state) == (checked.batch, 2, quarantine.HELD)
    assert batch.rules == {checks.tell(BELOW_98): 2}
    assert f"perennial quarantine show {batch.id}" in step.page


def test_the_same_rows_are_kept_aside_once(step: Step):
    first = step(expecting(BELOW_98), FEW, run="r1")

    second = step(expecting(BELOW_98), FEW, run="r2")

    assert (second.batch, second.again) == ("", first.aside)
    assert "2 are in batches of earlier runs" in step.page
    assert [batch.run for batch in step.batches(expecting())] == ["r1"]


def test_a_rule_that_tolerates_some_rows_or_only_warns_keeps_them(tmp_path: Path):
    mostly = BELOW_98.model_copy(update={"args": BELOW_98.args | {"mostly": 0.9}})
    warning = BELOW_98.model_copy(update={"severity": "warning"})

    found = judged(expecting(mostly, warning), FEW, tmp_path)

    assert found.passed and not len(found.aside)
    assert [f.expectation.severity for f in found.warnings] == ["warning"]


def test_what_becomes_of_rows_can_be_said(tmp_path: Path):
    kept = BELOW_98.model_copy(update={"rows": "keep"})
    put = BELOW_98.model_copy(
        update={"rows": "quarantine", "args": BELOW_98.args | {"mostly": 0.9}}
    )

    assert not judged(expecting(kept), FEW, tmp_path).passed
    assert len(judged(expecting(put), FEW, tmp_path).aside) == 2


def test_rows_that_repeat_others_go_and_the_first_of_them_stays(tmp_path: Path):
    unique = Expectation(expect="ExpectColumnValuesToBeUnique", args={"column": "x"})
    frame = FEW.assign(x=FEW["x"].replace({10: 5, 11: 5}))

    found = judged(expecting(unique), frame, tmp_path)

    (finding,) = (f for f in found.findings if f.expectation == unique)
    assert (finding.unexpected, finding.surplus) == (3, 2)
    assert found.aside.tolist() == [10, 11]


def test_statistics_look_at_the_rows_that_go_on(tmp_path: Path):
    mean = Expectation(
        expect="ExpectColumnMaxToBeBetween",
        layer="statistics",
        args={"column": "x", "max_value": 97},
    )

    assert judged(expecting(BELOW_98, mean), FEW, tmp_path).passed
    assert not judged(expecting(mean), FEW, tmp_path).passed


def test_where_too_many_rows_would_go_the_others_are_not_accused(tmp_path: Path):
    other = Expectation(
        expect="ExpectColumnMeanToBeBetween",
        layer="statistics",
        args={"column": "y", "min_value": 1, "max_value": 3},
    )

    found = judged(expecting(BELOW_98, other), FEW.assign(x=999, y=2.0), tmp_path)

    assert found.too_many and found.critical == ()
    assert "x: Expect" in found.reason and "y" not in found.reason.split()


def test_labels_are_learned_of_the_rows_that_go_on(step: Step):
    rows = pd.concat([FEW] * 10, ignore_index=True)
    project = expecting(BELOW_98.model_copy(update={"args": BELOW_98.args | {"max_value": 100}}))
    odd = rows.index % 25 == 3

    checked = step(
        project, rows.assign(x=rows["x"].mask(odd, 999), label=rows["label"].mask(odd, 0))
    )

    assert (checked.kept, checked.aside) == (960, 40)
    with opened(step.settings, project, step.folder) as ctx:
        told = accepted.last(ctx.engine, project.name, AS_OF, "another")
    learned = labels.learn(leaks.of(project, rows[~odd])).as_json()
    assert told and told.observed["labels"] == json.loads(json.dumps(learned))


def test_a_feature_that_tells_the_label_far_better_than_last_time_is_a_warning(step: Step):
    rows, rng = pd.concat([FEW] * 4, ignore_index=True), np.random.default_rng(1)
    step(expecting(), rows.assign(x=rng.normal(size=400)), AS_OF)

    filled = rows.assign(x=rng.normal(size=400) + 3 * rows["label"])
    checked = step(expecting(), filled, AS_OF + timedelta(1))

    (remark,) = (one for one in checked.found.remarks if not one.passed)
    assert checked.found.passed and checked.kept == 400
    assert remark.severity == "warning" and remark.sentence.startswith("x alone tells label")
    assert "no feature tells the label much better" in step.page and "Stopped" not in step.page


def test_rows_are_spaced_evenly_among_those_that_stay(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("perennial.data.sift._BATCH", 7)
    path, gone = written(tmp_path, FEW), np.arange(10, 100, 10)
    stay = [x for x in range(100) if x not in gone]

    assert sift.spaced(path, ["x"], 30, gone)["x"].tolist() == stay[::4]
    assert sift.spaced(path, ["x"], 100, gone)["x"].tolist() == stay
    assert sift.spaced(path, ["x"], 10)["x"].tolist() == list(range(0, 100, 10))


def test_a_rule_that_great_expectations_judges_keeps_rows_aside_as_well(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("perennial.data.expectations._GROUP", 30)
    texts = FEW.assign(t=["2011-01-01"] * 95 + ["soon"] * 3 + [None] * 2)
    dates = Expectation(expect="ExpectColumnValuesToBeDateutilParseable", args={"column": "t"})

    found = judged(expecting(dates), texts, tmp_path)

    assert found.passed
    assert found.aside.tolist() == [95, 96, 97]
    assert found.findings[-1].examples == ("soon (row 96)", "soon (row 97)", "soon (row 98)")


def among(**args: Any) -> Expectation:
    given = {"column": "x", "max_value": 90, "condition_parser": "pandas"} | args
    return Expectation(expect="ExpectColumnValuesToBeBetween", args=given)


def gx(expect: str, **args: Any) -> Expectation:
    return Expectation(expect=f"Expect{expect}", args=args)


DIGITS = {"column": "t", "regex": r"^\d+$"}
PAIRS = [[n, 99 - n] for n in range(97)]


@pytest.mark.parametrize(
    ("wanted", "at_a_time"),
    [
        pytest.param(gx("ColumnValuesToMatchRegex", **DIGITS), 30, id="a pattern"),
        pytest.param(gx("ColumnValuesToMatchRegex", **DIGITS, mostly=0.9), 30, id="mostly"),
        pytest.param(gx("ColumnValuesToNotMatchRegex", **DIGITS), 30, id="no pattern"),
        pytest.param(
            gx("MulticolumnSumToEqual", column_list=["x", "y"], sum_total=99), 30, id="a sum"
        ),
        pytest.param(
            gx("ColumnPairValuesToBeInSet", column_A="x", column_B="y", value_pairs_set=PAIRS),
            30,
            id="pairs",
        ),
        pytest.param(among(row_condition="abs(y) < 3"), 30, id="a condition that calls"),
        pytest.param(among(row_condition="x > x.mean() + 45"), 100, id="above the mean"),
        pytest.param(among(row_condition="y in x", max_value=97), 100, id="among the others"),
        pytest.param(
            gx("ColumnValueZScoresToBeLessThan", column="x", threshold=1.7, double_sided=True),
            100,
            id="z-scores",
        ),
        pytest.param(gx("ColumnValuesToBeIncreasing", column="y"), 100, id="an order"),
    ],
)
def test_what_is_judged_some_rows_at_a_time_is_judged_as_all_together(
    tmp_path: Path, monkeypatch, wanted: Expectation, at_a_time: int
):
    frame = FEW.assign(
        x=FEW["x"] * 1.0,
        y=[99.0 - x if x != 64 else 0 for x in FEW["x"]],
        t=[str(x) if x % 40 else "a1" for x in FEW["x"]],
    )
    (at_once,) = expectations.judge([wanted], frame)
    monkeypatch.setattr("perennial.data.expectations._GROUP", 30)
    sizes, judge = [], expectations.judge
    monkeypatch.setattr(
        expectations, "judge", lambda w, rows: sizes.append(len(rows)) or judge(w, rows)
    )

    found = judged(expecting(wanted, quarantine={"max_share": 1}), frame, tmp_path).findings[-1]

    assert rules.translate(wanted, {"x": "number", "t": "text"}) is None
    assert found.unexpected == at_once.unexpected > 0
    assert found.aside.tolist() == at_once.positions.tolist() * (wanted.mostly == 1)
    rows = [int(re.search(r"\(row (\d+)\)", example)[1]) - 1 for example in found.examples]
    assert rows == at_once.positions[:3].tolist()
    assert max(sizes) == at_a_time


@pytest.mark.parametrize(
    ("condition", "columns"),
    [
        pytest.param("abs(x) > 90", ("x",), id="a function"),
        pytest.param("x.between(91, 99)", ("x",), id="a method"),
        pytest.param("90 < x and not (`a b` == 'none(x)')", ("x", "a b"), id="a name in backticks"),
        pytest.param("x in [91, 98, 99] or y == True", ("x", "y"), id="a list and a truth value"),
    ],
)
def test_a_condition_names_columns_and_calls_functions(
    tmp_path: Path, condition: str, columns: tuple[str, ...]
):
    args = BELOW_98.args | {"row_condition": condition, "condition_parser": "pandas"}
    wanted = BELOW_98.model_copy(update={"args": args})
    frame = FEW.assign(**{"a b": "some", "y": False})

    found = judged(expecting(wanted), frame, tmp_path)

    assert set(wanted.columns) == set(columns)
    assert found.aside.tolist() == [98, 99], found.reason


# What it was last time.


def of_last(**args: Any) -> Expectation:
    return Expectation(
        expect="ExpectColumnMeanToBeBetween", layer="statistics", args={"column": "x"} | args
    )


@pytest.mark.parametrize(
    ("wanted", "change", "kept"),
    [
        pytest.param(of_last(min_value={"of_last": 0.5}), 0.6, True, id="a little less"),
        pytest.param(of_last(min_value={"of_last": 0.5}), 0.4, False, id="far less"),
        pytest.param(of_last(max_value={"of_last": 2}), 3.0, False, id="far more"),
    ],
)
def test_a_snapshot_is_compared_with_the_last_accepted_one(
    step: Step, wanted: Expectation, change: float, kept: bool
):
    step(expecting(wanted), FEW.assign(x=FEW["x"] * 1.0), AS_OF)
    assert "compare with" in step.page

    later = FEW.assign(x=FEW["x"] * change)

    if kept:
        assert step(expecting(wanted), later, AS_OF + timedelta(1)).found.passed
    else:
        with pytest.raises(RunFailed, match="x: ExpectColumnMeanToBeBetween fails"):
            step(expecting(wanted), later, AS_OF + timedelta(1))
    assert "49.5" in step.page


def test_a_refused_snapshot_is_no_measure_for_the_next(step: Step):
    wanted = of_last(min_value={"of_last": 0.5})
    step(expecting(wanted), FEW, AS_OF)
    with pytest.raises(RunFailed):
        step(expecting(wanted), FEW.assign(x=FEW["x"] * 0.4), AS_OF + timedelta(1))

    with pytest.raises(RunFailed):
        step(expecting(wanted), FEW.assign(x=FEW["x"] * 0.3), AS_OF + timedelta(2))


def test_a_value_below_zero_may_fall_by_as_much_as_one_above():
    wanted = of_last(min_value={"of_last": 0.5})
    last = Last("d", "", 1, {checks.key(wanted): -10.0})

    assert checks.resolve(wanted, last).args["min_value"] == -15.0


ALIKE = Expectation(
    expect="ExpectColumnKLDivergenceToBeLessThan",
    layer="statistics",
    args={"column": "x", "partition_object": "last_accepted", "threshold": 0.5},
)
HALF = of_last(min_value={"of_last": 0.5})
SKEWED = Expectation(
    expect="ExpectColumnMeanToBeBetween",
    args={"column": "x", "min_value": {"of_last": 0.5}, "row_condition": "abs(x) > 5"},
)


@pytest.mark.parametrize(
    "wanted", [HALF, SKEWED, ALIKE], ids=["by DuckDB", "by Great Expectations", "a distribution"]
)
def test_it_is_told_why_there_is_nothing_to_compare_with(step: Step, wanted: Expectation):
    whole = FEW.assign(x=FEW["x"] * 1.0)
    warned = wanted.model_copy(update={"severity": "warning"})

    def told(project: Project, frame: pd.DataFrame, day: int) -> tuple[bool, str]:
        found = step(project, frame, AS_OF + timedelta(day)).found.findings[-1]
        return found.passed, found.detail

    assert told(expecting(wanted), whole, 0)[1].startswith("the first time: there is no accepted")
    step(expecting(), whole[:99], AS_OF + timedelta(1))
    holds, why = told(expecting(wanted), whole[:98], 2)
    assert holds and why.startswith("the first time for this rule: the last accepted snapshot was")
    assert told(expecting(warned), whole[:97].assign(x=np.nan), 3)[0] is False
    holds, why = told(expecting(wanted), whole[:96], 4)
    assert holds and why.startswith("the last accepted snapshot showed no value to compare with;")
    assert "no value" not in told(expecting(wanted), whole[:95], 5)[1]


@pytest.mark.parametrize("wanted", [HALF, SKEWED, ALIKE])
@pytest.mark.parametrize("times", [0, 1], ids=["the first time", "later"])
def test_a_column_without_values_breaks_a_rule_that_counts_from_last_time(
    step: Step, wanted: Expectation, times: int
):
    for day in range(times):
        step(expecting(wanted), FEW, AS_OF + timedelta(day))

    with pytest.raises(RunFailed, match=f"x: {wanted.expect} fails"):
        step(expecting(wanted), FEW.assign(x=np.nan), AS_OF + timedelta(times))


def last_times(found: Validation) -> list[Any]:
    return [f.last for f in found.findings if f.expectation.layer == "business"]


def about_rows(**args: Any) -> Expectation:
    return Expectation(
        expect="ExpectColumnValuesToBeBetween",
        layer="business",
        severity="warning",
        args={"column": "x"} | args,
    )


def test_what_a_rule_showed_last_time_outlives_a_change_of_its_limits(step: Step):
    step(expecting(about_rows(max_value=96)), FEW, AS_OF)

    changed = step(expecting(about_rows(max_value=90)), FEW[:99], AS_OF + timedelta(1))

    assert last_times(changed.found) == [3]
    assert "<td>3</td>" in step.page


def test_of_two_rules_of_one_name_each_knows_what_it_showed_itself(step: Step):
    two = (about_rows(max_value=96), about_rows(max_value=89))
    step(expecting(*two), FEW, AS_OF)

    again = step(expecting(*reversed(two)), FEW[:99], AS_OF + timedelta(1))
    changed = step(expecting(two[0], about_rows(max_value=88)), FEW[:98], AS_OF + timedelta(2))
    alone = step(expecting(about_rows(max_value=87)), FEW[:97], AS_OF + timedelta(3))

    assert last_times(again.found) == [10, 3]
    assert last_times(changed.found) == [2, None]
    assert last_times(alone.found) == [None]


@pytest.mark.parametrize("column", ["x", "t"])
def test_a_distribution_is_held_against_that_of_last_time(step: Step, column: str):
    wanted = Expectation(
        expect="ExpectColumnKLDivergenceToBeLessThan",
        layer="statistics",
        args={"column": column, "partition_object": "last_accepted", "threshold": 0.2},
    )
    rng = np.random.default_rng(1)
    frame = pd.concat([FEW] * 20, ignore_index=True)
    frame = frame.assign(x=rng.normal(size=2000), t=rng.choice(["a", "b", "c"], 2000))
    again = frame.assign(x=rng.normal(size=2000), t=rng.choice(["a", "b", "c"], 2000))
    other = frame.assign(x=rng.normal(2, size=2000), t=rng.choice(["a", "z"], 2000))
    step(expecting(wanted), frame, AS_OF)

    assert step(expecting(wanted), again, AS_OF + timedelta(1)).found.passed
    with pytest.raises(RunFailed, match=f"{column}: ExpectColumnKLDivergence.*divergence of"):
        step(expecting(wanted), other, AS_OF + timedelta(2))


@pytest.mark.parametrize("value", [{"of_last": 0}, {"of_last": "x"}, {"of_last": 1, "or": 2}])
def test_an_odd_comparison_is_refused_with_the_project(value: dict[str, Any]):
    with pytest.raises(ValueError, match="of_last: a number above 0"):
        of_last(min_value=value)


def test_a_rule_about_rows_cannot_count_from_last_time(tmp_path: Path):
    args = {"column": "x", "max_value": {"of_last": 2}}
    wanted = Expectation(expect="ExpectColumnValuesToBeBetween", args=args)

    with pytest.raises(BadInput, match="is about single rows, so its max_value"):
        judged(expecting(wanted), FEW, tmp_path)


def test_a_number_without_end_fails_what_it_makes_senseless_and_nothing_else(step: Step):
    spread = Expectation(
        expect="ExpectColumnStdevToBeBetween", severity="warning", args={"column": "x"}
    )
    spread = spread.model_copy(update={"args": spread.args | {"max_value": 100}})
    least = Expectation(
        expect="ExpectColumnMinToBeBetween", args={"column": "x", "min_value": 0, "max_value": 5}
    )
    alike = Expectation(
        expect="ExpectColumnKLDivergenceToBeLessThan",
        args={"column": "x", "partition_object": "last_accepted", "threshold": 0.5},
    )
    frame = FEW.assign(x=FEW["x"].astype(float))
    frame.loc[50, "x"] = np.inf

    found = step(expecting(spread, least, alike), frame).found

    assert [f.expectation for f in found.warnings] == [spread]
    assert "cannot be computed" in found.warnings[0].detail
    assert step(expecting(spread, least, alike), frame, AS_OF + timedelta(1)).found.passed


# The real file.


@pytest.fixture(scope="module")
def real(data_folder: Path, retail: Project, tmp_path_factory) -> Iterator[Validation]:
    raw = sources.read(retail, str(data_folder / "online_retail.parquet"), data_folder)
    yield judged(retail, raw, tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize(
    ("rule", "rows", "surplus"),
    [
        pytest.param("ExpectCompoundColumnsToBeUnique", 10_147, 5_268, id="repeats"),
        pytest.param("UnitPrice, min_value=0, strict_min=True", 2_517, 2_517, id="no price"),
        pytest.param("InvoiceNo, regex=^C", 9_288, 9_288, id="cancellations"),
        pytest.param("NotBeNull(column=Description", 1_454, 1_454, id="no description"),
        pytest.param("NotBeNull(column=CustomerID, mostly=0.5", 135_080, 135_080, id="no customer"),
    ],
)
def test_the_known_faults_of_the_real_file_are_counted_to_the_row(
    real: Validation, rule: str, rows: int, surplus: int
):
    (found,) = (f for f in real.findings if rule in f.rule)

    assert (found.unexpected, found.surplus) == (rows, surplus)
    assert len(found.examples) == 3


def test_of_the_real_file_only_repeats_are_kept_aside(real: Validation):
    assert real.passed
    assert (real.rows, len(real.aside)) == (541_909, 5_268)
