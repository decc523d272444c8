"""Which features move the scores, and by how much?"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from xgboost import Booster

MOST_ROWS = 500

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Importance:
    """Mean absolute SHAP value of a feature, in log-odds."""

    feature: str
    mean_abs: float


def rank(
    booster: "Booster", matrix: Array, names: Sequence[str], seed: int = 0
) -> tuple[Importance, ...]:
    """Features by their SHAP values on at most 500 rows, the strongest first."""
    with warnings.catch_warnings():
        # SHAP and the numba below it announce changes of their own while they are imported.
        warnings.simplefilter("ignore")
        import shap

        values = np.abs(shap.TreeExplainer(booster).shap_values(_sample(matrix, seed)))
    means = values.mean(axis=0)
    order = sorted(range(len(names)), key=lambda i: (-means[i], names[i]))
    return tuple(Importance(names[i], float(means[i])) for i in order)


def _sample(matrix: Array, seed: int) -> Array:
    if len(matrix) <= MOST_ROWS:
        return matrix
    chosen = np.random.default_rng(seed).choice(len(matrix), MOST_ROWS, replace=False)
    return matrix[np.sort(chosen)]
