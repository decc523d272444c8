"""Which rows are served when, and when does their label become known? Training sees the same."""

from datetime import datetime

import pandas as pd

from perennial.data import churn, sources
from perennial.project import Project


def examples(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    """Rows with event_time in ``[since, until)``, in order of time (``until`` None: all).

    Columns: row_id, event_time, label (1.0, 0.0, NaN), label_known_at, features, and customer_id
    for transactions, where a row is a customer at the start of a window.
    """
    if project.kind == "table":
        return _between(sources.table_rows(project, raw), since, until)
    return _customers(project, raw, since, until)


def _between(frame: pd.DataFrame, since: datetime, until: datetime | None) -> pd.DataFrame:
    inside = frame["event_time"] >= since
    if until is not None:
        inside &= frame["event_time"] < until
    return frame[inside].reset_index(drop=True)


def _customers(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    first = raw["InvoiceDate"].min().to_pydatetime() + churn.LOOK_BACK
    last = raw["InvoiceDate"].max().to_pydatetime()
    stop = min(until, last) if until is not None else last
    cutoffs = _cutoffs(project, max(since, first), stop)
    if not cutoffs:
        return _empty(project)
    rows = churn.churn_features(raw, cutoffs)
    rows["label"] = churn.churn_labels(raw, rows, project.label.horizon)
    known = rows["event_time"] + project.label.known_after
    rows["label_known_at"] = known.astype("datetime64[us, UTC]")
    rows["row_id"] = churn.row_ids(rows)
    about = ["row_id", "customer_id", "event_time", "label", "label_known_at"]
    return rows[[*about, *project.feature_names]]


def _cutoffs(project: Project, since: datetime, until: datetime) -> list[datetime]:
    """Starts of windows in ``[since, until]``."""
    start = project.window_start(since)
    if start < since:
        start = project.window_end(start)
    found = []
    while start <= until:
        found.append(start)
        start = project.window_end(start)
    return found


def _empty(project: Project) -> pd.DataFrame:
    about = ["row_id", "customer_id", "event_time", "label", "label_known_at"]
    frame = pd.DataFrame({name: pd.Series(dtype="float64") for name in about})
    for name in ("event_time", "label_known_at"):
        frame[name] = pd.Series(dtype="datetime64[us, UTC]")
    return frame.assign(**{name: pd.Series(dtype="object") for name in project.feature_names})
