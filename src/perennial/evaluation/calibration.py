"""Do probabilities mean what they say?"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Rows of neighbouring scores: what was said, and what came."""

    rows: int
    said: float
    came: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error over bins of equal mass, and the Brier score."""

    error: float
    brier: float
    bins: tuple[Bin, ...]


def measure(labels: Array, scores: Array) -> Calibration:
    """Compare scores with labels bin by bin; each bin holds about a tenth of the rows."""
    order = np.argsort(scores, kind="stable")
    parts = [p for p in np.array_split(order, BINS) if len(p)]
    bins = tuple(Bin(len(p), float(scores[p].mean()), float(labels[p].mean())) for p in parts)
    gaps = sum(b.rows * abs(b.said - b.came) for b in bins)
    return Calibration(
        error=float(gaps / len(scores)),
        brier=float(np.mean((scores - labels) ** 2)),
        bins=bins,
    )
