"""What was known of each retail customer at a moment, and did they stop buying after it?"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pandas as pd

# Windowed only: an age such as "days since the first purchase" grows by construction and would
# count as drift for ever.
LOOK_BACK = timedelta(days=90)
RECENT = timedelta(days=30)
ID_ROOM = 10**8  # customer ids are below this, so that (minute, customer) fits one exact integer

FEATURES = (
    "recency_days",
    "orders",
    "orders_recent",
    "spend",
    "spend_share_recent",
    "spend_per_order",
    "lines_per_order",
    "units_per_line",
    "unit_price",
    "products",
    "days_between_orders",
    "cancelled_share",
    "country",
)

_FEATURES_SQL = """
with line as (
    select CustomerID::bigint as customer_id, InvoiceNo as invoice, StockCode as product,
           InvoiceDate as moment, Quantity::double as units, UnitPrice as price,
           Quantity * UnitPrice as money, starts_with(InvoiceNo, 'C') as cancelled,
           case when Country in ('United Kingdom', 'Germany', 'France', 'EIRE') then Country
                else 'Other' end as country
    from raw where CustomerID is not null
), sale as (
    select *, not cancelled as bought from line where cancelled or (units > 0 and price > 0)
), seen as (
    select m.cutoff, m.recent, s.* from moment m
    join sale s on s.moment > m.since and s.moment <= m.cutoff
)
select customer_id, cutoff as event_time,
       date_diff('minute', max(moment) filter (bought), cutoff) / 1440.0 as recency_days,
       count(distinct invoice) filter (bought) as orders,
       count(distinct invoice) filter (bought and moment > recent) as orders_recent,
       sum(money) filter (bought) as spend,
       coalesce(sum(money) filter (bought and moment > recent), 0)
           / sum(money) filter (bought) as spend_share_recent,
       sum(money) filter (bought) / count(distinct invoice) filter (bought) as spend_per_order,
       count(*) filter (bought) / count(distinct invoice) filter (bought) as lines_per_order,
       avg(units) filter (bought) as units_per_line,
       avg(price) filter (bought) as unit_price,
       count(distinct product) filter (bought) as products,
       date_diff('minute', min(moment) filter (bought), max(moment) filter (bought)) / 1440.0
           / nullif(count(distinct invoice) filter (bought) - 1, 0) as days_between_orders,
       avg(cancelled::double) as cancelled_share,
       arg_max(country, moment) as country
from seen group by customer_id, cutoff
having count(*) filter (bought) > 0
order by event_time, customer_id
"""

_LABELS_SQL = """
select r.position, not exists(
    select 1 from raw s
    where s.CustomerID = r.customer_id and s.InvoiceDate > r.event_time
      and s.InvoiceDate <= r.until and s.Quantity > 0 and s.UnitPrice > 0
      and not starts_with(s.InvoiceNo, 'C')
) as churned from example r order by r.position
"""


def churn_features(raw: pd.DataFrame, cutoffs: Sequence[datetime]) -> pd.DataFrame:
    """One row for each cutoff and customer who bought in the 90 days up to it.

    Columns are customer_id, event_time (the cutoff, UTC) and ``FEATURES``; nothing later than the
    cutoff is looked at.
    """
    moments = pd.DataFrame({"cutoff": _plain_utc(pd.Series(list(cutoffs)))})
    moments["since"] = moments["cutoff"] - LOOK_BACK
    moments["recent"] = moments["cutoff"] - RECENT
    rows = _query(_FEATURES_SQL, raw=_lean(raw), moment=moments)
    rows["event_time"] = rows["event_time"].astype("datetime64[us]").dt.tz_localize("UTC")
    numbers = [name for name in FEATURES if name != "country"]
    rows[numbers] = rows[numbers].astype("float64")
    return rows


def churn_labels(raw: pd.DataFrame, rows: pd.DataFrame, horizon: timedelta) -> pd.Series:
    """1.0 where the customer of a row buys nothing in ``(event_time, event_time + horizon]``."""
    example = pd.DataFrame({"customer_id": rows["customer_id"].to_numpy()})
    example["event_time"] = _plain_utc(rows["event_time"]).to_numpy()
    example["until"] = example["event_time"] + horizon
    example["position"] = range(len(example))
    found = _query(_LABELS_SQL, raw=_lean(raw), example=example)
    return pd.Series(found["churned"].to_numpy(dtype="float64"), index=rows.index, name="label")


def row_ids(rows: pd.DataFrame) -> pd.Series:
    """One integer for each (event_time, customer), the same in every run and snapshot."""
    minutes = rows["event_time"].astype("int64") // 60_000_000
    return (minutes * ID_ROOM + rows["customer_id"]).rename("row_id")


def _lean(raw: pd.DataFrame) -> pd.DataFrame:
    """Only what the queries read, with times that DuckDB compares without a time zone."""
    lean = raw[["InvoiceNo", "StockCode", "Quantity", "UnitPrice", "CustomerID", "Country"]].copy()
    lean["InvoiceDate"] = _plain_utc(raw["InvoiceDate"])
    return lean


def _plain_utc(moments: pd.Series) -> pd.Series:
    return pd.to_datetime(moments, utc=True).dt.tz_localize(None).astype("datetime64[us]")


def _query(sql: str, **tables: pd.DataFrame) -> pd.DataFrame:
    import duckdb

    connection: Any = duckdb.connect()
    try:
        for name, table in tables.items():
            connection.register(name, table)
        frame: pd.DataFrame = connection.execute(sql).df()
        return frame
    finally:
        connection.close()
