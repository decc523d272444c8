"""DuckDB and Great Expectations observe the same of whole columns, and judge it alike."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perennial.data import aggregates, expectations
from perennial.data.sift import Sieve
from perennial.project import Expectation

PANDAS = {"row_condition": 't == "a"', "condition_parser": "pandas"}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Numbers with nulls, repeats and both signs; texts with nulls; a column without any value."""
    rng = np.random.default_rng(4)
    count = 700
    return pd.DataFrame(
        {
            "x": np.where(rng.random(count) < 0.1, np.nan, rng.normal(3, 2, count).round(1)),
            "whole": rng.integers(-5, 6, count),
            "t": rng.choice(np.array(["a", "b", "Ä'", None], dtype=object), count),
            "none": np.full(count, np.nan),
        }
    )


@pytest.fixture(scope="module")
def sieve(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sieve]:
    folder = tmp_path_factory.mktemp("snapshot")
    frame.to_parquet(folder / "rows.parquet", index=False, row_group_size=100)
    with Sieve(folder / "rows.parquet", folder) as made:
        yield made


def expecting(expect: str, **args: Any) -> Expectation:
    return Expectation(expect=expect, args=args)


RANGED = [
    ("ExpectColumnMeanToBeBetween", ["x", "whole"], (2.5, 3.5)),
    ("ExpectColumnMedianToBeBetween", ["x", "whole"], (0, 3)),
    ("ExpectColumnMinToBeBetween", ["x", "whole"], (-6, -5)),
    ("ExpectColumnMaxToBeBetween", ["x", "whole"], (5, 5)),
    ("ExpectColumnSumToBeBetween", ["x", "whole"], (0, 5000)),
    ("ExpectColumnStdevToBeBetween", ["x", "whole"], (1, 3)),
    ("ExpectColumnUniqueValueCountToBeBetween", ["x", "whole", "t"], (3, 11)),
    ("ExpectColumnProportionOfUniqueValuesToBeBetween", ["x", "whole", "t"], (0.001, 0.05)),
    ("ExpectColumnProportionOfNonNullValuesToBeBetween", ["x", "whole", "t"], (0.7, 0.95)),
]
PARTS = {"bins": [-3, 0, 2, 4, 9], "weights": [0.1, 0.3, 0.4, 0.2]}
SPARSE = {"bins": [-30, -20, 2, 4, 9], "weights": [0, 0.5, 0.3, 0.2]}
VALUES = {"values": ["a", "b", "Ä'"], "weights": [0.5, 0.25, 0.25]}
FEWER = {"values": ["a", "c"], "weights": [0.5, 0.5]}
WANTED = [
    expecting("ExpectTableRowCountToBeBetween", min_value=700, max_value=700),
    expecting("ExpectTableRowCountToBeBetween", min_value=701),
    expecting("ExpectTableRowCountToEqual", value=700),
    expecting("ExpectTableRowCountToEqual", value=7),
    *(
        expecting(name, column=column, min_value=least, max_value=most, **more)
        for name, columns, (least, most) in RANGED
        for column in columns
        for more in ({}, PANDAS, {"strict_min": True, "strict_max": True})
        if not (more == PANDAS and name.startswith("ExpectColumnProportionOfNonNull"))
    ),
    *(
        expecting(
            "ExpectColumnKLDivergenceToBeLessThan",
            column=column,
            partition_object=parts,
            threshold=threshold,
            **more,
        )
        for column, parts, more in [
            ("x", PARTS, {}),
            ("x", PARTS, {"tail_weight_holdout": 0.01}),
            ("x", SPARSE, {"tail_weight_holdout": 0.01, "internal_weight_holdout": 0.02}),
            ("whole", PARTS, {"tail_weight_holdout": 0.2}),
            ("t", VALUES, {}),
            ("t", VALUES, {"tail_weight_holdout": 0.01}),
            ("t", FEWER, {"tail_weight_holdout": 0.01}),
            ("t", FEWER, {}),
        ]
        for threshold in (0.01, 2.0)
    ),
]


@pytest.mark.parametrize("wanted", WANTED, ids=lambda e: f"{e.expect} {e.args}")
def test_both_observe_and_judge_the_same(wanted: Expectation, frame: pd.DataFrame, sieve: Sieve):
    (told,) = expectations.judge([wanted], frame)
    made = aggregates.translate(wanted, sieve.columns)
    assert made, "the expectation is not translated"

    (found,) = sieve.observe([made])

    assert not told.detail.startswith("Exception"), told
    assert found.passed == told.passed, (found, told)
    if told.observed is None:  # a divergence without end
        assert found.observed is None
    else:
        assert found.observed == pytest.approx(told.observed, rel=1e-9)


def test_a_column_without_values_is_within_no_range(sieve: Sieve):
    wanted = expecting("ExpectColumnMeanToBeBetween", column="none", min_value=0)

    (found,) = sieve.observe([aggregates.translate(wanted, sieve.columns)])

    assert not found.passed
    assert "no value" in found.said


@pytest.mark.parametrize(
    "wanted",
    [
        expecting("ExpectColumnQuantileValuesToBeBetween", column="x"),
        expecting("ExpectColumnMeanToBeBetween", column="t", min_value=0),
        expecting("ExpectColumnMeanToBeBetween", column="x", min_value="a"),
        expecting("ExpectColumnMeanToBeBetween", column="x", row_condition="x.abs() > 1"),
        expecting("ExpectColumnMeanToBeBetween", column="x", some_new_argument=3),
    ],
    ids=lambda e: f"{e.expect} {e.args}",
)
def test_what_duckdb_would_judge_otherwise_is_left(wanted: Expectation, sieve: Sieve):
    assert aggregates.translate(wanted, sieve.columns) is None


@pytest.mark.parametrize("column", ["x", "whole", "t"])
def test_a_column_does_not_differ_from_its_own_distribution(column: str, sieve: Sieve):
    wanted = expecting("ExpectColumnKLDivergenceToBeLessThan", column=column, threshold=0)

    parts = sieve.partition(wanted)

    assert sum(parts["weights"]) == pytest.approx(1)
    args = wanted.args | {"partition_object": parts, "threshold": 1e-9}
    (same,) = sieve.observe([aggregates.translate(expecting(wanted.expect, **args), sieve.columns)])
    assert same.passed
