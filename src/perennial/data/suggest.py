"""Which rules would this snapshot keep, and a broken one not? Proposals for a project.yaml."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from perennial.data import columns
from perennial.data.duck import column as name
from perennial.data.rules import NUMBER, TEXT, TIME
from perennial.data.sift import Sieve
from perennial.project import LAST_ACCEPTED, OF_LAST, Expectation

# Columns that ingest makes; what they hold is not the source's doing.
_OWN = ("row_id", "event_time", "label", "label_known_at")
_MOST_VALUES = 20
_FEW = 0.01  # of the rows, so that a rule may speak of slips and not of a habit
_BROAD = 0.5  # of the range that was seen, added at both ends
_DIVERGENCE = 0.5
_MANY_VALUES = 100  # of a text; fewer come and go, and their shares can be compared
# Of what last time showed. What is hardly ever missing does not begin to be so by chance; what is
# missing in many rows is so now more, now less.
_GAPS = 0.05
_HARDLY_MISSING, _OFTEN_MISSING = 0.9, 0.75
_STEADY = {"min_value": {OF_LAST: 0.5}, "max_value": {OF_LAST: 2}}
_LOOSE = {"min_value": {OF_LAST: 0.25}, "max_value": {OF_LAST: 4}}


@dataclass(frozen=True)
class Seen:
    """What one column shows."""

    column: str
    kind: str
    missing: float
    distinct: int
    least: Any  # of numbers that are finite, and of times
    most: Any
    endless: tuple[bool, bool]  # are there numbers without end, downwards and upwards?
    median: float | None
    values: tuple[str, ...]


def suggest(snapshot: Path, scratch: Path, *, is_timed: bool = True) -> tuple[Expectation, ...]:
    """Rules that a snapshot keeps, in three layers; each is a proposal to read, not a truth.

    ``is_timed`` says that a table's rows bring their times, and are not only counted.
    """
    with Sieve(snapshot, scratch) as sieve:
        own = _OWN if not is_timed else tuple(c for c in _OWN if c != "event_time")
        seen = [_look(sieve, column) for column in sieve.columns if column not in own]
        # The rows of a table may well be alike; those of a shop's books may not.
        whole = "event_time" not in sieve.columns
        repeats = _repeats(sieve, [one.column for one in seen]) if whole else []
    found = [rule for one in seen for rule in _rules(one)]
    rows = _of("ExpectTableRowCountToBeBetween", "statistics", min_value={OF_LAST: 0.5})
    return (rows, *found, *repeats)


def as_yaml(rules: Sequence[Expectation]) -> str:
    """The rules as they stand in a project.yaml, one a line."""
    lines = ["expectations:"]
    for rule in rules:
        plain = rule.model_dump(exclude_defaults=True)
        told = yaml.safe_dump(plain, default_flow_style=True, sort_keys=False, width=10_000)
        lines.append(f"  - {told.strip()}")
    return "\n".join(lines) + "\n"


def _look(sieve: Sieve, column: str) -> Seen:
    kind, told = sieve.columns[column], name(column)
    ends = [f"min({told})", f"max({told})"] if kind in (NUMBER, TIME) else ["null", "null"]
    extra = [*ends, *["null"] * 3]
    if kind == NUMBER:
        finite = [f"{end} filter (isfinite({told}))" for end in ends]
        endless = [f"coalesce(bool_or({told} = '{end}'::double), false)" for end in ("-inf", "inf")]
        extra = [*finite, f"median({told})", *endless]
    distinct = f"(select count(*) from (select distinct {told} from __rows where {told} not null))"
    counts = ["count(*)", f"count({told})", distinct, *extra]
    rows, present, distinct_, least, most, median, *endless = sieve.ask(counts)
    values = sieve.values(column, _MOST_VALUES) if kind == TEXT and distinct_ else ()
    missing = 1 - present / rows if rows else 0.0
    is_endless = (bool(endless[0]), bool(endless[1]))
    return Seen(column, kind, missing, distinct_, least, most, is_endless, median, values)


def _rules(seen: Seen) -> list[Expectation]:
    found = _presence(seen)
    if columns.names_an_id(seen.column):
        return found  # who they are says nothing, and new ones come
    if seen.kind == NUMBER and seen.least is not None and seen.most is not None:
        found += _of_number(seen, seen.least, seen.most)
    elif seen.kind == TEXT and seen.distinct:
        found += _of_text(seen)
    elif seen.kind == TIME and seen.distinct:
        found += [_of_time(seen)]
    return found


def _presence(seen: Seen) -> list[Expectation]:
    column = {"column": seen.column}
    if not seen.missing:
        return [_of("ExpectColumnValuesToNotBeNull", "schema", **column)]
    return [
        _of(
            "ExpectColumnProportionOfNonNullValuesToBeBetween",
            "statistics",
            **column,
            min_value={OF_LAST: _OFTEN_MISSING if seen.missing > _GAPS else _HARDLY_MISSING},
        )
    ]


def _of_number(seen: Seen, least: float, most: float) -> list[Expectation]:
    column = {"column": seen.column}
    ends = zip(("min_value", "max_value"), _broad(least, most), seen.endless, strict=True)
    # Where the numbers have no end, a limit would break what was seen.
    limits = {key: end for key, end, is_endless in ends if not is_endless and math.isfinite(end)}
    found = [_of("ExpectColumnValuesToBeBetween", "schema", **column, **limits)] if limits else []
    if seen.median and math.isfinite(seen.median):
        found.append(_of("ExpectColumnMedianToBeBetween", "statistics", **column, **_STEADY))
    if seen.distinct > 1:
        found.append(_alike(seen.column))
    return found


def _of_text(seen: Seen) -> list[Expectation]:
    column = {"column": seen.column}
    if seen.values:
        in_set = _of("ExpectColumnValuesToBeInSet", "schema", **column, value_set=list(seen.values))
        return [in_set, _alike(seen.column)]
    many = seen.distinct > _MANY_VALUES
    ends = _STEADY if many else _LOOSE
    count = _of("ExpectColumnUniqueValueCountToBeBetween", "statistics", **column, **ends)
    return [count] if many else [count, _alike(seen.column)]


def _of_time(seen: Seen) -> Expectation:
    """Rows go on where others end; a date with day for month lies long before the first of them."""
    day = (seen.least - (seen.most - seen.least) * _BROAD).date()
    begin = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return _of("ExpectColumnValuesToBeBetween", "schema", column=seen.column, min_value=begin)


def _alike(column: str) -> Expectation:
    return _of(
        "ExpectColumnKLDivergenceToBeLessThan",
        "statistics",
        column=column,
        partition_object=LAST_ACCEPTED,
        threshold=_DIVERGENCE,
    )


def _broad(least: float, most: float) -> tuple[float, float]:
    """The range that was seen and half as much on both sides, in round numbers; never through 0."""
    room = (most - least) * _BROAD or abs(most) * _BROAD or 1.0
    low = 0.0 if least >= 0 > least - room else _round(least - room, math.floor)
    high = 0.0 if most <= 0 < most + room else _round(most + room, math.ceil)
    return low, high


def _round(value: float, way: Any) -> float:
    """To two digits that count, outwards."""
    if not value or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1)
    return float(f"{way(value / unit) * unit:.6g}")


def _repeats(sieve: Sieve, all_: list[str]) -> list[Expectation]:
    """Rows that are there twice, where nearly none are."""
    rule = _of("ExpectCompoundColumnsToBeUnique", "business", column_list=all_)
    surplus = sieve.surplus(all_)
    return [rule] if len(all_) > 1 and surplus <= _FEW * sieve.rows else []


def _of(expect: str, layer: Any, **args: Any) -> Expectation:
    return Expectation(expect=expect, layer=layer, args=args)
