"""What is proposed for a table is kept by it, and broken by what is usually wrong with data."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from contexts import written

from perennial import cli
from perennial.data import checks, suggest
from perennial.data.checks import Last
from perennial.project import Expectation, Project

GIVEN = {
    "name": "shop",
    "kind": "table",
    "time": {"row_order": {}},
    "label": {"column": "label"},
    "features": [{"name": "price", "type": "number"}],
}


def frame(seed: int = 1) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    count = 2000
    some = rng.random(count) < 0.2
    return pd.DataFrame(
        {
            "customer_id": rng.integers(1, 400, count),
            "price": rng.gamma(2, 10, count).round(2),
            "delta": rng.normal(0, 5, count).round(1),
            "colour": rng.choice(["red", "green", "blue"], count),
            "street": [f"street {i}" for i in rng.integers(0, 900, count)],
            "age": np.where(some, np.nan, rng.integers(18, 90, count)),
            "constant": 4.0,
            "town": rng.choice([f"town {i}" for i in range(40)], count),
            "bought": pd.to_datetime("2011-04-01", utc=True)
            + pd.to_timedelta(rng.integers(0, 90, count), "D"),
        }
    )


def last(rules: tuple[Expectation, ...], folder: Path) -> Last:
    found = check(rules, frame(), folder, None)
    return Last("d", "", found.rows, found.observed)


def check(rules, rows: pd.DataFrame, folder: Path, before: Last | None) -> checks.Validation:
    project = Project.model_validate(GIVEN | {"expectations": [r.model_dump() for r in rules]})
    return checks.check(project, written(folder, rows), (), before, folder)


def day_for_month(day: pd.Timestamp) -> pd.Timestamp:
    return day.replace(day=day.month, month=day.day) if day.day <= 12 else day


@pytest.fixture
def rules(tmp_path: Path) -> tuple[Expectation, ...]:
    return suggest.suggest(written(tmp_path, frame()), tmp_path)


def test_the_table_itself_and_its_like_keep_what_is_proposed(rules, tmp_path: Path):
    before = last(rules, tmp_path)

    for seed in (1, 2, 3):
        found = check(rules, frame(seed), tmp_path, before)
        assert not found.critical and found.share < 0.01, found.reason


@pytest.mark.parametrize(
    ("spoil", "column"),
    [
        pytest.param(lambda f: f.assign(price=f["price"] * 100), "price", id="in pence"),
        pytest.param(lambda f: f.assign(price=-f["price"]), "price", id="negative"),
        pytest.param(lambda f: f.assign(age=np.nan), "age", id="all missing"),
        pytest.param(lambda f: f.assign(age=f["price"], price=f["age"]), "price", id="swapped"),
        pytest.param(lambda f: f.assign(colour=f["colour"].str.upper()), "colour", id="capitals"),
        pytest.param(lambda f: f.assign(street="nowhere"), "street", id="one street"),
        pytest.param(lambda f: f.assign(town=f["town"].str.upper()), "town", id="many capitals"),
        pytest.param(lambda f: f.assign(age=f["age"].where(f.index % 5 < 2)), "age", id="gaps"),
        pytest.param(
            lambda f: f.assign(bought=f["bought"].map(day_for_month)), "bought", id="day for month"
        ),
        pytest.param(lambda f: f.drop(columns="delta"), "delta", id="no column"),
        pytest.param(lambda f: f.head(300), "the table", id="few rows"),
    ],
)
def test_what_is_proposed_stops_broken_tables(rules, tmp_path: Path, spoil, column: str):
    before = last(rules, tmp_path)

    found = check(rules, spoil(frame()), tmp_path, before)

    assert not found.passed
    assert f"{column}: Expect" in found.reason


def test_what_is_often_missing_may_be_so_somewhat_more_often(rules, tmp_path: Path):
    rows = frame().assign(age=lambda f: f["age"].where(f.index % 6 > 0))

    assert check(rules, rows, tmp_path, last(rules, tmp_path)).passed


def test_few_values_come_and_go(rules, tmp_path: Path):
    rows = frame().assign(
        town=lambda f: f["town"].replace({f"town {i}": "town 0" for i in range(24)})
    )
    before = last(rules, tmp_path)

    found = check(rules, rows, tmp_path, before)

    failed = [f.expectation.expect for f in found.critical]
    assert "ExpectColumnUniqueValueCountToBeBetween" not in failed


def test_times_of_rows_that_are_only_counted_have_no_beginning(tmp_path: Path):
    path = written(tmp_path, frame().rename(columns={"bought": "event_time"}))

    def begins(**how: bool) -> list[str]:
        found = suggest.suggest(path, tmp_path, **how)
        return [
            str(r.args["min_value"])
            for r in found
            if r.args.get("column") == "event_time" and r.args.get("min_value")
        ]

    assert begins() == ["2011-02-15 00:00:00+00:00"]
    assert begins(is_timed=False) == []


def test_proposals_are_a_part_of_a_project(rules, tmp_path: Path):
    text = suggest.as_yaml(rules)

    read = Project.model_validate(GIVEN | yaml.safe_load(text))

    assert read.expectations == rules


def test_ids_have_no_range(rules):
    of_ids = [rule for rule in rules if rule.args.get("column") == "customer_id"]

    assert [rule.expect for rule in of_ids] == ["ExpectColumnValuesToNotBeNull"]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        pytest.param([np.inf, 1.0, 3.0], {"min_value": 0.0}, id="upwards"),
        pytest.param([-np.inf, -3.0, -1.0], {"max_value": 0.0}, id="downwards"),
        pytest.param([-np.inf, 1.0, np.inf], None, id="both ways"),
        pytest.param([np.inf, np.inf, np.nan], None, id="in each row"),
        pytest.param([1e308, -1e308, 1.7e308], None, id="when the range grows"),
        pytest.param([5, 2**60, 7], {"min_value": 0.0, "max_value": 1.8e18}, id="not at all"),
    ],
)
def test_numbers_without_end_have_no_limit_there(tmp_path: Path, values: list, wanted):
    rows = pd.DataFrame({"price": values * 100})

    found = suggest.suggest(written(tmp_path, rows), tmp_path)

    between = [rule.args for rule in found if rule.expect == "ExpectColumnValuesToBeBetween"]
    assert between == ([{"column": "price", **wanted}] if wanted else [])
    assert "nan" not in suggest.as_yaml(found) and "inf" not in suggest.as_yaml(found)
    assert not check(found, rows, tmp_path, None).critical


def test_the_command_prints_rules_for_a_file(tmp_path: Path, settings, root: Path, capsys):
    rows = frame().assign(label=[0, 1] * 1000).rename(columns={"label": "y"})
    rows.to_csv(tmp_path / "shop.csv", index=False)
    given = GIVEN | {"source": {"path": "shop.csv"}, "label": {"column": "y"}}
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(given))

    assert cli.main(["expectations", "suggest", str(tmp_path)]) == 0

    told = capsys.readouterr().out
    assert told.startswith("# ")
    assert {"column": "price"}.items() <= yaml.safe_load(told)["expectations"][1]["args"].items()
