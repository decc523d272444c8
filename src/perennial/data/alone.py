"""How well does one column alone tell a label of two values?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import sources

LEAST_EACH = 30  # rows of either label; with fewer an AUC says nothing
MOST = 0.93  # AUC of an honest column, and of one with two values; docs/breaks.md says why
MOST_TWO_VALUED = 0.88
GROUPS = 50  # of a number: by as many quantiles
_FOLDS = 5
_SAME = 0.01
_WEIGHT = 10.0  # rows that the overall share counts for in the share of a group

Truth = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Alone:
    """The best of three ways to read one column; ``auc`` is at least 0.5."""

    auc: float
    way: str  # order, group or missing


def measure(values: "pd.Series[Any]", positive: "pd.Series[Any]") -> Alone:
    """How well a column tells ``positive`` (0, 1 and NaN where it is not known).

    Read as an order (numbers, in both directions), as groups (texts, or quantiles of numbers, each
    scored by the label's share among the rows of the other folds, so that a text that names its row
    tells nothing), and by whether there is a value at all. With fewer than ``LEAST_EACH`` rows of
    either label the answer is 0.5.
    """
    known = positive.notna().to_numpy()
    truth: Truth = positive[known].to_numpy(dtype="float64") > 0
    if min(truth.sum(), (~truth).sum()) < LEAST_EACH:
        return Alone(0.5, "missing")
    values = values[known]
    missing = values.isna().to_numpy()
    found = [Alone(_both(missing.astype("float64"), truth), "missing")]
    if is_number(values):
        numbers = sources.as_numbers(values).to_numpy()
        found.append(Alone(_both(_filled(numbers), truth), "order"))
        found.append(Alone(by_group(_quantiles(numbers), truth), "group"))
    else:
        codes = pd.factorize(values.astype("object").where(~missing, None).map(str))[0]
        found.append(Alone(by_group(codes, truth), "group"))
    best = max(found, key=lambda alone: alone.auc)
    # Values that are there for one label only tell it by being there.
    return found[0] if best.auc - found[0].auc < _SAME and found[0].auc > MOST_TWO_VALUED else best


def limit(values: "pd.Series[Any]") -> float:
    """The AUC above which a column tells too much: one yes or no may tell less."""
    return MOST_TWO_VALUED if values.nunique() == 2 else MOST


def is_number(values: "pd.Series[Any]") -> bool:
    """Numbers have an order; truth values and texts are groups."""
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def auc(scores: Numbers, truth: Truth) -> float:
    """Chance that a row of the one label scores above one of the other, ties by half.

    Mann and Whitney's U over the number of pairs (Annals of Mathematical Statistics 18, 1947).
    """
    ones, zeros = int(truth.sum()), int((~truth).sum())
    if not ones or not zeros:
        return 0.5
    ranks = pd.Series(scores).rank().to_numpy()
    return float((ranks[truth].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def by_group(codes: "np.ndarray[Any, Any]", truth: Truth) -> float:
    """AUC of the label's share in a row's group, counted without the fold that the row is in.

    Out of fold and drawn to the overall share (Micci-Barreca, SIGKDD Explorations 3, 2001): groups
    of one or two rows would tell their own label otherwise.
    """
    count, fold = int(codes.max()) + 1, np.arange(len(codes)) % _FOLDS
    rows, ones = _sums(codes, truth, count)
    scores = np.empty(len(codes))
    for number in range(_FOLDS):
        mine = fold == number
        out_rows, out_ones = _sums(codes[mine], truth[mine], count)
        share = float(truth[~mine].mean())
        told = (ones - out_ones + _WEIGHT * share) / (rows - out_rows + _WEIGHT) - share
        scores[mine] = told[codes[mine]]
    # Shares of other rows have a side: below 0.5 they tell nothing, not the contrary.
    return max(auc(scores, truth), 0.5)


def _sums(codes: "np.ndarray[Any, Any]", truth: Truth, count: int) -> tuple[Numbers, Numbers]:
    rows = np.bincount(codes, minlength=count).astype("float64")
    ones = np.bincount(codes, weights=truth, minlength=count).astype("float64")
    return rows, ones


def _both(scores: Numbers, truth: Truth) -> float:
    found = auc(scores, truth)
    return max(found, 1 - found)


def _filled(numbers: Numbers) -> Numbers:
    """What is missing counts as less than all there is."""
    present = numbers[np.isfinite(numbers)]
    least = present.min() - 1 if len(present) else 0.0
    return np.where(np.isnan(numbers), least, numbers)


def _quantiles(numbers: Numbers) -> "np.ndarray[Any, Any]":
    """The quantile that each number lies in, counted from 1; 0 where there is none."""
    present = numbers[np.isfinite(numbers)]
    if not len(present):
        return np.zeros(len(numbers), dtype="int64")
    edges = np.unique(np.quantile(present, np.linspace(0, 1, GROUPS + 1)[1:-1]))
    return np.where(np.isnan(numbers), 0, np.searchsorted(edges, numbers, side="right") + 1)
