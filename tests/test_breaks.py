"""A fault breaks a copy of a file as it says, the same way for the same seed, and nothing else."""

import gzip
import os
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perennial import cli
from perennial.data import breaks, sources
from perennial.errors import BadInput

ROWS = 400


def given() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=ROWS, freq="D")
    return pd.DataFrame(
        {
            "when": days,
            "age": rng.integers(18, 80, ROWS),
            "spend": rng.normal(50, 9, ROWS).round(2),
            "plan": rng.choice(["basic", "plus"], ROWS, p=[0.7, 0.3]),
            "note": [f"note {i}" for i in range(ROWS)],
            "left": rng.choice(["yes", "no"], ROWS, p=[0.3, 0.7]),
        }
    )


@pytest.fixture(params=["rows.csv", "rows.csv.gz", "rows.parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    if path.suffix == ".parquet":
        given().to_parquet(path, coerce_timestamps="us")
    else:
        given().to_csv(path, index=False)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    given().to_csv(path, index=False)
    return path


def broken(path: Path, fault: str, name: str = "broken", **wish: object) -> pd.DataFrame:
    to = path.with_name(name)
    breaks.write(path, fault, to, **wish)
    return sources.read_file(to)


def differing(path: Path, after: pd.DataFrame) -> list[str]:
    before = sources.read_file(path)
    return [c for c in before if not before[c].equals(after[c])]


# What each fault does, in every format


def test_a_column_is_renamed(file: Path):
    assert "age_v2" in broken(file, "renamed-column", column="age")


def test_a_column_is_missing(file: Path):
    after = broken(file, "missing-column", column="age")

    assert "age" not in after
    assert len(after.columns) == 5


def test_numbers_become_texts(file: Path):
    after = broken(file, "numbers-as-texts", column="age")

    assert after["age"].str.fullmatch(r"\d+ EUR").all()
    assert differing(file, after) == ["age"]


def test_two_columns_are_swapped(file: Path):
    before, after = sources.read_file(file), broken(file, "swapped-columns", column="age")

    assert (after["age"] == before["spend"]).all()
    assert (after["spend"] == before["age"]).all()
    assert differing(file, after) == ["age", "spend"]


def test_a_second_column_may_be_named(file: Path):
    before = sources.read_file(file)

    after = broken(file, "swapped-columns", column="age", other="plan")

    assert (after["age"] == before["plan"]).all()
    assert (after["plan"].astype(int) == before["age"]).all()


@pytest.mark.parametrize(
    ("fault", "factor"), [("unit-x100", 100), ("sign-flipped", -1), ("outliers", 1e6)]
)
def test_numbers_are_scaled(file: Path, fault: str, factor: float):
    before, after = sources.read_file(file), broken(file, fault, column="spend")
    changed = after["spend"] != before["spend"]

    np.testing.assert_allclose(after["spend"][changed], before["spend"][changed] * factor)
    assert changed.mean() == breaks.find(fault).share
    assert differing(file, after) == ["spend"]


@pytest.mark.parametrize("column", ["age", "spend", "plan"])
def test_values_are_missing(file: Path, column: str):
    after = broken(file, "nulls", column=column, share=0.25)

    assert after[column].isna().mean() == 0.25
    assert differing(file, after) == [column]


def test_a_column_is_constant(file: Path):
    after = broken(file, "constant-column", column="spend")

    assert after["spend"].nunique() == 1
    assert differing(file, after) == ["spend"]


def test_a_category_is_in_other_capitals(file: Path):
    after = broken(file, "renamed-category", column="plan")

    assert sorted(after["plan"].unique()) == ["BASIC", "PLUS"]
    assert differing(file, after) == ["plan"]


def test_dates_lie_ahead(file: Path):
    before = sources.as_times(sources.read_file(file)["when"])

    after = sources.as_times(broken(file, "future-dates", column="when")["when"])

    moved = after != before
    assert moved.mean() == 0.05
    assert (after[moved] - before[moved] > pd.Timedelta(days=7300)).all()


def test_days_and_months_are_exchanged(file: Path):
    before = sources.as_times(sources.read_file(file)["when"])

    after = sources.as_times(broken(file, "day-for-month", column="when")["when"])

    early = before.dt.day <= 12
    assert (after.dt.month[early] == before.dt.day[early]).all()
    assert (after.dt.day[early] == before.dt.month[early]).all()
    assert (after[~early] == before[~early]).all()


def test_labels_are_exchanged(file: Path):
    before, after = sources.read_file(file)["left"], broken(file, "label-flip", column="left")

    assert (after["left"] == before.map({"yes": "no", "no": "yes"})).all()


def test_the_rare_label_becomes_common(file: Path):
    before = sources.read_file(file)["left"] == "yes"

    after = broken(file, "label-jump", column="left", share=0.5)["left"] == "yes"

    assert after[before].all()
    assert after[~before].mean() == pytest.approx(0.5, abs=0.01)


def test_rows_come_twice(file: Path):
    after = broken(file, "duplicated-rows")

    assert len(after) == ROWS * 1.2
    assert after.duplicated().sum() == ROWS * 0.2


def test_rows_are_lost(file: Path):
    after = broken(file, "lost-rows")

    assert len(after) == ROWS * 0.05
    assert after["note"].isin(given()["note"]).all()


def test_empty_rows_follow(file: Path):
    to = file.with_name("broken")
    breaks.write(file, "empty-rows", to)

    rows = breaks.read(to).rows
    empty = (rows.isna() | (rows == "")).all(axis=1)
    assert empty.sum() == ROWS * 0.2
    assert empty.tail(80).all()


@pytest.mark.parametrize("fault", ["no-rows", "no-bytes", "truncated-file"])
def test_a_file_that_broke_off_is_refused_under_its_name(file: Path, fault: str):
    to = file.with_name("broken")
    breaks.write(file, fault, to, share=0.4)

    assert to.stat().st_size < file.stat().st_size
    if fault != "truncated-file" or file.suffix != ".csv":  # half a text is a text
        with pytest.raises(BadInput, match="broken"):
            sources.read_file(to)


@pytest.mark.parametrize("fault", ["encoding-latin-1", "encoding-utf-16"])
def test_another_encoding_is_refused_under_its_name(table: Path, fault: str):
    with pytest.raises(BadInput, match=r"broken is neither"):
        broken(table, fault, column="plan")


def test_the_words_in_another_encoding_are_still_the_same(table: Path):
    breaks.write(table, "encoding-utf-16", table.with_name("broken"))

    assert table.with_name("broken").read_text(encoding="utf-16") == table.read_text()


# All of them


def wish(fault: breaks.Fault) -> dict[str, str]:
    column = {"a date column": "when", "a label column": "left", "": ""}.get(fault.needs, "age")
    return {"column": "plan" if fault.name in ("encoding-latin-1", "renamed-category") else column}


TEXT_ONLY = ("encoding-latin-1", "encoding-utf-16")


def any_format(fault: breaks.Fault) -> bool:
    return fault.name not in TEXT_ONLY


@pytest.mark.parametrize("fault", list(filter(any_format, breaks.FAULTS)), ids=lambda f: f.name)
def test_the_same_seed_gives_the_same_bytes_and_leaves_the_file_alone(
    file: Path, fault: breaks.Fault
):
    check_seeds(file, fault)


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_the_same_seed_gives_the_same_wrong_encoding(table: Path, name: str):
    check_seeds(table, breaks.find(name))


def check_seeds(file: Path, fault: breaks.Fault) -> None:
    before = file.read_bytes()
    wishes = {**wish(fault), "share": 0.3}

    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        breaks.write(file, fault.name, file.with_name(name), seed=seed, **wishes)

    one, two, three = (file.with_name(n).read_bytes() for n in ("one", "two", "three"))
    assert one == two
    assert one != before
    assert file.read_bytes() == before
    all_rows = {"renamed-column", "missing-column", "constant-column", *TEXT_ONLY[1:]}
    seedless = all_rows | {"empty-rows", "no-rows", "no-bytes", "truncated-file"}
    assert (one == three) == (fault.name in seedless)


REAL = {
    "telco": ("Telco-Customer-Churn.csv.gz", "MonthlyCharges", "", "Churn", "Contract"),
    "bank": ("bank-additional-full.csv.gz", "age", "", "y", "job"),
    "elec": ("elec.csv.gz", "nswdemand", "", "class", ""),
    "retail": ("online_retail.parquet", "Quantity", "InvoiceDate", "", "Country"),
}


@pytest.mark.parametrize("name", REAL)
def test_public_files_break_in_the_wanted_column_only(name: str, data_folder: Path, tmp_path: Path):
    file, number, date, label, text = REAL[name]
    wanted = {"unit-x100": number, "nulls": number, "numbers-as-texts": number}
    wanted |= {"future-dates": date, "label-flip": label, "renamed-category": text}

    for fault, column in wanted.items():
        if column:
            to = tmp_path / fault
            breaks.write(data_folder / file, fault, to, column=column, share=0.5)
            before, after = breaks.read(data_folder / file).rows, breaks.read(to).rows
            assert [c for c in before if not before[c].equals(after[c])] == [column]


def test_a_file_without_names_breaks_by_place(data_folder: Path, tmp_path: Path):
    source, to = data_folder / "adult-train.csv.gz", tmp_path / "broken.csv.gz"

    breaks.write(source, "unit-x100", to, column="column_1", header=False)

    before, after = (breaks.read(p, header=False).rows for p in (source, to))
    assert (after["column_1"].astype(int) == 100 * before["column_1"].astype(int)).all()
    assert after.drop(columns="column_1").equals(before.drop(columns="column_1"))


def test_a_write_that_breaks_off_leaves_nothing(table: Path, monkeypatch: pytest.MonkeyPatch):
    def fsync(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fsync)

    with pytest.raises(OSError, match="no space"):
        breaks.write(table, "no-rows", table.with_name("broken"))

    assert list(table.parent.iterdir()) == [table]


# What is refused


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        pytest.param(
            {"fault": "nulls", "column": "agee"}, "no column agee; did you mean age", id="column"
        ),
        pytest.param({"fault": "nulls"}, "nulls wants --column; .* has when, age", id="no column"),
        pytest.param({"fault": "null"}, "no fault 'null'; did you mean nulls", id="fault"),
        pytest.param(
            {"fault": "xyz"}, "no fault 'xyz'; wanted renamed-column, ", id="no such fault"
        ),
        pytest.param({"fault": "nulls", "column": "age", "share": 0.0}, "--share is 0", id="share"),
        pytest.param(
            {"fault": "unit-x100", "column": "note"}, "note .* no numbers", id="no number"
        ),
        pytest.param({"fault": "future-dates", "column": "note"}, "note .* no dates", id="no date"),
        pytest.param(
            {"fault": "label-flip", "column": "note"}, "note .* 400 values", id="no label"
        ),
        pytest.param(
            {"fault": "swapped-columns", "column": "age", "other": "age"},
            "second column",
            id="twice",
        ),
        pytest.param(
            {"fault": "renamed-column", "column": "column_1", "header": False},
            "names no columns",
            id="no names",
        ),
    ],
)
def test_a_wish_that_cannot_be_had_is_told(table: Path, wishes: dict, said: str):
    with pytest.raises(BadInput, match=said):
        breaks.write(table, to=table.with_name("broken"), **wishes)

    assert not table.with_name("broken").exists()


