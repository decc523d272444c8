"""What would have been asked, and when was the answer known? A project's rows as examples."""

from datetime import datetime

import pandas as pd

from perennial.data import churn, sources
from perennial.project import Project


def examples(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    """Rows with ``since <= event_time < until`` (None: to the end), oldest first.

    Columns: row_id, event_time, label, label_known_at, features, sensitive columns; customer_id too
    for transactions, whose rows stand at the starts of windows. A label is NaN where it is not
    known by the end of ``raw``. Training and replay both read rows from here.
    """
    if project.kind == "table":
        rows = sources.table_rows(project, raw)
        return _between(rows, since, until)
    return _purchases(project, raw, since, until)


def cutoffs(project: Project, raw: pd.DataFrame) -> list[datetime]:
    """Starts of windows at which features can look back in full; transactions only."""
    times = raw[str(project.time.column)]
    if times.empty:
        return []
    first, last = times.min().to_pydatetime() + churn.LOOK_BACK, times.max().to_pydatetime()
    start = project.window_start(first)
    if start < first:
        start = project.window_end(start)
    found = []
    while start <= last:
        found.append(start)
        start = project.window_end(start)
    return found


def _purchases(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    moments = [m for m in cutoffs(project, raw) if since <= m and (until is None or m < until)]
    rows = churn.churn_features(raw, moments)
    rows.insert(0, "row_id", churn.row_ids(rows))
    labels = churn.churn_labels(raw, rows, project.label.horizon)
    known_at = rows["event_time"] + project.label.known_after
    rows.insert(3, "label", labels.where(known_at <= _end(project, raw)))
    rows.insert(4, "label_known_at", known_at)
    return rows


def _end(project: Project, raw: pd.DataFrame) -> datetime:
    """End of the newest window: a shop that closes early is no shop that forgot to report."""
    newest = raw[str(project.time.column)].max().to_pydatetime()
    return project.window_end(project.window_start(newest))


def _between(rows: pd.DataFrame, since: datetime, until: datetime | None) -> pd.DataFrame:
    inside = rows["event_time"] >= since
    if until is not None:
        inside &= rows["event_time"] < until
    return rows[inside].reset_index(drop=True)
