"""A guessed project is valid, says what to confirm, and leaves out what would give it away."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from perennial.data import guess, history, sources
from perennial.errors import BadInput
from perennial.project import Project


def read(text: str) -> Project:
    return Project.model_validate(yaml.safe_load(text))


def table(folder: Path, name: str = "customers.csv", **columns: object) -> Path:
    rng = np.random.default_rng(0)
    count = 400
    given: dict[str, object] = {
        "customer": [f"id-{i}" for i in range(count)],
        "age": rng.integers(18, 80, count),
        "plan": rng.choice(["basic", "plus", "pro"], count),
        "churned": rng.choice(["yes", "no"], count, p=[0.3, 0.7]),
    }
    path = folder / name
    pd.DataFrame(given | columns).to_csv(path, index=False)
    return path


def test_label_types_and_positive_value_are_guessed(tmp_path: Path):
    found = read(guess.guess(table(tmp_path), None))

    assert found.name == "customers"
    assert (found.label.column, found.label.positive) == ("churned", "yes")
    assert {f.name: f.type for f in found.features} == {"age": "number", "plan": "category"}


def test_every_guess_is_marked_for_confirmation(tmp_path: Path):
    lines = guess.guess(table(tmp_path), None).splitlines()

    for part in ("row_order:", "column: churned", "positive:", "known_after:", "window:"):
        assert any(part in line and "# confirm" in line for line in lines), part


def test_an_id_is_left_out_and_said_so(tmp_path: Path):
    text = guess.guess(table(tmp_path), None)

    assert "customer" not in read(text).feature_names
    assert "# confirm: customer is left out, each row has another value" in text


def test_a_column_that_gives_the_label_away_is_marked(tmp_path: Path):
    path = table(tmp_path)
    raw = pd.read_csv(path)
    raw["refund"] = (raw["churned"] == "yes") * 10.0 + np.arange(len(raw)) / 1000
    raw.to_csv(path, index=False)

    text = guess.guess(path, None)

    line = next(line for line in text.splitlines() if "name: refund" in line)
    assert "it alone tells the label" in line


@pytest.mark.parametrize(
    "form", [pytest.param("%Y-%m-%d", id="as dates"), pytest.param("%d/%m/%Y %H:%M", id="as words")]
)
def test_a_time_column_is_found(tmp_path: Path, form: str):
    days = pd.date_range("2021-01-01", periods=400, freq="D").strftime(form)

    found = read(guess.guess(table(tmp_path, seen=days), None))

    assert found.time.column == "seen"
    assert "seen" not in found.feature_names


def test_without_a_time_column_the_rows_are_in_order(tmp_path: Path):
    found = read(guess.guess(table(tmp_path), None))

    assert found.time.row_order is not None
    assert found.window.every == "80 rows"


def test_a_label_and_time_that_are_given_are_taken(tmp_path: Path):
    path = table(tmp_path, flag=[0, 1] * 200, day=pd.date_range("2021-01-01", periods=400))

    found = read(guess.guess(path, "mine", label="flag", time="day"))

    assert (found.name, found.label.column, found.label.positive) == ("mine", "flag", "1")
    assert found.time.column == "day"
    assert "churned" in found.feature_names


def test_a_table_without_a_two_valued_column_needs_a_label(tmp_path: Path):
    path = table(tmp_path, churned=range(400))

    with pytest.raises(BadInput, match="name one by --label COLUMN"):
        guess.guess(path, None)


def test_a_label_that_is_not_there_is_told_with_the_columns(tmp_path: Path):
    with pytest.raises(BadInput, match="no column left for --label; it has customer, age"):
        guess.guess(table(tmp_path), None, label="left")


@pytest.mark.parametrize(
    "name", ["2024 sales (final).csv", "Ünï.csv", "---.csv", "a" * 60 + ".csv"]
)
def test_any_file_name_gives_a_valid_project_name(tmp_path: Path, name: str):
    assert read(guess.guess(table(tmp_path, name), None)).name


@pytest.mark.parametrize("column", ["no", "a: b", "#hash", "emp.var.rate", "ta\tb", "1st", "'q'"])
def test_any_column_name_survives_the_yaml(tmp_path: Path, column: str):
    path = table(tmp_path, **{column: np.arange(400) % 7})

    assert column.strip() in read(guess.guess(path, None)).feature_names


def test_telco_is_guessed_right(data_folder: Path):
    path = data_folder / "Telco-Customer-Churn.csv.gz"

    found = read(guess.guess(path, None))
    rows = sources.table_rows(found, sources.read(found, None, data_folder))

    assert (found.label.column, found.label.positive) == ("Churn", "Yes")
    assert "customerID" not in found.feature_names
    assert found.window.every == "1000 rows"
    assert int(rows["TotalCharges"].isna().sum()) == 11
    assert round(rows["label"].mean(), 4) == 0.2654


def test_adult_is_guessed_right_without_a_header(data_folder: Path):
    path = data_folder / "adult-train.csv.gz"

    found = read(guess.guess(path, None))
    raw = sources.read(found, None, data_folder)
    rows = history.examples(found, raw, pd.Timestamp(0, tz="UTC").to_pydatetime(), None)

    assert not found.source.header
    assert (found.label.column, found.label.positive) == ("column_15", ">50K")
    assert len(rows) == 32_561
    assert rows["column_2"].iloc[0] == "State-gov"
    assert round(rows["label"].mean(), 3) == 0.241