def test_a_file_that_is_there_is_not_written_over(table: Path):
    with pytest.raises(BadInput, match="is there already"):
        breaks.write(table, "no-bytes", table)

    assert table.stat().st_size


@pytest.mark.parametrize(
    "content", [b"", b"\x1f\x8bno gzip", b"PAR1 no Parquet", b"\xff\xfe\x00\x00"], ids=str
)
def test_a_file_that_is_broken_already_is_told(tmp_path: Path, content: bytes):
    (tmp_path / "bad").write_bytes(content)

    with pytest.raises(BadInput, match="bad"):
        breaks.write(tmp_path / "bad", "no-rows", tmp_path / "broken")


def test_parquet_has_no_encoding_to_break(tmp_path: Path):
    given().to_parquet(tmp_path / "rows.parquet", coerce_timestamps="us")

    with pytest.raises(BadInput, match="has no encoding"):
        breaks.write(tmp_path / "rows.parquet", "encoding-utf-16", tmp_path / "broken")


# By hand


def test_a_file_is_broken_by_hand(table: Path, capsys: pytest.CaptureFixture[str]):
    to = table.with_name("broken.csv")
    line = ["data", "break", str(table), "--fault", "nulls", "--column", "age", "--to", str(to)]

    assert cli.main(line) == 0

    said = capsys.readouterr().out
    assert "nulls in age" in said
    assert "names the column age" in said
    assert sources.read_file(to)["age"].isna().mean() == 0.4


def test_a_wrong_wish_by_hand_is_one_line(table: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["data", "break", str(table), "--fault", "nuls", "--to", "x"]) == 2

    assert (
        capsys.readouterr().err
        == "perennial: there is no fault 'nuls'; did you mean nulls or outliers?\n"
    )


def test_every_fault_has_one_line(capsys: pytest.CaptureFixture[str], root: Path):
    assert cli.main(["data", "breaks"]) == 0

    told = capsys.readouterr().out.splitlines()
    page = (root / "docs" / "breaks.md").read_text()
    assert [line.split()[0] for line in told] == list(breaks.names())
    assert [name for name in breaks.names() if f"`{name}`" not in page] == []


def test_a_gzip_stays_one(data_folder: Path, tmp_path: Path):
    to = tmp_path / "b.csv.gz"

    breaks.write(data_folder / "elec.csv.gz", "nulls", to, column="period")

    assert gzip.decompress(to.read_bytes())
