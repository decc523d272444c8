"""What does a whole column show? Aggregate expectations of Great Expectations as SQL of DuckDB."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from perennial.data.duck import column as name
from perennial.data.rules import (
    NUMBER,
    PLAIN,
    TEXT,
    Arguments,
    Columns,
    Foreign,
    bound,
    kind_of_rows,
    literal,
)
from perennial.project import Expectation

ROWS = "__rows"  # the table that the SQL is about
_BINS = 10
_MOST_VALUES = 200


@dataclass(frozen=True)
class Judged:
    """What was observed (JSON), and whether that is what was wanted."""

    passed: bool
    observed: Any
    said: str


@dataclass(frozen=True)
class Aggregate:
    """One expectation about all rows: what to observe, in SQL, and the judge of its values."""

    sql: tuple[str, ...]
    judge: Callable[[Sequence[Any]], Judged]


def translate(wanted: Expectation, columns: Columns) -> Aggregate | None:
    """The expectation as SQL; None where Great Expectations itself must judge.

    A test holds the results equal to those of Great Expectations on pandas.
    """
    make = _MADE.get(wanted.expect)
    args = {k: v for k, v in wanted.args.items() if v is not None}
    if make is None:
        return None
    try:
        where = kind_of_rows(args, columns)
        return make(Arguments(args, columns), where)
    except Foreign:
        return None


def _row_count(args: Arguments, where: str) -> Aggregate:
    if where != "true":
        raise Foreign
    return _ranged(args, "count(*)")


def _row_count_equal(args: Arguments, where: str) -> Aggregate:
    value = args.take("value")
    args.done()
    if where != "true" or not isinstance(value, int):
        raise Foreign
    return Aggregate(("count(*)",), lambda found: _equal(found[0], value))


def _equal(found: Any, wanted: int) -> Judged:
    return Judged(found == wanted, found, f"observed {found:,}, wanted {wanted:,}")


def _of_column(sql: str, *kinds: str) -> Callable[[Arguments, str], Aggregate]:
    def make(args: Arguments, where: str) -> Aggregate:
        column = args.column("column", *kinds)
        told = sql.format(column=name(column), where=where, rows=ROWS)
        return _ranged(args, told)

    return make


def _ranged(args: Arguments, sql: str) -> Aggregate:
    least, most = args.take("min_value"), args.take("max_value")
    strict = (bool(args.take("strict_min", False)), bool(args.take("strict_max", False)))
    args.done()
    for value in (least, most):
        if value is not None:
            bound(value, NUMBER)  # refuses what is no number
    return Aggregate((sql,), lambda found: _between(found[0], least, most, strict))


def _between(found: Any, least: Any, most: Any, strict: tuple[bool, bool]) -> Judged:
    """None, where there was nothing to observe, is within no range."""
    if found is None or math.isnan(found):
        return Judged(False, None, "there is no value to look at")
    above = least is None or (found > least if strict[0] else found >= least)
    below = most is None or (found < most if strict[1] else found <= most)
    return Judged(above and below, found, f"observed {found:,.6g}, wanted {_range(least, most)}")


def _range(least: Any, most: Any) -> str:
    if least is None:
        return f"at most {most:,.6g}" if most is not None else "any"
    return f"at least {least:,.6g}" if most is None else f"{least:,.6g} to {most:,.6g}"


def _divergence(args: Arguments, where: str) -> Aggregate:
    """Kullback-Leibler divergence of a column from a partition, with holdouts.

    As Great Expectations defines it: the sum of p log(p / q) over the parts (natural logarithm),
    q scaled down by the holdouts that it gives to empty parts and to tails.
    """
    column = args.column("column", NUMBER, TEXT)
    parts, threshold = args.take("partition_object"), args.take("threshold")
    tails = float(args.take("tail_weight_holdout", 0) or 0)
    inner = float(args.take("internal_weight_holdout", 0) or 0)
    args.take("bucketize_data", True)
    args.done()
    if not isinstance(parts, Mapping) or not isinstance(threshold, int | float):
        raise Foreign
    if "values" in parts and not inner:
        return _categorical(column, where, parts, threshold, tails)
    if "bins" in parts and args.kind(column) == NUMBER and _finite(parts):
        return _continuous(column, where, parts, float(threshold), tails, inner)
    raise Foreign


def _finite(parts: Mapping[str, Any]) -> bool:
    return "tail_weights" not in parts and all(math.isfinite(b) for b in parts["bins"])


def _categorical(
    column: str, where: str, parts: Mapping[str, Any], threshold: float, tails: float
) -> Aggregate:
    expected = dict(zip(parts["values"], parts["weights"], strict=True))

    def judge(found: Sequence[Any]) -> Judged:
        counts = dict(found[0] or {})
        total = sum(counts.values())
        new = [value for value in counts if value not in expected]
        values = [*expected, *new]
        scale = 1 - tails if new else 1.0
        wanted = [expected[v] * scale for v in expected] + [tails / max(len(new), 1)] * len(new)
        return _diverged([counts.get(v, 0) / max(total, 1) for v in values], wanted, threshold)

    return Aggregate((_counted(column, where),), judge)


def _counted(column: str, where: str) -> str:
    told = name(column)
    return (
        f"(select map(list(v), list(n)) from (select {told} as v, count(*) as n"
        f" from {ROWS} where {where} and {told} is not null group by {told}))"
    )


def _continuous(
    column: str, where: str, parts: Mapping[str, Any], threshold: float, tails: float, inner: float
) -> Aggregate:
    weights = np.asarray(parts["weights"], dtype=float) * (1 - tails - inner)
    empty = weights == 0
    if inner and empty.any():
        weights[empty] = inner / empty.sum()
    expected = [tails / 2, *weights, tails / 2]

    def judge(found: Sequence[Any]) -> Judged:
        total = max(sum(found), 1)
        return _diverged([count / total for count in found], expected, threshold)

    return Aggregate(tuple(_histogram(column, where, parts["bins"])), judge)


def _histogram(column: str, where: str, bins: Sequence[float]) -> list[str]:
    """Counts below the first edge, in each bin (the last one closed), and above the last edge."""
    told, edges = name(column), [literal(float(b)) for b in bins]
    inside = [f"{told} >= {a} and {told} < {b}" for a, b in zip(edges, edges[1:], strict=False)]
    inside[-1] = f"{told} >= {edges[-2]} and {told} <= {edges[-1]}"
    tests = [f"{told} < {edges[0]}", *inside, f"{told} > {edges[-1]}"]
    return [f"count(*) filter ({where} and {test})" for test in tests]


def _diverged(observed: Sequence[float], expected: Sequence[float], threshold: float) -> Judged:
    with np.errstate(divide="ignore", invalid="ignore"):
        found = float(stats.entropy(observed, expected))
    said = f"observed a divergence of {found:.4g}, wanted at most {threshold:g}"
    return Judged(found <= threshold, found if math.isfinite(found) else None, said)


def partition(wanted: Expectation, columns: Columns) -> Aggregate | None:
    """What to observe of a column so that a later snapshot can be compared with this one.

    ``observed`` is a partition object of Great Expectations: ten bins of about as many rows each
    for numbers, the values and their shares for texts (None where there are too many). None, when
    the expectation names no such column, or rows that DuckDB does not find.
    """
    args = dict(wanted.args)
    try:
        column, where = args.get("column"), kind_of_rows(args, columns)
    except Foreign:
        return None
    kind = columns.get(str(column), "")
    if kind == TEXT:
        return Aggregate((_counted(str(column), where),), _shares)
    if kind != NUMBER:
        return None
    told = name(str(column))
    shares = ", ".join(str(i / _BINS) for i in range(_BINS + 1))
    return Aggregate((f"quantile_cont({told}, [{shares}]) filter ({where})",), _edges)


def _shares(found: Sequence[Any]) -> Judged:
    counts = dict(found[0] or {})
    if not counts or len(counts) > _MOST_VALUES:
        return Judged(True, None, "")
    total = sum(counts.values())
    values = sorted(counts)
    return Judged(True, {"values": values, "weights": [counts[v] / total for v in values]}, "")


def _edges(found: Sequence[Any]) -> Judged:
    edges = sorted({edge for edge in found[0] or () if math.isfinite(edge)})
    return Judged(True, edges if len(edges) > 1 else None, "")


def shares_between(wanted: Expectation, columns: Columns, edges: Sequence[float]) -> Aggregate:
    """The shares of a column's rows between edges, as a partition object."""
    where = kind_of_rows(dict(wanted.args), columns)

    def judge(found: Sequence[Any]) -> Judged:
        total = max(sum(found), 1)
        return Judged(True, {"bins": list(edges), "weights": [n / total for n in found[1:-1]]}, "")

    return Aggregate(tuple(_histogram(str(wanted.args["column"]), where, edges)), judge)


