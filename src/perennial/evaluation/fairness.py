"""Does the model treat the groups of a sensitive column alike?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

LEAST_ROWS = 50
MOST_VALUES = 8  # a number with more values is cut into quarters


@dataclass(frozen=True)
class Group:
    """The rows that share one value of a sensitive column."""

    value: str
    rows: int
    selection_rate: float  # share that was predicted positive
    accuracy: float
    too_small: bool  # fewer than 50 rows: shown, not judged


@dataclass(frozen=True)
class Fairness:
    """One sensitive column; the ratio is the least selection rate over the greatest."""

    column: str
    groups: tuple[Group, ...]
    parity_ratio: float | None  # None with fewer than two groups that are large enough


def measure(
    columns: pd.DataFrame, labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]
) -> tuple[Fairness, ...]:
    """One result for each column of ``columns``; ``predicted`` holds 0 or 1."""
    return tuple(_measure(columns[name], labels, predicted) for name in columns.columns)


def _measure(
    column: "pd.Series[Any]", labels: np.ndarray[Any, Any], predicted: np.ndarray[Any, Any]
) -> Fairness:
    from fairlearn.metrics import MetricFrame, count, selection_rate
    from sklearn.metrics import accuracy_score

    frame = MetricFrame(
        metrics={"rows": count, "selection_rate": selection_rate, "accuracy": accuracy_score},
        y_true=labels,
        y_pred=predicted,
        sensitive_features=_values(column),
    )
    groups = tuple(
        Group(
            value=str(value),
            rows=int(row["rows"]),
            selection_rate=float(row["selection_rate"]),
            accuracy=float(row["accuracy"]),
            too_small=bool(row["rows"] < LEAST_ROWS),
        )
        for value, row in frame.by_group.iterrows()
    )
    return Fairness(str(column.name), groups, _parity(groups))


def _values(column: "pd.Series[Any]") -> "pd.Series[Any]":
    """Values as text; a number with many values by its quarters."""
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > MOST_VALUES:
        column = pd.qcut(column, 4, duplicates="drop")
    return column.astype(object).where(column.notna(), "missing").astype(str)


def _parity(groups: tuple[Group, ...]) -> float | None:
    rates = [g.selection_rate for g in groups if not g.too_small]
    if len(rates) < 2 or max(rates) == 0:
        return None
    return min(rates) / max(rates)
