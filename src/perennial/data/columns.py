"""What does a column of an unknown table hold, and should a model see it?"""

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import alone, sources

MOST_CATEGORIES = 50
_NEARLY_ALL = 0.9  # of a column's values differ: it names the row
_MOSTLY = 0.95  # of a column's values are dates: it means to hold dates
_ODD = 0.01  # of a column's values are no numbers, and it is one of numbers all the same
_SAMPLE = 200
_ROWS_TO_COUNT = 50  # so many numbers that only rise are no chance

_NAMED_ID = re.compile(r"(^|[\W_])(id|ID|Id)$|^(id|ID|Id)[\W_]|[a-z0-9]I[dD]$|(?i:uuid|guid)")
_DATE = re.compile(r"(^|\D)(19|20)\d{2}|^\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}\b")
# Feast, XGBoost or the feature table itself use these for something else.
_TAKEN = (
    *("row_id", "event_time", "event_timestamp", "feature_time"),
    *("label", "label_known_at", "_order"),
)
_UNFIT = re.compile(r"[\[\]<:]")


@dataclass(frozen=True)
class Column:
    """One column: its type as a feature, or why it had better not be one."""

    name: str
    type: str  # number or category; empty: neither
    holds: str
    left_out: str  # the reason; empty: the model may see it
    missing: float
    limits: tuple[float, float] | None  # least and greatest number


def look(raw: pd.DataFrame, name: str, positive: "pd.Series[Any]") -> Column:
    """Look at one column of ``raw``; ``positive`` is the label as 0, 1 and NaN."""
    column = raw[name]
    found = kind(column)
    values = _values(column, found)
    unfit = _unfit(name, raw)
    return Column(
        name=name,
        type=found if found in ("number", "category") and not unfit else "",
        holds=_holds(values, found),
        left_out=_left_out(name, values, found, positive) or unfit,
        missing=float(column.isna().mean()),
        limits=_limits(values) if found == "number" else None,
    )


def kind(column: "pd.Series[Any]") -> str:
    """One of number, category, date and other."""
    present = column.dropna()
    if pd.api.types.is_timedelta64_dtype(column) or pd.api.types.is_complex_dtype(column):
        return "other"
    if len(present) and not _plain(present.iloc[0]):
        return "other"
    if pd.api.types.infer_dtype(present) == "boolean":
        return "category"
    if is_dates(column):
        return "date"
    numbers = sources.as_numbers(present)
    return "number" if numbers.notna().any() and numbers.isna().mean() <= _ODD else "category"


def is_dates(column: "pd.Series[Any]") -> bool:
    """Do nearly all values name a day of some year? Plain numbers do not."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    present = column.dropna()
    if pd.api.types.is_numeric_dtype(column) or present.empty:
        return False
    # Parsers of dates take "may" and "sat" for dates of this year.
    looks = present.head(_SAMPLE).map(lambda value: bool(_DATE.search(str(value))))
    if looks.mean() < _MOSTLY or sources.as_numbers(present).notna().mean() > 1 - _MOSTLY:
        return False
    return bool(sources.as_times(present).notna().mean() >= _MOSTLY)


def _plain(value: object) -> bool:
    return isinstance(value, Hashable) and not isinstance(value, bytes | tuple)


def _values(column: "pd.Series[Any]", found: str) -> "pd.Series[Any]":
    """What can be counted: texts for what is no number."""
    if found == "number":
        return sources.as_numbers(column)
    return column.astype("object").where(column.notna(), None).map(str, na_action="ignore")


def _left_out(name: str, values: "pd.Series[Any]", found: str, positive: "pd.Series[Any]") -> str:
    distinct = values.nunique()
    if found == "other":
        return "neither numbers nor texts"
    if found == "date":
        return "dates; make numbers of them, such as days since then, if they should count"
    if not distinct or (distinct == 1 and values.notna().all()):
        return "always the same"
    if _is_id(name, values, found):
        return "names a row or an entity, which tells nothing about the next one"
    if found == "number":
        return _left_out_number(values) or _leak(values, positive)
    if distinct > MOST_CATEGORIES:
        return f"{distinct:,} different texts; group them into {MOST_CATEGORIES} or fewer"
    return _leak(values, positive)


def _unfit(name: str, raw: pd.DataFrame) -> str:
    """Why later steps could not tell this column from others by its name."""
    twins = [str(c) for c in raw.columns if str(c).lower() == name.lower()]
    if name.lower() in _TAKEN or _UNFIT.search(name) or not name.isprintable():
        return "rename it: its name is taken, or holds one of [ ] < : or a line break"
    if twins[0] != name:
        return f"rename it: only capitals tell it from {twins[0]}"
    return ""


def names_an_id(name: str) -> bool:
    """Does a column's name say that it tells rows or entities apart?"""
    return bool(_NAMED_ID.search(name))


def _is_id(name: str, values: "pd.Series[Any]", found: str) -> bool:
    all_differ = values.nunique() > _NEARLY_ALL * values.notna().sum()
    if names_an_id(name) or (name.lower().endswith("id") and all_differ):
        return True
    return found == "category" and all_differ


def _left_out_number(values: "pd.Series[Any]") -> str:
    present = values.dropna()
    if np.isinf(present).any():
        return "some numbers are infinite; mend or blank them"
    ordered = present.is_monotonic_increasing or present.is_monotonic_decreasing
    if ordered and present.is_unique and len(present) > _ROWS_TO_COUNT:
        return "only rises or falls from row to row, so that each window would differ by nature"
    return ""


def _leak(values: "pd.Series[Any]", positive: "pd.Series[Any]") -> str:
    auc = alone.measure(values, positive).auc
    if auc <= alone.limit(values):
        return ""
    return f"tells the label all alone (AUC {auc:.3f}), a leak if it is filled in afterwards"


def _holds(values: "pd.Series[Any]", found: str) -> str:
    """A few words on the values, for a comment."""
    if found == "number" and values.notna().any():
        text = f"{values.min():.6g} to {values.max():.6g}"
    elif found == "category":
        counts = values.value_counts()
        more = ", ..." if len(counts) > 3 else ""
        text = f"{len(counts):,} values: {', '.join(map(str, counts.index[:3]))}{more}"
    else:
        text = found
    missing = values.isna().mean()
    return f"{text}; {missing:.1%} missing" if missing else text


def _limits(values: "pd.Series[Any]") -> tuple[float, float] | None:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else None