_DISTINCT = (
    "(select count(*) from (select distinct {column} from {rows}"
    " where {where} and {column} is not null))"
)
_SHARE = "(" + _DISTINCT + "::double / nullif(count({column}) filter ({where}), 0))"

_MADE: dict[str, Callable[[Arguments, str], Aggregate]] = {
    "ExpectTableRowCountToBeBetween": _row_count,
    "ExpectTableRowCountToEqual": _row_count_equal,
    "ExpectColumnMeanToBeBetween": _of_column("avg({column}) filter ({where})", NUMBER),
    "ExpectColumnMedianToBeBetween": _of_column("median({column}) filter ({where})", NUMBER),
    "ExpectColumnMinToBeBetween": _of_column("min({column}) filter ({where})", NUMBER),
    "ExpectColumnMaxToBeBetween": _of_column("max({column}) filter ({where})", NUMBER),
    "ExpectColumnSumToBeBetween": _of_column("sum({column}) filter ({where})", NUMBER),
    "ExpectColumnStdevToBeBetween": _of_column("stddev_samp({column}) filter ({where})", NUMBER),
    "ExpectColumnUniqueValueCountToBeBetween": _of_column(_DISTINCT, *PLAIN),
    "ExpectColumnProportionOfUniqueValuesToBeBetween": _of_column(_SHARE, *PLAIN),
    "ExpectColumnProportionOfNonNullValuesToBeBetween": _of_column(
        "(count({column}) filter ({where})::double / nullif(count(*) filter ({where}), 0))", *PLAIN
    ),
    "ExpectColumnKLDivergenceToBeLessThan": _divergence,
}
