"""Raw rows come in as they are meant, or one sentence says what is wrong with the file."""

import csv
import gzip
import io
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.data import delimited, sources
from perennial.data.places import Part
from perennial.errors import BadInput, Unavailable
from perennial.project import Project, load

RNG = np.random.default_rng(0)
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
        pytest.param(CSV.replace("clerk", ' "clerk"'), id="a space before a quotation"),
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
        pytest.param(
            CSV + "2020-01-04,1\n", "line 5 has 2 fields, wanted 4", id="has a short line"
        ),
        pytest.param("\n\n" + CSV + "2,1\n", "line 7 has 2 fields", id="has blank lines above"),
        pytest.param(
            CSV.replace("clerk", '"a\nclerk"') + "1,2\n",
            "line 6 has 2 fields",
            id="breaks a line within a quotation",
        ),
        pytest.param(CSV + '1,2,3,"open\n\n', "quotation that begins in line 5", id="ends quoted"),
        pytest.param(CSV.encode("utf-16"), r"UTF-8 text \(byte 0\)", id="is UTF-16"),
        pytest.param(CSV.encode("utf-16-le"), r"byte 1 is zero", id="is UTF-16 without a mark"),
        pytest.param(
            CSV.replace("smith", "schmié").encode("latin-1"), r"\(byte 81\)", id="is Latin-1"
        ),
        pytest.param(gzip.compress(CSV.encode("latin-1") + b"\xe9"), "byte 86", id="packs Latin-1"),
        pytest.param(
            gzip.compress(RNG.bytes(9 << 20).hex().encode())[: -(1 << 20)],
            "damaged gzip after 1[0-9],[0-9]{3},[0-9]{3} bytes",
            id="is gzip cut far behind",
        ),
        pytest.param(parquet()[:-9], r"damaged Parquet \(of [0-9,]+ bytes\)", id="is Parquet cut"),
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


def test_a_pattern_names_several_files_in_order_of_their_names(tmp_path: Path):
    header, *lines = CSV.splitlines(keepends=True)
    for name, line in zip("bac", lines, strict=True):
        written(tmp_path, header + line, f"{name}.csv")
    written(tmp_path, header, "d.csv")
    mine = project(source={"path": "[a-d].csv"})

    rows = sources.table_rows(mine, sources.read(mine, None, tmp_path))

    assert rows["row_id"].tolist() == [0, 1, 2]
    assert rows["age"].tolist()[:2] == [30.0, 40.0]


def test_parts_of_other_types_are_read_as_the_widest(tmp_path: Path):
    pd.DataFrame({"x": [1, 2], "y": [1, 0]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"x": ["3.5", "?"], "y": ["1", "x"]}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"x": [None, None], "y": [None, None]}).to_parquet(tmp_path / "c.parquet")
    mine = project(
        time={"row_order": {}},
        label={"column": "y"},
        features=[{"name": "x", "type": "number"}, {"name": "y", "type": "category"}],
    )

    raw = sources.read(mine, str(tmp_path / "*.parquet"), tmp_path)
    rows = sources.table_rows(mine, raw)

    assert raw["x"].tolist()[:3] == [1.0, 2.0, 3.5]
    assert rows["x"].isna().tolist() == [False, False, False, True, True, True]
    assert rows["y"].tolist() == ["1", "0", "1", "x", None, None]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        pytest.param("when,job,bought\n", "b.csv has no column age", id="lacks a column"),
        pytest.param(CSV + "1\n", "b.csv is not readable CSV: line 5", id="is malformed"),
        pytest.param(CSV.replace("age", "age,more"), "more stands in one of them", id="has more"),
    ],
)
def test_the_part_is_named_that(tmp_path: Path, second: str, said: str):
    written(tmp_path, CSV, "a.csv")
    written(tmp_path, second, "b.csv")
    mine = project(expectations=[{"expect": "ExpectColumnToExist", "args": {"column": "more"}}])

    with pytest.raises(BadInput, match=said):
        sources.table_rows(mine, sources.read(mine, str(tmp_path / "*.csv"), tmp_path))


def test_a_pattern_that_nothing_fits_is_told(tmp_path: Path):
    with pytest.raises(BadInput, match=r"no file at .*/2011-\*.csv; wanted a CSV or Parquet file"):
        sources.read(project(), str(tmp_path / "2011-*.csv"), tmp_path)


