"""What would have been asked, and when was the answer known? A project's rows as examples."""

from datetime import UTC, datetime
from typing import Any

import pandas as pd

from perennial.data import churn, duck, sources
from perennial.project import Feature, Project

TIME = "feature_time"  # when the features of a row were known; never later than the row
_FOR_EVER = datetime.max.replace(tzinfo=UTC)


def examples(
    project: Project, raw: pd.DataFrame, since: datetime, until: datetime | None
) -> pd.DataFrame:
    """Rows with ``since <= event_time < until`` (None: to the end), oldest first.

    Columns: row_id, event_time, label, label_known_at, features, sensitive columns; customer_id too
    for transactions, whose rows stand at the starts of windows. A label is NaN where it is not
    known by the end of ``raw``. Training and replay both read rows by the same definitions.
    """
    if project.kind == "table":
        return _between(sources.table_rows(project, raw), since, until)
    with duck.over({"raw": churn.lean(raw)}) as connection:
        make_examples(project, connection, until or _FOR_EVER, known_at=_FOR_EVER)
        found = connection.execute("from examples order by event_time, customer_id").df()
    times = {"event_time": "datetime64[us, UTC]", "label_known_at": "datetime64[us, UTC]"}
    return _between(found.astype(times), since, until)


def cutoffs(project: Project, raw: pd.DataFrame) -> list[datetime]:
    """Starts of windows at which features can look back in full; transactions only."""
    times = raw[str(project.time.column)]
    if times.empty:
        return []
    return _starts(project, times.min().to_pydatetime(), times.max().to_pydatetime())


def make_examples(
    project: Project, connection: Any, until: datetime, known_at: datetime
) -> dict[str, int]:
    """Make the view ``examples`` of the view ``raw``: rows before ``until``, of a snapshot.

    Its columns are those of ``examples`` above, and for each feature whose policy is last_known the
    age of its value (``age_name``). A label is null where it was not known at ``known_at``. Gives
    how many rows of ``raw`` there are of each kind.
    """
    if project.kind == "table":
        counts = {"rows": _one(connection, "select count(*) from raw")[0]}
        known = ("row_id", "event_time", "label", "label_known_at")
        names = dict.fromkeys((*known, *project.feature_names, *project.sensitive))
        told = ", ".join(duck.column(name) for name in names)
        connection.execute(f"create or replace temp view made as select {told} from raw")
    else:
        counts = _make_purchases(project, connection, until, known_at)
    carried = [f for f in project.features if f.missing == "last_known"]
    connection.execute(f"create or replace temp view examples as {_carried(project, carried)}")
    return counts


def from_the_future(rows: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows of a feature table hold features that were known only after the row's own time?

    Wants the columns event_time and ``TIME``, both moments in UTC. One row is a leak already.
    """
    return rows[TIME] > rows["event_time"]


def key(project: Project) -> str:
    """Column by which features are looked up."""
    return "customer_id" if project.kind == "transactions" else "row_id"


def age_name(feature: str) -> str:
    """Column with the age of a value at its row's time, in seconds; 0 unless it was carried on."""
    return f"{feature}__age_s"


def _make_purchases(
    project: Project, connection: Any, until: datetime, known_at: datetime
) -> dict[str, int]:
    churn.prepare(connection)
    counts = churn.count_lines(connection)
    first, last = _one(
        connection, "select min(InvoiceDate)::timestamptz, max(InvoiceDate)::timestamptz from raw"
    )
    if first is None:
        first = last = datetime.min.replace(tzinfo=UTC)
    starts = _starts(project, first.astimezone(UTC), last.astimezone(UTC))
    churn.make_features(connection, [moment for moment in starts if moment < until])
    known = f"event_time + to_seconds({project.label.known_after.total_seconds()})"
    features = ", ".join(duck.column(name) for name in project.feature_names)
    connection.execute(
        f"create or replace temp view example as select {churn.row_id_sql()} as row_id,"
        f" customer_id, event_time, {known} as label_known_at, {features} from features"
    )
    latest = min(known_at, _end(project, last.astimezone(UTC)))
    connection.execute(
        "create or replace temp table made as select row_id, customer_id, event_time,"
        f" case when label_known_at <= timestamptz '{latest.isoformat()}' then label end as label,"
        f" label_known_at, {features} from ({churn.labels_sql(project.label.horizon)})"
    )
    return counts


def _carried(project: Project, features: list[Feature]) -> str:
    """The rows with the last known value where one is missing, if it is not too old by then."""
    values, ages = [], []
    for feature in features:
        name = duck.column(feature.name)
        oldest = int(feature.max_age.total_seconds()) if feature.max_age else 0
        window = (
            f"over (partition by {key(project)} order by event_time range between"
            f" interval {oldest} seconds preceding and current row)"
        )
        values.append(f"last_value({name} ignore nulls) {window} as {name}")
        when = f"max(case when {name} is not null then epoch_us(event_time) end) {window}"
        age = f"(epoch_us(event_time) - {when}) / 1e6"
        ages.append(f"{age} as {duck.column(age_name(feature.name))}")
    replaced = f"* replace ({', '.join(values)})" if values else "*"
    return f"select {', '.join([replaced, *ages])} from made"


def _starts(project: Project, first: datetime, last: datetime) -> list[datetime]:
    if last - first < churn.LOOK_BACK:
        return []
    first += churn.LOOK_BACK
    start = project.window_start(first)
    if start < first:
        start = project.window_end(start)
    found = []
    while start <= last:
        found.append(start)
        start = project.window_end(start)
    return found


def _end(project: Project, newest: datetime) -> datetime:
    """End of the newest window: a shop that closes early is no shop that forgot to report."""
    return project.window_end(project.window_start(newest))


def _one(connection: Any, sql: str) -> tuple[Any, ...]:
    found: tuple[Any, ...] = connection.execute(sql).fetchone()
    return found


def _between(rows: pd.DataFrame, since: datetime, until: datetime | None) -> pd.DataFrame:
    inside = rows["event_time"] >= since
    if until is not None:
        inside &= rows["event_time"] < until
    return rows[inside].reset_index(drop=True)
