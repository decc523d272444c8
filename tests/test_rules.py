"""DuckDB and Great Expectations find the same rows to break the same rules."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

from perennial.data import duck, expectations, rules
from perennial.data.sift import Sieve, split
from perennial.project import Expectation

KINDS = {
    "n": rules.NUMBER,
    "m": rules.NUMBER,
    "t": rules.TEXT,
    "u": rules.TEXT,
    "at": rules.TIME,
    "to": rules.TIME,
    "k": rules.TEXT,
}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Numbers, texts and times with nulls, repeats, zeros, empty texts and odd signs."""
    rng = np.random.default_rng(3)
    count = 500
    texts = ["", "C1", "C'2", "abc", "Ärger", "a\nb", "x y", None]
    days = pd.to_datetime("2011-01-01", utc=True) + pd.to_timedelta(rng.integers(0, 40, count), "D")
    made = pd.DataFrame(
        {
            "n": rng.choice([-2.5, -1, 0, 0.1, 0.30000000000000004, 3, 1e12, np.nan], count),
            "m": rng.choice([-1, 0, 3, 7, np.nan], count),
            "t": rng.choice(np.array(texts, dtype=object), count),
            "u": rng.choice(np.array(["C1", "abc", None], dtype=object), count),
            "at": days,
            "to": days + pd.to_timedelta(rng.integers(-1, 3, count), "D"),
        }
    )
    made["k"] = made["t"].fillna("C")
    made.loc[made.index % 17 == 0, "to"] = pd.NaT
    return made


@pytest.fixture(scope="module")
def sieve(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sieve]:
    folder = tmp_path_factory.mktemp("snapshot")
    frame.to_parquet(folder / "rows.parquet", index=False, row_group_size=100)
    with Sieve(folder / "rows.parquet", folder) as made:
        yield made


def expecting(expect: str, **args: Any) -> Expectation:
    return Expectation(expect=expect, args=args)


PANDAS = {"condition_parser": "pandas"}
RULES = [
    expecting("ExpectColumnValuesToNotBeNull", column="t"),
    expecting("ExpectColumnValuesToNotBeNull", column="n"),
    expecting("ExpectColumnValuesToNotBeNull", column="to"),
    expecting("ExpectColumnValuesToBeNull", column="t"),
    expecting("ExpectColumnValuesToBeBetween", column="n", min_value=0),
    expecting("ExpectColumnValuesToBeBetween", column="n", min_value=0, strict_min=True),
    expecting("ExpectColumnValuesToBeBetween", column="n", max_value=0.3, strict_max=True),
    expecting("ExpectColumnValuesToBeBetween", column="n", min_value=-1, max_value=3),
    expecting(
        "ExpectColumnValuesToBeBetween", column="at", min_value=datetime(2011, 1, 9, tzinfo=UTC)
    ),
    expecting("ExpectColumnValuesToBeBetween", column="to", max_value="2011-01-09T00:00:00+00:00"),
    expecting("ExpectColumnValuesToBeInSet", column="t", value_set=["C1", "C'2", ""]),
    expecting("ExpectColumnValuesToBeInSet", column="n", value_set=[0, 3, 0.1]),
    expecting("ExpectColumnValuesToNotBeInSet", column="n", value_set=[0, 3]),
    expecting("ExpectColumnValuesToMatchRegex", column="t", regex="^[A-Z]"),
    expecting("ExpectColumnValuesToMatchRegex", column="t", regex="[a-z]+"),
    expecting("ExpectColumnValuesToNotMatchRegex", column="t", regex="^C"),
    expecting("ExpectColumnValueLengthsToBeBetween", column="t", min_value=1, max_value=3),
    expecting("ExpectColumnValuesToBeUnique", column="n"),
    expecting("ExpectColumnValuesToBeUnique", column="t"),
    expecting("ExpectCompoundColumnsToBeUnique", column_list=["n", "t", "at"]),
    expecting("ExpectCompoundColumnsToBeUnique", column_list=["n", "t"], ignore_row_if="never"),
    expecting(
        "ExpectCompoundColumnsToBeUnique",
        column_list=["n", "t"],
        ignore_row_if="any_value_is_missing",
    ),
    expecting("ExpectColumnPairValuesToBeEqual", column_A="n", column_B="m"),
    expecting(
        "ExpectColumnPairValuesToBeEqual",
        column_A="t",
        column_B="u",
        ignore_row_if="either_value_is_missing",
    ),
    expecting("ExpectColumnPairValuesAToBeGreaterThanB", column_A="n", column_B="m"),
    expecting(
        "ExpectColumnPairValuesAToBeGreaterThanB", column_A="to", column_B="at", or_equal=True
    ),
    expecting(
        "ExpectColumnPairValuesAToBeGreaterThanB",
        column_A="to",
        column_B="at",
        ignore_row_if="either_value_is_missing",
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition='t == "C1"',
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition='t != "C1"',
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition="m > 0 and u == 'abc'",
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition="m != 3 or n < -1",
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToNotBeNull", column="n", row_condition="u.notna() & (m >= 0)", **PANDAS
    ),
    expecting("ExpectColumnValuesToNotBeNull", column="n", row_condition="not (m == 3)", **PANDAS),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition='k.str.startswith("C")',
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        min_value=1,
        row_condition='~k.str.startswith("C")',
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToNotBeNull",
        column="n",
        row_condition='k.str.endswith("1") or m.isna()',
        **PANDAS,
    ),
    expecting("ExpectColumnValuesToBeUnique", column="n", row_condition="m == 7", **PANDAS),
]


