"""What was known of each retail customer at a moment, and did they stop buying after it?

Every feature is a sum over the last 90 days, taken at the start of each week. No row is repeated
for each week that looks back on it: rows first become spans, stretches of weeks that see the same
purchases. What is distinct (orders, products) is counted where it was seen last, so that a span
ends where the same product is bought again. Sums are of millionths, as whole numbers, and so do
not depend on the order of rows.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd

from perennial.data import duck

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
BOUGHT, CANCELLED = "bought", "cancelled"
KINDS = (BOUGHT, CANCELLED, "not sold", "without a customer", "without an invoice")

_MICRO = timedelta(microseconds=1)

# What each line is; a price or quantity that is no number of goods for money sells nothing.
_KIND_SQL = f"""
create or replace temp view kinds as
select *, case when CustomerID is null or isnan(CustomerID::double) then 'without a customer'
               when InvoiceNo is null then 'without an invoice'
               when starts_with(InvoiceNo, 'C') then '{CANCELLED}'
               when Quantity > 0 and Quantity < 1e15 and UnitPrice > 0 and UnitPrice < 1e15
                    then '{BOUGHT}'
               else 'not sold' end as kind
from raw
"""

_PLACED_SQL = f"""
create or replace temp view placed as
select s.*, c.first, c.until, c.recent from (
    select CustomerID::bigint as customer, InvoiceNo as invoice, StockCode as product,
           epoch_us(InvoiceDate) as moment, kind = '{BOUGHT}' as bought,
           try_cast(round(UnitPrice * 1e6) as hugeint) as price,
           try_cast(round(Quantity * 1e6) as hugeint) as units,
           try_cast(round(Quantity * UnitPrice * 1e6) as hugeint) as money,
           list_position(['United Kingdom', 'Germany', 'France', 'EIRE'], Country) as place
    from kinds where kind in ('{BOUGHT}', '{CANCELLED}')
) s asof join cell c on s.moment > c.after where c.until > c.first
"""

_SPANS_SQL = """
create or replace temp table spans as
select customer, first, until, recent, count(*) as lines, count(*) filter (bought) as bought,
       sum(money) filter (bought) as money, sum(units) filter (bought) as units,
       sum(price) filter (bought) as price, min(moment) filter (bought) as oldest,
       max(moment) filter (bought) as newest, max(moment * 8 + coalesce(place, 0)) as country
from placed group by customer, first, until, recent
"""

_SEEN_SQL = """
create or replace temp table {name} as
select customer, first, least(until, coalesce(later, until)) as until,
       least(recent, coalesce(later, recent)) as recent, count(*) as seen