def test_columns_that_expectations_name_come_along(tmp_path: Path):
    rules = [
        {"expect": "ExpectColumnValuesToNotBeNull", "args": {"column": "when"}},
        {"expect": "ExpectColumnPairValuesToBeEqual", "args": {"column_A": "a", "column_B": "b"}},
        {"expect": "ExpectTableColumnsToMatchSet", "args": {"column_set": ["c d", "nowhere"]}},
        {
            "expect": "ExpectColumnValuesToBeBetween",
            "args": {"column": "age", "row_condition": "`e` == 'g' and f.notna()"},
        },
    ]
    lines = CSV.replace("bought\n", "bought,a,b,c d,e,f,g\n").replace(
        "yes\n", "yes,1,x,2.5,True,,0\n"
    )
    path = written(tmp_path, lines.replace("no\n", "no,2,,3,False,,0\n"))
    mine = project(expectations=rules)

    rows = sources.table_rows(mine, sources.read(mine, str(path), tmp_path))

    assert rows.columns.tolist()[6:] == ["when", "a", "b", "c d", "e", "f"]
    assert rows["when"].equals(rows["event_time"].rename("when"))
    assert rows["a"].tolist() == [2.0, 1.0, 1.0]
    assert rows["b"].tolist() == [None, "x", "x"]
    assert rows["e"].tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("texts", "category"),
    [
        pytest.param(["1", "2.0", "?"], ["1", "2", None], id="whole numbers lose their point"),
        pytest.param(["1", "2.50", ""], ["1.0", "2.5", None], id="others are as a machine writes"),
        pytest.param(["007", "7", "1"], ["007", "7", "1"], id="leading zeros stay"),
        pytest.param(["1.0", "2.0", "x"], ["1.0", "2.0", "x"], id="a text among them keeps all"),
        pytest.param(["true", "FALSE", ""], ["True", "False", None], id="truths are Python's"),
        pytest.param(["1" * 20, "2", "3"], ["1" * 20, "2", "3"], id="long keys stay"),
        pytest.param(["\u00a0a ", "N/A", "b"], ["a", None, "b"], id="any space is trimmed"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_category_is_one_whoever_wrote_it(
    tmp_path: Path, texts: list[str], category: list[str], form: str
):
    frame = pd.DataFrame({"c": texts, "y": ["1", "0", "1"]})
    path = tmp_path / f"rows.{form}"
    frame.to_csv(path, index=False) if form == "csv" else frame.to_parquet(path)
    features = [{"name": "c", "type": "category"}]
    mine = project(time={"row_order": {}}, label={"column": "y"}, features=features)

    rows = sources.table_rows(mine, sources.read(mine, str(path), tmp_path))

    assert rows["c"].tolist() == category


def fields(batches: Iterable[pa.RecordBatch]) -> list[str]:
    return [str(text).strip() for b in batches for c in b.columns for text in c.to_pylist()]


def test_both_readers_of_csv_give_the_same(tmp_path: Path):
    cells = st.text(st.sampled_from('ab",; \n1\té'), max_size=6)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), st.booleans())
    def holds(rows: list[tuple[str, ...]], quoted: bool) -> None:
        told = io.StringIO()
        how = csv.QUOTE_ALL if quoted else csv.QUOTE_MINIMAL
        csv.writer(told, quoting=how).writerows([("x", "y", "z"), *rows])
        part = Part("rows", written(tmp_path, told.getvalue()))
        found = delimited.layout(part, header=True)
        slow = fields(delimited.careful(part, found, ("z", "x")))
        with suppress(delimited.Odd):
            assert fields(delimited.quick(part, found, ("z", "x"))) == slow

    holds()


def test_what_the_quick_reader_of_csv_reads_the_careful_one_reads_alike(tmp_path: Path):
    @settings(max_examples=500, deadline=None)
    @given(st.lists(st.sampled_from(["a", '"', '""', " ", ",", "\n", ' "b",']), max_size=12))
    def holds(pieces: list[str]) -> None:
        part = Part("rows", written(tmp_path, "x,y\n" + "".join(pieces) + "\n"))
        found = delimited.layout(part, header=True)
        with suppress(delimited.Odd):
            quick = fields(delimited.quick(part, found, ("x", "y")))
            assert quick == fields(delimited.careful(part, found, ("x", "y")))

    holds()


@pytest.mark.parametrize("content", [CSV, gzip.compress(CSV.encode())], ids=["plain", "packed"])
def test_a_plain_file_is_read_by_the_quick_reader(tmp_path: Path, monkeypatch, content):
    monkeypatch.setattr(delimited, "careful", lambda *_: pytest.fail("read slowly"))

    assert len(sources.read_file(written(tmp_path, content))) == 3


@pytest.mark.parametrize(
    "text", ["1_000", "1,5", "--1", "0x10", "1d", "", " 2 ", "1e3", ".5", "inf"]
)
def test_a_number_is_what_pandas_takes_for_one(tmp_path: Path, text: str):
    values = [text, *map(str, range(199))]
    raw = pd.DataFrame({"x": values, "y": ["1"] * 200})
    features = [{"name": "x", "type": "number"}]
    mine = project(time={"row_order": {}}, label={"column": "y"}, features=features)

    found = sources.table_rows(mine, raw)["x"]

    wanted = pd.to_numeric(pd.Series(values), errors="coerce").astype("float64")
    pd.testing.assert_series_equal(found, wanted, check_names=False)


def test_what_changes_while_it_is_read_is_told(tmp_path: Path, monkeypatch):
    path = written(tmp_path, CSV)
    real = delimited.quick

    def quick(*given):
        path.write_text(CSV + CSV)
        return real(*given)

    monkeypatch.setattr(delimited, "quick", quick)

    with pytest.raises(Unavailable, match="changed while it was read"):
        sources.read(project(), str(path), tmp_path)


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
