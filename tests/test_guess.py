"""A guessed project is valid, says what to confirm, and leaves out what would give it away."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from perennial.data import alone, guess, history, sources
from perennial.errors import BadInput
from perennial.project import Project, load

COUNT = 1000
RNG = np.random.default_rng(0)
CHURNED = RNG.choice(["yes", "no"], COUNT, p=[0.3, 0.7])


def read(text: str) -> Project:
    return Project.model_validate(yaml.safe_load(text))


def frame(**given: Any) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    usual = {
        "customer": [f"K-{i}" for i in range(COUNT)],
        "age": rng.integers(18, 80, COUNT),
        "plan": rng.choice(["basic", "plus", "pro"], COUNT),
        "churned": CHURNED,
    }
    return pd.DataFrame(usual | given)


def table(folder: Path, name: str = "customers.csv", **given: Any) -> Path:
    path = folder / name
    frame(**given).to_csv(path, index=False)
    return path


def line_of(text: str, part: str) -> str:
    return next(line for line in text.splitlines() if part in line)


def test_label_types_and_positive_value_are_guessed(tmp_path: Path):
    found = read(guess.guess(table(tmp_path)))

    assert found.name == "customers"
    assert (found.label.column, found.label.positive) == ("churned", "yes")
    assert {f.name: f.type for f in found.features} == {"age": "number", "plan": "category"}
    assert found.source.path == str(tmp_path / "customers.csv")
    assert (found.training.trials, found.replay.train_share) == (10, 0.4)


def test_every_guess_is_marked_for_confirmation(tmp_path: Path):
    text = guess.guess(table(tmp_path))

    for part in ("row_order:", "column: churned", "positive:", "known_after:", "features:"):
        assert "# confirm: " in line_of(text, part), part
    for part in ("window:", "gates:", "retraining:", "expectations:", "customer,"):
        assert "# confirm: " in line_of(text, part), part


def test_every_hint_may_be_taken_up_by_deleting_its_mark(tmp_path: Path):
    text = guess.guess(table(tmp_path, gender=RNG.choice(["f", "m"], COUNT)))

    taken = re.sub(r"^#(?=  - |sensitive:)", "", text, flags=re.M)
    taken = taken.replace("#drift: {ignore: [COLUMN]}", "drift: {ignore: [age]}")

    found = read(taken)
    assert "customer" in found.feature_names
    assert found.sensitive == ("age", "gender")
    assert found.drift.ignore == ("age",)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        pytest.param({"plan_b": ["x", "y"]}, "churned", id="usual name wins over the last one"),
        pytest.param({"Target": [0, 1], "Y": [0, 1]}, "churned", id="surest name wins"),
        pytest.param({"churned": range(2, 4), "Churn Value": [0, 1]}, "churned", id="whole name"),
        pytest.param({"churned": range(5), "ChurnFlag": [0, 1]}, "ChurnFlag", id="word in a name"),
        pytest.param({"churned": range(5), "Y": [0, 1], "z": [0, 1]}, "Y", id="in capitals"),
        pytest.param({"churned": range(5), "one": [0, 1], "two": [0, 1]}, "two", id="last of two"),
    ],
)
def test_the_label_is_the_column_with_the(tmp_path: Path, labels: dict[str, Any], wanted: str):
    cycled = {name: np.resize(list(values), COUNT) for name, values in labels.items()}
    shuffled = {name: RNG.permutation(values) for name, values in cycled.items()}

    assert read(guess.guess(table(tmp_path, **shuffled))).label.column == wanted


@pytest.mark.parametrize(
    ("values", "positive"),
    [
        pytest.param(["No", "Yes", "Yes"], "Yes", id="yes"),
        pytest.param([True, False, True], "True", id="true"),
        pytest.param([1, 0, 1], "1", id="1"),
        pytest.param([1.0, 0.0, np.nan], "1", id="1 among blanks"),
        pytest.param(["<=50K", ">50K", ">50K"], ">50K", id="the one above"),
        pytest.param(["b", "a", "b"], "a", id="the rarer one"),
    ],
)
def test_what_counts_as_1_is(tmp_path: Path, values: list[Any], positive: str):
    path = table(tmp_path, churned=np.resize(np.array(values, dtype=object), COUNT))

    assert read(guess.guess(path)).label.positive == positive


def test_a_label_and_time_that_are_given_are_taken(tmp_path: Path):
    days = pd.date_range("2021-01-01", periods=COUNT, freq="8h")
    path = table(tmp_path, flag=RNG.choice([0, 1], COUNT), day=days, other=days)

    found = read(guess.guess(path, "mine", label="flag", time="other"))

    assert (found.name, found.label.column, found.label.positive) == ("mine", "flag", "1")
    assert found.time.column == "other"
    assert "churned" in found.feature_names


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param({"label": "left"}, "no column left for --label; it has customer, age", id="l"),
        pytest.param({"time": "when"}, "no column when for --time; it has customer, age", id="t"),
        pytest.param({"label": "plan"}, "column plan of .* has 3 different values, wanted", id="3"),
        pytest.param({"time": "age"}, "age is no date in 1,000 of 1,000 rows", id="no time"),
        pytest.param({"name": "2020 Sales"}, "'2020 Sales' cannot name .* --name", id="name"),
    ],
)
def test_what_is_given_wrong_is_told_with_the_remedy(
    tmp_path: Path, given: dict[str, str], said: str
):
    with pytest.raises(BadInput, match=said) as caught:
        guess.guess(table(tmp_path), **given)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        pytest.param({"churned": range(COUNT)}, "name it by --label COLUMN", id="has no label"),
        pytest.param({"age": 3, "plan": "a"}, "can tell churned: customer:", id="has no feature"),
    ],
)
def test_a_table_is_refused_that(tmp_path: Path, made: dict[str, Any], said: str):
    with pytest.raises(BadInput, match=said):
        guess.guess(table(tmp_path, **made))


def test_a_table_with_too_few_rows_is_refused(tmp_path: Path):
    path = tmp_path / "few.csv"
    frame().head(599).to_csv(path, index=False)

    with pytest.raises(BadInput, match="has 599 rows, wanted at least 600"):
        guess.guess(path)


@pytest.mark.parametrize(
    ("name", "values", "why"),
    [
        pytest.param("Id", [1, 2, 3], "names a row", id="an id by its name"),
        pytest.param("shop_id", [1, 2, 3], "names a row", id="an id of few values"),
        pytest.param("key", [f"k{i}" for i in range(COUNT)], "names a row", id="an id by values"),
        pytest.param("n", range(7, 7 + COUNT), "only rises", id="a row number"),
        pytest.param("town", [f"t{i}" for i in range(51)], "51 different texts", id="many texts"),
        pytest.param("one", ["a"], "always the same", id="one value"),
        pytest.param("void", [None], "always the same", id="nothing"),
        pytest.param("big", [1.5, 2.5, np.inf], "infinite", id="infinite numbers"),
        pytest.param("born", ["1980-02-01", "1979-12-24", None], "dates", id="dates in some rows"),
        pytest.param("event_time", [1, 2, 3], "its name is taken", id="a name of our own"),
        pytest.param("x[1]", [1, 2, 3], "one of", id="a name XGBoost refuses"),
        pytest.param("a: b", [1, 2, 3], "one of", id="a name Feast splits"),
        pytest.param("a\tb", [1, 2, 3], "line break", id="a name in two parts"),
        pytest.param("AGE", [1, 2, 3], "only capitals tell it from age", id="a name twice"),
    ],
)
def test_left_out_with_its_reason_is(tmp_path: Path, name: str, values: Any, why: str):
    text = guess.guess(table(tmp_path, **{name: np.resize(np.array(values, object), COUNT)}))

    assert name not in read(text).feature_names
    assert re.search(rf"^#.*# confirm: .*{why}", text, flags=re.M)


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param((CHURNED == "yes") * 10.0 + RNG.normal(size=COUNT), id="a number"),
        pytest.param(np.where(CHURNED == "yes", 2, RNG.choice([1, 3], COUNT)), id="a code"),
        pytest.param(np.where(CHURNED == "yes", "moved", None), id="a reason"),
    ],
)
def test_a_column_that_tells_the_label_alone_is_left_out(tmp_path: Path, leak: Any):
    text = guess.guess(table(tmp_path, refund=leak))

    assert "refund" not in read(text).feature_names
    assert "tells the label all alone (AUC" in line_of(text, "refund")


def test_a_column_that_only_tells_much_stays():
    truth = pd.Series(CHURNED == "yes", dtype="float64")
    strong = truth * 1.7 + RNG.normal(size=COUNT)

    assert 0.85 < alone.measure(strong, truth).auc < alone.limit(strong)


@pytest.mark.parametrize("name", ["paid", "arid", "valid", "identity", "Video"])
def test_a_name_that_only_ends_like_an_id_is_a_feature(tmp_path: Path, name: str):
    path = table(tmp_path, **{name: RNG.integers(0, 9, COUNT)})

    assert name in read(guess.guess(path)).feature_names


def test_numbers_that_stand_as_texts_are_numbers(tmp_path: Path):
    texts = frame()["age"].astype(str).mask(frame().index % 97 == 0, " ")
    path = tmp_path / "texts.parquet"
    frame(total=texts).to_parquet(path)

    found = read(guess.guess(path))

    assert {f.name: f.type for f in found.features}["total"] == "number"
    rows = sources.table_rows(found, sources.read(found, None, tmp_path))
    assert rows["total"].isna().sum() == 11


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("%Y-%m-%d", id="as ISO dates"),
        pytest.param("%d/%m/%Y %H:%M", id="day first"),
        pytest.param("%m/%d/%Y", id="month first"),
        pytest.param("%d %b %Y", id="in words"),
    ],
)
def test_a_time_column_is_found(tmp_path: Path, form: str):
    days = pd.date_range("2021-01-01", periods=COUNT, freq="8h")

    found = read(guess.guess(table(tmp_path, seen=days.strftime(form))))

    assert found.time.column == "seen"
    assert "seen" not in found.feature_names
    rows = sources.table_rows(found, sources.read(found, None, tmp_path))
    assert rows["row_id"].is_monotonic_increasing, "days and months were mixed up"


def test_a_date_of_birth_is_no_clock_where_another_is(tmp_path: Path):
    days = pd.date_range("2021-01-01", periods=COUNT, freq="8h")
    path = table(tmp_path, birth_date=days.shift(-9999), signed=days)

    assert read(guess.guess(path)).time.column == "signed"


@pytest.mark.parametrize("words", [["may", "jun"], ["mon", "tue"], ["1.2.3", "1.2.4"], [2011, 12]])
def test_no_time_are(tmp_path: Path, words: list[Any]):
    found = read(guess.guess(table(tmp_path, when=RNG.choice(np.array(words, object), COUNT))))

    assert found.time.row_order is not None
    assert "when" in found.feature_names


def test_dates_in_nearly_all_rows_are_told_but_not_taken(tmp_path: Path):
    days = pd.date_range("2021-01-01", periods=COUNT, freq="8h").astype(str).to_series()
    days.iloc[5] = None

    text = guess.guess(table(tmp_path, seen=days.to_numpy()))

    assert read(text).time.row_order is not None
    assert "# seen holds dates, but not in every row" in text


@pytest.mark.parametrize(
    ("rows", "freq", "every"),
    [
        pytest.param(20_000, "1min", "1d", id="days of 1,440 rows"),
        pytest.param(20_000, "10min", "7d", id="weeks of 1,008 rows"),
        pytest.param(8_000, "1h", "month", id="months of 730 rows"),
        pytest.param(9_000, "8h", "91d", id="quarters of 273 rows"),
        pytest.param(20_000, "3s", "1h", id="hours of 1,200 rows"),
    ],
)
def test_windows_of_about_a_thousand_rows_are(rows: int, freq: str, every: str):
    found = guess._in_time(pd.Series(pd.date_range("2021-01-04", periods=rows, freq=freq)))

    assert found.every == every
    assert found.min_rows == 100


@pytest.mark.parametrize(
    ("rows", "every", "warned"),
    [(600, "200 rows", True), (3000, "600 rows", True), (5000, "1000 rows", False)],
)
def test_a_small_table_gets_small_windows_and_a_warning(rows: int, every: str, warned: bool):
    found = guess._in_rows(rows)

    assert found.every == every
    assert ("by chance" in found.comment) == warned


def test_a_history_of_a_moment_gives_no_windows(tmp_path: Path):
    with pytest.raises(BadInput, match="too few to cut a history into windows"):
        guess.guess(table(tmp_path, seen="2021-01-01"))


@pytest.mark.parametrize(
    ("text", "headed"),
    [
        pytest.param("age,plan\n1,a\n2,b\n", True, id="names"),
        pytest.param("1,a\n1,a\n2,b\n", False, id="a number over numbers"),
        pytest.param("1,a,1\n1,a,1\n2,b,3\n", False, id="the same number twice"),
        pytest.param("a,x\nb,x\na,y\n", False, id="texts that come again"),
        pytest.param("plan,kind\nb,x\na,y\n", True, id="texts that do not"),
        pytest.param("2019,2020,name\n1,2,a\n3,4,b\n", False, id="only years over numbers"),
    ],
)
def test_a_first_line_is_read_as_a_header_only_with(tmp_path: Path, text: str, headed: bool):
    path = tmp_path / "lines.csv"
    path.write_text(text)

    assert guess._read(path)[1] is headed


@pytest.mark.parametrize(
    "name", ["2024 sales (final).csv", "Ünï.csv", "---.csv", "a" * 60 + ".csv"]
)
def test_any_file_name_gives_a_valid_project_name(tmp_path: Path, name: str):
    assert read(guess.guess(table(tmp_path, name))).name


@pytest.mark.parametrize("column", ["no", "#hash", "emp.var.rate", "1st", "'q'", 'a "b"', "größe"])
def test_any_column_name_survives_the_yaml(tmp_path: Path, column: str):
    path = table(tmp_path, **{column: np.arange(COUNT) % 7})

    assert column in read(guess.guess(path)).feature_names


def test_what_the_file_holds_cannot_leave_its_comment(tmp_path: Path):
    path = tmp_path / "odd.parquet"
    odd = np.where(np.arange(COUNT) % 3 == 0, "a\nname: evil", "b\u2028kind: evil")
    frame(**{"odd": odd, "x\nname: evil": odd}).to_parquet(path)

    assert read(guess.guess(path)).name == "odd"


def test_telco_is_guessed_right(data_folder: Path, tmp_path: Path):
    (tmp_path / "project.yaml").write_text(
        guess.guess(data_folder / "Telco-Customer-Churn.csv.gz", "telco")
    )

    found = load(tmp_path)
    rows = sources.table_rows(found, sources.read(found, None, tmp_path))

    assert (found.label.column, found.label.positive) == ("Churn", "Yes")
    assert "customerID" not in found.feature_names
    assert found.window.every == "1000 rows"
    assert int(rows["TotalCharges"].isna().sum()) == 11
    assert round(rows["label"].mean(), 4) == 0.2654


def test_adult_is_guessed_right_without_a_header(data_folder: Path):
    path = data_folder / "adult-train.csv.gz"

    text = guess.guess(path)

    found = read(text)
    raw = sources.read(found, None, data_folder)
    rows = history.examples(found, raw, datetime(2000, 1, 1, tzinfo=UTC), None)
    assert not found.source.header
    assert (found.label.column, found.label.positive) == ("column_15", ">50K")
    assert len(rows) == 32_561
    assert rows["column_2"].iloc[0] == "State-gov"
    assert round(rows["label"].mean(), 3) == 0.241
    assert "#sensitive: [column_9, column_10]" in text


@pytest.mark.parametrize(
    ("name", "label", "count"),
    [
        pytest.param("bank-additional-full.csv.gz", ("y", "yes"), 20, id="bank"),
        pytest.param("elec.csv.gz", ("class", "1"), 6, id="Elec2"),
    ],
)
def test_guessed_right_as_well_is(data_folder: Path, name: str, label: tuple[str, str], count: int):
    found = read(guess.guess(data_folder / name))

    assert (found.label.column, found.label.positive) == label
    assert len(found.features) == count
    assert found.time.row_order is not None


def test_raw_purchases_have_no_label_to_guess(data_folder: Path):
    with pytest.raises(BadInput, match="--label COLUMN"):
        guess.guess(data_folder / "online_retail.parquet")