from (
    select *, lead(first) over (
        partition by customer, {key} order by first, until, recent) as later
    from (select distinct customer, {key}, first, until, recent from placed where bought)
) group by all
"""

_FEATURES_SQL = """
create or replace temp table features as
with known as (
    select customer, place, sum(lines) as lines, sum(bought) as bought, sum(money) as money,
           coalesce(sum(money) filter (place < recent), 0) as money_recent, sum(units) as units,
           sum(price) as price, min(oldest) as oldest, max(newest) as newest,
           max(country) as country
    from (select *, unnest(range(first, until)) as place from spans where until > first)
    group by customer, place having sum(bought) > 0
), ordered as (
    select customer, place, sum(seen) as orders,
           coalesce(sum(seen) filter (place < recent), 0) as orders_recent
    from (select *, unnest(range(first, until)) as place from orders where until > first)
    group by customer, place
), chosen as (
    select customer, place, sum(seen) as products
    from (select *, unnest(range(first, until)) as place from products where until > first)
    group by customer, place
)
select customer as customer_id, make_timestamptz(c.instant) as event_time,
       (c.instant // 60000000 - newest // 60000000) / 1440.0 as recency_days,
       orders::double as orders, orders_recent::double as orders_recent, money / 1e6 as spend,
       money_recent / nullif(money, 0) as spend_share_recent,
       money / 1e6 / orders as spend_per_order,
       bought / orders as lines_per_order, units / 1e6 / bought as units_per_line,
       price / 1e6 / bought as unit_price, products::double as products,
       (newest // 60000000 - oldest // 60000000) / 1440.0 / nullif(orders - 1, 0)
           as days_between_orders,
       (lines - bought) / lines as cancelled_share,
       ['Other', 'United Kingdom', 'Germany', 'France', 'EIRE'][1 + country % 8] as country
from known join ordered using (customer, place) join chosen using (customer, place)
join cutoffs c using (place)
"""

# The next purchase decides, whatever the length of the history behind it.
_LABELS_SQL = """
select e.*, (b.moment is null or b.moment > epoch_us(e.event_time) + {horizon})::double as label
from example e asof left join (
    select distinct CustomerID::bigint as customer_id, epoch_us(InvoiceDate) as moment
    from kinds where kind = '{bought}'
) b on e.customer_id = b.customer_id and b.moment > epoch_us(e.event_time)
"""


def definition() -> str:
    """A short digest of what the features are made by: another text may make other numbers."""
    parts = (_KIND_SQL, _PLACED_SQL, _SPANS_SQL, _SEEN_SQL, _FEATURES_SQL)
    # How lines are broken makes no other numbers.
    return hashlib.sha256(" ".join(" ".join(parts).split()).encode()).hexdigest()[:12]


def prepare(connection: Any) -> None:
    """Sort the lines of the view ``raw`` (columns of ``sources.TRANSACTIONS``) by what they are."""
    connection.execute(_KIND_SQL)


def count_lines(connection: Any) -> dict[str, int]:
    """How many lines are of each of ``KINDS``; together they are all lines."""
    found = dict(connection.execute("select kind, count(*) from kinds group by kind").fetchall())
    return {kind: int(found.get(kind, 0)) for kind in KINDS}


def make_features(connection: Any, cutoffs: Sequence[datetime]) -> None:
    """Make the table ``features``: customer_id, event_time (the cutoff, UTC) and ``FEATURES``.

    One row for each cutoff and customer who bought in the 90 days up to it; nothing later than the
    cutoff is looked at. ``cutoffs`` rise. Wants ``prepare`` before it.
    """
    instants = [_instant(moment) for moment in cutoffs]
    _table(connection, "cutoffs", {"place": range(len(instants)), "instant": instants})
    cells = _cells(instants)
    names = ("after", "first", "until", "recent")
    _table(connection, "cell", {n: [c[i] for c in cells] for i, n in enumerate(names)})
    connection.execute(_PLACED_SQL)
    connection.execute(_SPANS_SQL)
    for name, key in (("orders", "invoice"), ("products", "product")):
        connection.execute(_SEEN_SQL.format(name=name, key=key))
    connection.execute(_FEATURES_SQL)
    for name in ("spans", "orders", "products"):
        connection.execute(f"drop table {name}")


def labels_sql(horizon: timedelta) -> str:
    """The rows of ``example`` (customer_id, event_time, ...) with their ``label``.

    1.0 where the customer buys nothing in ``(event_time, event_time + horizon]``.
    """
    return _LABELS_SQL.format(horizon=horizon // _MICRO, bought=BOUGHT)


def row_id_sql() -> str:
    """One integer for each (event_time, customer), the same in every run and snapshot."""
    return f"epoch_us(event_time) // 60000000 * {ID_ROOM} + customer_id"


def churn_features(raw: pd.DataFrame, cutoffs: Sequence[datetime]) -> pd.DataFrame:
    """What ``make_features`` makes, of rows in memory; oldest first, then by customer."""
    with duck.over({"raw": lean(raw)}) as connection:
        prepare(connection)
        make_features(connection, sorted(cutoffs))
        found = connection.execute("from features order by event_time, customer_id").df()
    return found.astype({"event_time": "datetime64[us, UTC]"})


def churn_labels(raw: pd.DataFrame, rows: pd.DataFrame, horizon: timedelta) -> pd.Series:
    """1.0 where the customer of a row buys nothing in ``(event_time, event_time + horizon]``."""
    example = rows[["customer_id", "event_time"]].reset_index(drop=True)
    example["position"] = range(len(example))
    with duck.over({"raw": lean(raw), "example": example}) as connection:
        prepare(connection)
        sql = f"select label from ({labels_sql(horizon)}) order by position"
        found = connection.execute(sql).fetchnumpy()["label"]
    return pd.Series(found, index=rows.index, name="label", dtype="float64")


def row_ids(rows: pd.DataFrame) -> pd.Series:
    """One integer for each (event_time, customer), the same in every run and snapshot."""
    minutes = rows["event_time"].astype("int64") // 60_000_000
    return (minutes * ID_ROOM + rows["customer_id"]).rename("row_id")


def _cells(instants: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Stretches of time without a boundary of any window inside, by the instant each follows.

    With each go the places of the first cutoff that sees it, of the first that does no more, and
    of the first for which it is not recent.
    """
    back, recent = LOOK_BACK // _MICRO, RECENT // _MICRO
    edges = sorted({edge for at in instants for edge in (at, at - back, at - recent)})
    found = [
        (
            edge,
            bisect_left(instants, end),
            bisect_left(instants, end + back),
            bisect_left(instants, end + recent),
        )
        for edge, end in zip(edges, edges[1:], strict=False)
    ]
    # What follows the last cutoff is seen by none.
    return [*found, (edges[-1], 0, 0, 0)] if edges else []


def _instant(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // _MICRO


def _table(connection: Any, name: str, columns: dict[str, Sequence[int]]) -> None:
    frame = pd.DataFrame({key: pd.Series(values, dtype="int64") for key, values in columns.items()})
    connection.register("given", frame)
    connection.execute(f"create or replace temp table {name} as from given")
    connection.unregister("given")


def lean(raw: pd.DataFrame) -> pd.DataFrame:
    """Only what the queries read."""
    lean = raw[["InvoiceNo", "StockCode", "Quantity", "UnitPrice", "CustomerID", "Country"]].copy()
    times = pd.to_datetime(raw["InvoiceDate"], utc=True)
    return lean.assign(InvoiceDate=times.astype("datetime64[us, UTC]"))