@pytest.mark.parametrize("wanted", RULES, ids=lambda e: f"{e.expect} {e.args}")
def test_both_count_the_same(wanted, frame, sieve):
    (told,) = expectations.judge([wanted], frame)
    rule = rules.translate(wanted, KINDS)
    assert rule, "the rule is not translated"

    (broken,) = sieve.count([rule])

    assert broken.rows == told.unexpected, told
    assert told.passed == (broken.rows == 0), told
    assert len(broken.examples) == min(broken.rows, 3)


@pytest.mark.parametrize("wanted", RULES, ids=lambda e: f"{e.expect} {e.args}")
def test_a_rule_holds_in_what_is_left(wanted, frame, sieve, tmp_path):
    rule = rules.translate(wanted, KINDS)
    gone = sieve.positions(rule)

    counts = split(sieve.snapshot, gone, tmp_path / "kept", tmp_path / "aside")

    kept, aside = pd.read_parquet(tmp_path / "kept"), pd.read_parquet(tmp_path / "aside")
    assert counts == (len(kept), len(aside)) and sum(counts) == len(frame)
    pd.testing.assert_frame_equal(aside, frame.iloc[gone].reset_index(drop=True))
    pd.testing.assert_frame_equal(kept, frame.drop(index=gone).reset_index(drop=True))
    (told,) = expectations.judge([wanted], kept)
    assert told.unexpected == 0
    (broken,) = sieve.count([rule])
    assert broken.surplus == len(aside)


FOREIGN = [
    expecting("ExpectColumnMeanToBeBetween", column="n", min_value=0),
    expecting("ExpectColumnValuesToBeBetween", column="t", min_value=0),
    expecting("ExpectColumnValuesToBeBetween", column="nowhere", min_value=0),
    expecting("ExpectColumnValuesToMatchRegex", column="t", regex=r"(?=C)"),
    expecting("ExpectColumnValuesToMatchRegex", column="t", regex=r"\\d"),
    expecting("ExpectColumnValuesToBeInSet", column="n", value_set=["0"]),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition="n.abs() > 1",
        **PANDAS,
    ),
    expecting(
        "ExpectColumnValuesToBeBetween",
        column="n",
        max_value=0,
        row_condition="u.notna() & m >= 0",
        **PANDAS,
    ),
    expecting("ExpectColumnValuesToNotBeNull", column="n", some_new_argument=3),
]


@pytest.mark.parametrize("wanted", FOREIGN, ids=lambda e: f"{e.expect} {e.args}")
def test_what_duckdb_would_judge_otherwise_is_left_to_great_expectations(wanted):
    assert rules.translate(wanted, KINDS) is None


@pytest.mark.parametrize("text", ["x'; drop table frame; --", 'a"b', "C'2", "\\'"])
def test_a_value_cannot_leave_its_place(text):
    with duckdb.connect() as connection:
        sql = f"select {rules.literal(text)} as {duck.column(text)}"
        found = connection.execute(sql)
        assert [c[0] for c in found.description] == [text]
        assert found.fetchone() == (text,)
