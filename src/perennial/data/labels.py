"""Do the labels of a new table come as they came in the last accepted one?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import erfc, sqrt
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import alone, leaks
from perennial.data.leaks import Table

BINS = 10
MOST_VALUES = 50  # of a category; others share one group
OTHERS = "others"
MISSING = "missing"

P_VALUE = 1e-3
LEAST_CHANGE = 0.10  # of the share of positives; large tables differ by less than that all the time
LEAST_TELLS = 0.05  # AUC above a coin, from which on a feature has a side
JUMPED = 0.15  # AUC that a feature gained
TELLS_MUCH = 0.80  # AUC, up to which one feature may well tell so much; as for leaks
TURNED = -0.5  # 1 is as before, 0 as by chance, -1 the other way round


@dataclass(frozen=True)
class Reading:
    """Which share of a feature's values had the label: by value, or between ``edges``."""

    shares: Mapping[str, float]
    edges: tuple[float, ...]
    auc: float


@dataclass(frozen=True)
class Labels:
    """The labels of one table: what the next one is held against. ``as_json`` keeps it."""

    rows: int
    positives: int
    readings: Mapping[str, Reading]

    @property
    def share(self) -> float:
        return self.positives / self.rows if self.rows else float("nan")

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the record of an accepted snapshot."""
        return asdict(self)


def from_json(told: Mapping[str, Any]) -> Labels:
    """What ``as_json`` gave. Raises KeyError or TypeError for anything else."""
    readings = {
        name: Reading(dict(r["shares"]), tuple(r["edges"]), float(r["auc"]))
        for name, r in told["readings"].items()
    }
    return Labels(int(told["rows"]), int(told["positives"]), readings)


@dataclass(frozen=True)
class Change:
    """One judgement on the labels; ``is_broken`` where ``measure`` lies beyond ``limit``.

    ``severity`` is critical where it must stop a run then, warning where a person should look.
    """

    kind: str
    measure: float
    limit: float
    is_broken: bool
    sentence: str
    severity: str = "critical"


def learn(table: Table) -> Labels:
    """Share of positives, and how the label lies along each feature of the labelled rows."""
    rows = _labelled(table)
    truth = _truth(rows)
    found = {name: _reading(rows[name], truth) for name in table.features}
    labels = table.rows["label"].dropna()
    return Labels(len(labels), int((labels > 0).sum()), found)


def judge(last: Labels, table: Table, least_change: float = LEAST_CHANGE) -> tuple[Change, ...]:
    """Both judgements on a new table; nothing where either table has too few labels."""
    labels = table.rows["label"].dropna()
    ones = int((labels > 0).sum())
    if min(len(labels), last.rows) < 2 * alone.LEAST_EACH:
        return ()
    jumped = prior(
        ones,
        len(labels),
        last.positives,
        last.rows,
        target=table.target,
        least_change=least_change,
    )
    fewest = min(ones, len(labels) - ones, last.positives, last.rows - last.positives)
    # A label that is always the same has no side, but it has jumped all the same.
    return (jumped, turned(last, table)) if fewest >= alone.LEAST_EACH else (jumped,)


def prior(
    positives: int,
    rows: int,
    last_positives: int,
    last_rows: int,
    *,
    target: str = "label",
    least_change: float = LEAST_CHANGE,
    p_value: float = P_VALUE,
) -> Change:
    """Has the share of positives changed, by more than chance and by more than matters?

    Two-sided z test of two proportions with a pooled share (Fleiss, Levin and Paik, Statistical
    Methods for Rates and Proportions, 3rd edition, chapter 3) and an absolute change of at least
    ``least_change``: of a million rows any change is more than chance.
    """
    now, before = positives / rows, last_positives / last_rows
    pooled = (positives + last_positives) / (rows + last_rows)
    spread = sqrt(pooled * (1 - pooled) * (1 / rows + 1 / last_rows))
    p = erfc(abs(now - before) / spread / sqrt(2)) if spread else 1.0
    change = abs(now - before)
    said = (
        f"{target}: {now:.1%} of {rows:,} rows are positive, {before:.1%} of {last_rows:,} were in"
        f" the last accepted data; wanted a change of at most {least_change:.0%}"
    )
    return Change("prior", change, least_change, change > least_change and p < p_value, said)


def turned(last: Labels, table: Table) -> Change:
    """Do the features tell the label the other way round than they did?

    Each row is scored by the share of positives that its value had in the last accepted table. The
    measure is the AUC above a coin of these scores, summed over the features that had a side, as a
    part of what it was: 1 as before, 0 as by chance, -1 when all labels are exchanged.
    """
    rows = _labelled(table)
    truth = _truth(rows)
    sides = {n: r for n, r in last.readings.items() if r.auc - 0.5 >= LEAST_TELLS and n in rows}
    before = sum(r.auc - 0.5 for r in sides.values())
    now = sum(alone.auc(_scores(rows[n], r), truth) - 0.5 for n, r in sides.items())
    measure = now / before if before else 1.0
    most = sorted(sides, key=lambda n: -sides[n].auc)[:3]
    said = (
        f"{table.target}: {', '.join(most) or 'no feature'} tell it at {measure:+.2f} of what they"
        " did in the last accepted data (-1: all labels are exchanged); wanted more than"
        f" {TURNED:+.2f}"
    )
    return Change("turned", measure, TURNED, measure <= TURNED, said)


def jumped(last: Labels, now: Labels, table: Table) -> Change | None:
    """Does one feature of a new table tell the label far better than it did? None: too few labels.

    So does a column that is filled in later since then, which a warning is for.
    """
    each = (last.positives, last.rows - last.positives, now.positives, now.rows - now.positives)
    both = [n for n in table.judged if n in last.readings and n in now.readings]
    if min(each) < alone.LEAST_EACH or not both:
        return None
    gains = {n: now.readings[n].auc - last.readings[n].auc for n in both}
    most = max(gains, key=lambda n: (now.readings[n].auc > TELLS_MUCH, gains[n]))
    after, before = now.readings[most].auc, last.readings[most].auc
    said = (
        f"{most} alone tells {table.target} with an AUC of {after:.3f}, {before:.3f} in the last"
        f" accepted data; wanted a gain of at most {JUMPED:.2f} above {TELLS_MUCH:.2f}: see what"
        " fills it in now"
    )
    is_broken = gains[most] > JUMPED and after > TELLS_MUCH
    return Change("jumped", gains[most], JUMPED, is_broken, said, "warning")


def _labelled(table: Table) -> pd.DataFrame:
    return leaks.spaced(table.rows[table.rows["label"].notna()], leaks.MOST_ROWS)


def _truth(rows: pd.DataFrame) -> alone.Truth:
    truth: alone.Truth = rows["label"].to_numpy(dtype="float64") > 0
    return truth


def _reading(values: "pd.Series[Any]", truth: alone.Truth) -> Reading:
    edges = _edges(values) if alone.is_number(values) else ()
    keys = _keys(values, edges)
    if not edges:
        common = keys.value_counts().index[:MOST_VALUES]
        keys = keys.where(keys.isin(common), OTHERS)
    shares = pd.Series(truth.astype("float64")).groupby(keys.to_numpy()).mean()
    found = Reading({str(k): float(v) for k, v in shares.items()}, edges, 0.5)
    return Reading(found.shares, edges, alone.auc(_scores(values, found), truth))


def _edges(values: "pd.Series[Any]") -> tuple[float, ...]:
    numbers = values.to_numpy(dtype="float64")
    present = numbers[np.isfinite(numbers)]
    if not len(present):
        return ()
    return tuple(np.unique(np.quantile(present, np.linspace(0, 1, BINS + 1)[1:-1])).tolist())


def _keys(values: "pd.Series[Any]", edges: Sequence[float]) -> "pd.Series[Any]":
    """The group of each value, as a text."""
    if not edges:
        texts = values.astype("object").map(str, na_action="ignore")
        return texts.where(values.notna(), MISSING)
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype="float64")
    places = np.searchsorted(np.asarray(edges), numbers, side="right").astype(str)
    return pd.Series(np.where(np.isnan(numbers), MISSING, places), index=values.index)


def _scores(values: "pd.Series[Any]", reading: Reading) -> alone.Numbers:
    usual = float(np.median(list(reading.shares.values()))) if reading.shares else 0.5
    others = reading.shares.get(OTHERS, usual)
    told = _keys(values, reading.edges).map(reading.shares).fillna(others)
    scores: alone.Numbers = told.to_numpy(dtype="float64")
    return scores
