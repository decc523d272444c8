"""Raw rows come in as they are meant, or one sentence says what is wrong with the file."""

import gzip
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perennial.data import sources
from perennial.errors import BadInput
from perennial.project import Project, load

CSV = "when,age,job,bought\n2020-01-02,40,clerk,yes\n2020-01-01,30,,no\n2020-01-03, ?,smith,yes\n"


def project(**changes: object) -> Project:
    given = {
        "name": "shop",
        "kind": "table",
        "time": {"column": "when"},
        "label": {"column": "bought", "positive": "yes", "known_after": "7d"},
        "features": [{"name": "age", "type": "number"}, {"name": "job", "type": "category"}],
    }
    return Project.model_validate(given | changes)


def written(folder: Path, content: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def parquet() -> bytes:
    buffer = io.BytesIO()
    pd.read_csv(io.StringIO(CSV)).to_parquet(buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(CSV, id="a plain CSV"),
        pytest.param(CSV.replace(",", ";"), id="semicolons"),
        pytest.param(CSV.replace(",", "\t"), id="tabs"),
        pytest.param(CSV.replace(",", ", "), id="spaces after commas"),
        pytest.param("\ufeff" + CSV, id="a byte order mark"),
        pytest.param(gzip.compress(CSV.encode()), id="a gzip whose name does not say so"),
        pytest.param(parquet(), id="Parquet"),
    ],
)
def test_a_table_reads_the_same_from_any_format(tmp_path: Path, content: str | bytes):
    path = written(tmp_path, content)

    rows = sources.table_rows(project(), sources.read(project(), str(path), tmp_path))

    assert rows["row_id"].tolist() == [1, 0, 2]
    assert rows["event_time"].dt.day.tolist() == [1, 2, 3]
    assert rows["label"].tolist() == [0.0, 1.0, 1.0]
    assert rows["age"].tolist()[:2] == [30.0, 40.0]
    assert np.isnan(rows["age"][2])
    assert rows["job"].tolist() == [None, "clerk", "smith"]
    assert (rows["label_known_at"] - rows["event_time"] == timedelta(days=7)).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("", "is empty", id="is empty"),
        pytest.param("when,age,job,bought\n", "has no rows", id="has a header only"),
        pytest.param(CSV + "2020-01-04,1,2,3,4,5\n", "line 5", id="has a line that is too long"),
        pytest.param(b"\x89PNG\r\n\x1a\n\x00\xff", "neither Parquet nor UTF-8", id="is a picture"),
        pytest.param(b"PK\x03\x04....", "spreadsheet", id="is a spreadsheet"),
        pytest.param(b"PAR1 and no more", "damaged Parquet", id="is cut Parquet"),
        pytest.param(gzip.compress(CSV.encode())[:-9], "damaged gzip", id="is cut gzip"),
        pytest.param(CSV.replace("age", "years"), "no column age", id="lacks a column"),
    ],
)
def test_one_sentence_names_the_file_that(tmp_path: Path, content: str | bytes, said: str):
    path = written(tmp_path, content)

    with pytest.raises(BadInput, match=said) as caught:
        sources.read(project(), str(path), tmp_path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param("2020-01-03", "soon", "when is no date .* row 3: 'soon'", id="a bad date"),
        pytest.param("40", "forty", "age is no number .* 'forty'", id="a text among numbers"),
        pytest.param("yes", "si", "label.positive is 'yes', but column bought", id="no positive"),
    ],
)
def test_a_value_that_does_not_fit_is_told_with(tmp_path: Path, old: str, new: str, said: str):
    path = written(tmp_path, CSV.replace(old, new))

    with pytest.raises(BadInput, match=said):
        sources.table_rows(project(), sources.read(project(), str(path), tmp_path))


def test_a_missing_file_is_told_with_the_data_set_that_is_wanted(tmp_path: Path, root: Path):
    bank = load(root / "examples" / "bank")

    with pytest.raises(BadInput, match="give --source with bank-additional-full.csv"):
        sources.read(bank, None, tmp_path)
    with pytest.raises(BadInput, match="no file at nowhere.csv; wanted bank-additional-full.csv"):
        sources.read(bank, "nowhere.csv", tmp_path)


def test_the_projects_own_path_starts_at_its_folder(tmp_path: Path):
    written(tmp_path, CSV)

    raw = sources.read(project(source={"path": "rows.csv"}), None, tmp_path)

    assert len(raw) == 3


def test_a_file_without_a_header_gets_numbered_columns(tmp_path: Path):
    path = written(tmp_path, "1,a\n2,b\n")

    raw = sources.read_file(path, header=False)

    assert raw.columns.tolist() == ["column_1", "column_2"]
    assert len(raw) == 2


def test_rows_in_order_get_times_a_step_apart(tmp_path: Path):
    ordered = project(time={"row_order": {"start": "1996-05-07", "step": "30min"}})
    path = written(tmp_path, CSV)

    rows = sources.table_rows(ordered, sources.read(ordered, str(path), tmp_path))

    assert rows["event_time"].iloc[2] == datetime(1996, 5, 7, 1, tzinfo=UTC)


def test_times_from_a_second_file_are_joined_by_row_number(tmp_path: Path):
    written(tmp_path, "row,day\n2,2021-03-03\n0,2021-03-01\n1,2021-03-02\n", "times.csv")
    joined = project(source={"join_times": "times.csv"}, time={"column": "day"})
    path = written(tmp_path, CSV)

    rows = sources.table_rows(joined, sources.read(joined, str(path), tmp_path))

    assert rows["row_id"].tolist() == [0, 1, 2]
    assert rows["event_time"].dt.strftime("%Y-%m-%d").tolist()[2] == "2021-03-03"


def test_categories_that_look_like_numbers_are_texts_without_a_point():
    column = pd.Series([1.0, np.nan, 0.0])

    assert sources.as_texts(column).tolist() == ["1", None, "0"]


def test_a_row_with_a_blank_label_has_none(tmp_path: Path):
    path = written(tmp_path, CSV.replace("clerk,yes", "clerk,"))

    rows = sources.table_rows(project(), sources.read(project(), str(path), tmp_path))

    assert rows["label"].isna().tolist() == [False, True, False]


def test_the_public_bank_file_gets_its_dates(data_folder: Path, root: Path):
    bank = load(root / "examples" / "bank")
    path = data_folder / "bank-additional-full.csv.gz"

    rows = sources.table_rows(bank, sources.read(bank, str(path), root))

    assert len(rows) == 41_188
    assert round(rows["label"].mean(), 4) == 0.1127
    assert rows["event_time"].min() == datetime(2008, 5, 5, tzinfo=UTC)
    assert "duration" not in rows


def test_the_public_retail_file_keeps_every_row(data_folder: Path, root: Path):
    retail = load(root / "examples" / "retail")

    raw = sources.read(retail, str(data_folder / "online_retail.parquet"), root)

    assert len(raw) == 541_909
    assert raw["InvoiceDate"].is_monotonic_increasing
    assert str(raw["InvoiceDate"].dt.tz) == "UTC"
    assert int(raw["CustomerID"].isna().sum()) == 135_080
