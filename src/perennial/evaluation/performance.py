"""How well does a model tell the two labels apart, and is it better than another one?"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

THRESHOLD = 0.5
_CHUNK = 100  # resamples at once: bounds the memory


@dataclass(frozen=True)
class Performance:
    """Scores against labels; the counts are at a threshold of one half."""

    rows: int
    positive_share: float
    auc: float | None  # None without both labels
    accuracy: float
    precision: float | None  # None when nothing was predicted positive
    recall: float | None
    f1: float | None
    log_loss: float
    confusion: tuple[tuple[int, int], tuple[int, int]]  # [actual][predicted]


@dataclass(frozen=True)
class Gain:
    """AUC gained over another model on the same rows, with a one-sided bound."""

    auc: float
    lower: float
    confidence: float
    resamples: int


def measure(labels: Array, scores: Array) -> Performance:
    """All numbers of one model on rows with known labels."""
    actual, predicted = labels == 1, scores >= THRESHOLD
    hits, misses = int((actual & predicted).sum()), int((actual & ~predicted).sum())
    alarms, rest = int((~actual & predicted).sum()), int((~actual & ~predicted).sum())
    sure = np.clip(np.where(actual, scores, 1 - scores), 1e-15, 1)
    return Performance(
        rows=len(labels),
        positive_share=float(actual.mean()),
        auc=auc(labels, scores),
        accuracy=(hits + rest) / len(labels),
        precision=_ratio(hits, hits + alarms),
        recall=_ratio(hits, hits + misses),
        f1=_ratio(2 * hits, 2 * hits + alarms + misses),
        log_loss=float(-np.log(sure).mean()),
        confusion=((rest, alarms), (misses, hits)),
    )


def auc(labels: Array, scores: Array) -> float | None:
    """Area under the ROC curve; ties count half. None without both labels."""
    found = float(_weighted_auc(labels, scores, np.ones((1, len(labels))))[0])
    return None if math.isnan(found) else found


def roc(labels: Array, scores: Array, points: int = 100) -> tuple[Array, Array, Array]:
    """False and true positive rates by falling threshold, thinned to about ``points``.

    Thresholds are finite, from 1 down to 0, because dashboards cannot draw infinity.
    """
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    ups = np.cumsum(labels[order] == 1)[last]
    downs = np.cumsum(labels[order] != 1)[last]
    keep = np.unique(np.linspace(0, len(last) - 1, points).astype(int))
    rates = [np.append(0.0, x[keep] / max(int(x[-1]), 1)) for x in (downs, ups)]
    return rates[0], rates[1], np.append(1.0, scores[order][last][keep])


def gain(
    labels: Array,
    scores: Array,
    others: Array,
    *,
    confidence: float,
    resamples: int = 2000,
    seed: int = 0,
) -> Gain | None:
    """AUC gained over ``others`` by a paired bootstrap of rows; None without both labels."""
    first, second = auc(labels, scores), auc(labels, others)
    if first is None or second is None:
        return None
    rng = np.random.default_rng(seed)
    found = []
    for begin in range(0, resamples, _CHUNK):
        size = min(_CHUNK, resamples - begin)
        drawn = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size)
        mine = _weighted_auc(labels, scores, drawn)
        found.append(mine - _weighted_auc(labels, others, drawn))
    differences = np.concatenate(found)
    lower = float(np.nanquantile(differences, 1 - confidence))
    return Gain(first - second, lower, confidence, resamples)


def _weighted_auc(labels: Array, scores: Array, weights: np.ndarray[Any, Any]) -> Array:
    """One AUC for each row of ``weights`` (how often a row was drawn); NaN without both labels."""
    order = np.argsort(scores, kind="stable")
    starts = np.append(0, np.flatnonzero(np.diff(scores[order])) + 1)
    positive = labels[order] == 1
    ups = np.add.reduceat(weights[:, order] * positive, starts, axis=1).astype(np.float64)
    downs = np.add.reduceat(weights[:, order] * ~positive, starts, axis=1).astype(np.float64)
    below = np.cumsum(downs, axis=1) - downs / 2
    with np.errstate(invalid="ignore"):
        found: Array = (ups * below).sum(axis=1) / (ups.sum(axis=1) * downs.sum(axis=1))
    return found


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
