"""Are the features that go online like those before: nulls, range, drift, and a verdict?

Drift is the population stability index of ten bins of the reference (N. Siddiqi, Credit Risk
Scorecards, 2006): below 0.1 little, above 0.25 much. Of few rows it is large by chance alone, about
(1/n + 1/m) times chi-squared with bins - 1 degrees of freedom (B. Yurdakul, J. Naranjo, Statistical
properties of the population stability index, Journal of Risk Model Validation, 2020), so it must
exceed that as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import chi2

from perennial.project import Feature

GOOD, WARN, BAD = "good", "warn", "bad"
BINS = 10
MOST_CATEGORIES = 20
DRIFT_WARN, DRIFT_BAD = 0.1, 0.25
CHANCE = 0.001  # a drift that only so seldom comes by chance counts
NULLS_WARN = 0.05  # as a share of all rows more than in the reference
OUTSIDE_WARN = 0.01  # share of values beyond what the reference had
_HALF = 0.5  # a row more in each bin, so that an empty one has a logarithm (Haldane, Anscombe)
_OTHER = "other"

Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Profile:
    """What a feature's values were: counts in bins of numbers (edges between them) or by text."""

    rows: int
    nulls: int
    least: float | None
    greatest: float | None
    edges: tuple[float, ...]
    counts: Mapping[str, int]

    @property
    def null_rate(self) -> float:
        return self.nulls / self.rows if self.rows else 1.0


@dataclass(frozen=True)
class Quality:
    """One feature of one materialization against its reference."""

    feature: str
    profile: Profile
    outside: float  # share of numbers beyond the reference's range
    drift: float | None  # population stability index; None without a reference
    verdict: str
    reason: str


def profile(feature: Feature, values: "pd.Series[Any]", like: Profile | None) -> Profile:
    """Count values in the bins of ``like``, or in bins of their own."""
    present = values.dropna()
    rows, nulls = len(values), len(values) - len(present)
    if feature.type == "category":
        return Profile(rows, nulls, None, None, (), _by_text(present, like))
    numbers = present.to_numpy(dtype="float64")
    edges = like.edges if like else _edges(numbers)
    places = np.searchsorted(np.asarray(edges), numbers, side="left")
    found = np.bincount(places, minlength=len(edges) + 1)
    counts = {str(place): int(count) for place, count in enumerate(found)}
    least, greatest = (
        (float(f(numbers)) for f in (np.min, np.max)) if len(numbers) else (None, None)
    )
    return Profile(rows, nulls, least, greatest, edges, counts)


def judge(
    feature: Feature, now: Profile, values: "pd.Series[Any]", before: Profile | None
) -> Quality:
    """Give the verdict on one feature; ``before`` is the reference, None where there is none."""
    drift = stability_index(now, before) if before else None
    outside = _outside(feature, values, before)
    faults = [*_nulls(feature, now, before), *_drifted(now, before, drift)]
    if outside > OUTSIDE_WARN and before:
        span = f"{before.least:.6g} to {before.greatest:.6g}"
        faults.append((WARN, f"{outside:.1%} lie outside {span}"))
    if feature.type == "number" and np.isinf(values.dropna().to_numpy(dtype="float64")).any():
        faults.append((BAD, "some numbers are infinite"))
    verdict = next((v for v in (BAD, WARN) if any(v == tone for tone, _ in faults)), GOOD)
    like = "as before" if before else "nothing to compare with yet"
    return Quality(
        feature.name, now, outside, drift, verdict, "; ".join(t for _, t in faults) or like
    )


def worst(found: Sequence[Quality]) -> str:
    """The verdict on all features together."""
    return next((v for v in (BAD, WARN) if any(q.verdict == v for q in found)), GOOD)


def stability_index(now: Profile, before: Profile) -> float:
    """Population stability index of two profiles with the same bins; 0 for the same shares."""
    bins = sorted({*now.counts, *before.counts})
    here, there = _shares(now, bins), _shares(before, bins)
    return float(np.sum((here - there) * np.log(here / there)))


def _shares(found: Profile, bins: Sequence[str]) -> Values:
    counts = np.array([found.counts.get(name, 0) + _HALF for name in bins], dtype="float64")
    shares: Values = counts / counts.sum()
    return shares


def _drifted(now: Profile, before: Profile | None, drift: float | None) -> list[tuple[str, str]]:
    if before is None or drift is None or drift <= DRIFT_WARN:
        return []
    seen, known = now.rows - now.nulls, before.rows - before.nulls
    if not seen or not known:
        return []
    freedom = max(len({*now.counts, *before.counts}) - 1, 1)
    if drift <= (1 / seen + 1 / known) * float(chi2.isf(CHANCE, freedom)):
        return []
    return [(BAD if drift > DRIFT_BAD else WARN, f"stability index {drift:.2f}")]


def _nulls(feature: Feature, now: Profile, before: Profile | None) -> list[tuple[str, str]]:
    if feature.missing == "fail" and now.nulls:
        return [(BAD, f"{now.nulls:,} of {now.rows:,} rows have no value, though none may miss it")]
    if before and now.null_rate - before.null_rate > NULLS_WARN:
        return [(WARN, f"{now.null_rate:.1%} have no value, {before.null_rate:.1%} before")]
    return []


def _outside(feature: Feature, values: "pd.Series[Any]", before: Profile | None) -> float:
    if feature.type == "category" or before is None or before.least is None:
        return 0.0
    numbers = values.dropna().to_numpy(dtype="float64")
    beyond = (numbers < before.least) | (numbers > float(before.greatest or 0.0))
    return float(beyond.mean()) if len(numbers) else 0.0


def _edges(numbers: Values) -> tuple[float, ...]:
    if not len(numbers):
        return ()
    found = np.unique(np.quantile(numbers, np.linspace(0, 1, BINS + 1)[1:-1]))
    return tuple(float(edge) for edge in found)


def _by_text(present: "pd.Series[Any]", like: Profile | None) -> dict[str, int]:
    counts = present.astype(str).value_counts()
    names = set(like.counts) if like else set(counts.index[:MOST_CATEGORIES])
    found = {str(name): int(count) for name, count in counts.items() if name in names}
    rest = int(counts.sum()) - sum(found.values())
    return {**found, _OTHER: found.get(_OTHER, 0) + rest} if rest else found
