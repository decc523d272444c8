"""What would an online shop's purchases look like? Seeded rows in the schema of UCI Online Retail.

Regular customers buy at a rate of their own until they leave; those with big baskets stay longer.
They come and go in balance, so without a shift every week looks alike. A shift plants the change
that the loop has to notice.
"""

from dataclasses import dataclass, fields
from datetime import timedelta

import numpy as np
import pandas as pd

from perennial.project import Shift, Simulator

_DAY = 24 * 60
_WARM_UP_DAYS = 1500.0  # longer than nearly every customer stays: day 0 is like any other
_STAY_DAYS = 160.0
_KEENNESS = 2.0  # shape of a gamma of mean 1: how unlike each other regular customers are
_RARE_RATE, _KEEN_RATE = 0.012, 0.038  # orders a day: of everyone, and more for the keen
_BASKET = 1.0  # shape of a gamma of mean 1: how unlike the baskets of regular customers are
_LOYALTY = 0.05  # share of a regular customer's stay that does not depend on the basket
_NEW_STAY_DAYS = 250.0
_FICKLE_GAP_DAYS, _STEADY_GAP_DAYS = 80.0, 30.0
_FICKLE_SHARE = 0.5
_FICKLE_LINES, _STEADY_LINES = 9.0, 1.5
_FIRST_ID = 12_346
_COUNTRIES = ("United Kingdom", "Germany", "France", "EIRE", "Spain", "Netherlands", "Norway")
_PRODUCTS = 400
_WORDS = (
    ("RED", "BLUE", "IVORY", "VINTAGE", "RETROSPOT", "GLASS", "WOODEN", "PINK"),
    ("HEART", "STAR", "ALPHABET", "GARDEN", "KITCHEN", "PARTY", "CHRISTMAS", "PAISLEY"),
    ("T-LIGHT HOLDER", "LUNCH BOX", "CAKE STAND", "MUG", "BUNTING", "CANDLE", "BAG", "CLOCK"),
)


@dataclass(frozen=True)
class _Customers:
    """Customers as columns; times are days since the start of the history."""

    arrives: np.ndarray
    leaves: np.ndarray
    rate: np.ndarray  # orders a day
    regular: np.ndarray  # True: evenly spaced orders, False: at random times
    lines: np.ndarray  # mean lines an order beyond the first
    units: np.ndarray  # typical units a line
    taste: np.ndarray  # typical place in the price list, 0 cheapest to 1 dearest
    cancels: np.ndarray  # chance that an order is partly cancelled
    country: np.ndarray

    def __add__(self, other: "_Customers") -> "_Customers":
        both = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return _Customers(*(np.concatenate(pair) for pair in both))


def simulate(sim: Simulator) -> pd.DataFrame:
    """Purchases of ``sim.days`` days: same settings, same rows.

    They hold what real files hold too: lines without a customer, cancellations, bad prices, missing
    descriptions and duplicates.
    """
    rng = np.random.default_rng(sim.seed)
    people = _regulars(rng, sim.customers, sim.days)
    for shift in sim.shifts:
        if shift.kind == "newcomers":
            people = people + _newcomers(rng, sim, shift)
    who, day = _orders(rng, people, sim.days)
    rows = _lines(rng, people, who, day)
    rows = _with_dirt(rng, rows)
    rows["InvoiceDate"] = pd.Timestamp(sim.start) + pd.to_timedelta(rows["minute"], unit="min")
    for shift in sim.shifts:
        rows = _apply(rng, rows, shift)
    return _finish(rows)


def _regulars(rng: np.random.Generator, count: int, days: int) -> _Customers:
    """Buyers at random times: whoever fills big baskets stays longer."""
    flow = count / _STAY_DAYS  # arrivals a day that keep ``count`` customers
    total = rng.poisson(flow * (_WARM_UP_DAYS + days))
    arrives = rng.uniform(-_WARM_UP_DAYS, days, total)
    keen = rng.gamma(_KEENNESS, 1 / _KEENNESS, total)
    big = rng.gamma(_BASKET, 1 / _BASKET, total)
    stay = rng.exponential(_STAY_DAYS * (_LOYALTY + (1 - _LOYALTY) * big))
    people = _Customers(
        arrives=arrives,
        leaves=arrives + stay,
        rate=_RARE_RATE + _KEEN_RATE * keen,
        regular=np.zeros(total, dtype=bool),
        lines=0.5 + 5.0 * big,
        units=np.exp(rng.normal(1.9, 0.5, total)),
        taste=rng.beta(2.5, 4.5, total),
        cancels=rng.beta(1.0, 18.0, total),
        country=_countries(rng, total, home=0.86),
    )
    return _select(people, people.leaves > 0)


def _newcomers(rng: np.random.Generator, sim: Simulator, shift: Shift) -> _Customers:
    """Another kind joins: fickle buyers of big baskets, and steady buyers of small ones.

    Who fills a big basket is seldom seen again within two months; who buys little comes back each
    month. That is the opposite of what regular customers taught a model.
    """
    start = (shift.start - sim.start) / timedelta(days=1)
    rest = max(0.0, sim.days - start)
    stock = round(sim.customers * shift.size)
    total = stock + rng.poisson(stock / _NEW_STAY_DAYS * rest)
    fickle = rng.random(total) < _FICKLE_SHARE
    gap = np.where(fickle, _FICKLE_GAP_DAYS, _STEADY_GAP_DAYS)
    first = np.where(fickle, rng.exponential(_FICKLE_GAP_DAYS, total), rng.uniform(0, 10, total))
    joined = np.where(np.arange(total) < stock, 0.0, rng.uniform(0, rest, total))
    return _Customers(
        arrives=start + joined + first,
        leaves=start + joined + first + rng.exponential(_NEW_STAY_DAYS, total),
        rate=1 / gap,
        regular=~fickle,
        lines=rng.gamma(6.0, 1 / 6, total) * np.where(fickle, _FICKLE_LINES, _STEADY_LINES),
        units=np.exp(rng.normal(1.1, 0.5, total)),
        taste=rng.beta(5.0, 3.0, total),
        cancels=rng.beta(1.0, 18.0, total),
        country=_countries(rng, total, home=0.60),
    )


def _select(people: _Customers, keep: np.ndarray) -> _Customers:
    return _Customers(*(getattr(people, f.name)[keep] for f in fields(people)))


def _countries(rng: np.random.Generator, count: int, home: float) -> np.ndarray:
    others = len(_COUNTRIES) - 1
    return rng.choice(_COUNTRIES, count, p=[home] + [(1 - home) / others] * others)


def _orders(
    rng: np.random.Generator, people: _Customers, days: int
) -> tuple[np.ndarray, np.ndarray]:
    """Who orders on which day (with fraction), in order of time."""
    begin = np.clip(people.arrives, 0, days)
    end = np.clip(people.leaves, 0, days)
    repeats = rng.poisson(people.rate * (end - begin) * ~people.regular)
    who = np.repeat(np.arange(len(begin)), repeats)
    day = rng.uniform(begin[who], end[who])
    even, evenly = _even_orders(rng, people, begin, end)
    who, day = np.concatenate([who, even]), np.concatenate([day, evenly])
    first = np.flatnonzero((people.arrives >= 0) & (people.arrives < days))
    who, day = np.concatenate([who, first]), np.concatenate([day, people.arrives[first]])
    order = np.argsort(day, kind="stable")
    return who[order], day[order]


def _even_orders(
    rng: np.random.Generator, people: _Customers, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Orders of customers who buy at nearly even gaps."""
    even = np.flatnonzero(people.regular)
    most = int(((end - begin)[even] * people.rate[even]).max(initial=0)) + 1
    gaps = rng.gamma(20.0, 1 / 20.0, (len(even), most)) / people.rate[even, None]
    day = begin[even, None] + gaps.cumsum(axis=1)
    inside = day < end[even, None]
    return np.repeat(even, inside.sum(axis=1)), day[inside]


def _lines(
    rng: np.random.Generator, people: _Customers, who: np.ndarray, day: np.ndarray
) -> pd.DataFrame:
    """Lines of all orders: products near the customer's taste, in shop hours."""
    minute = (np.floor(day) * _DAY + 8 * 60 + rng.integers(0, 10 * 60, len(day))).astype("int64")
    count = 1 + rng.poisson(people.lines[who])
    order = np.repeat(np.arange(len(who)), count)
    buyer = who[order]
    place = np.clip(people.taste[buyer] + rng.normal(0, 0.18, len(order)), 0, 0.999)
    product = (place * _PRODUCTS).astype("int64")
    units = 1 + rng.poisson(people.units[buyer])
    gone = (rng.random(len(who)) < people.cancels[who])[order] & (rng.random(len(order)) < 0.5)
    sold = pd.DataFrame(
        {"order": order, "buyer": buyer, "product": product, "units": units, "cancelled": False}
    )
    back = sold[gone].assign(units=lambda rows: -rows["units"], cancelled=True)
    rows = pd.concat([sold, back], ignore_index=True)
    delay = np.where(rows["cancelled"], rng.integers(30, 3 * _DAY, len(rows)), 0)
    rows["minute"] = np.minimum(minute[rows["order"]] + delay, minute.max())
    rows["CustomerID"] = (_FIRST_ID + rows["buyer"]).astype("float64")
    rows["Country"] = people.country[rows["buyer"]]
    rows["price"] = np.round(0.4 * np.exp(3.6 * rows["product"] / _PRODUCTS), 2)
    return rows


def _with_dirt(rng: np.random.Generator, rows: pd.DataFrame) -> pd.DataFrame:
    """Faults that real files have, at rates that do not change over time."""
    guests = rows[rng.random(len(rows)) < 0.2].assign(CustomerID=np.nan)
    guests["order"] += rows["order"].max() + 1
    rows = pd.concat([rows, guests], ignore_index=True)
    rows.loc[rng.random(len(rows)) < 0.004, "price"] = 0.0
    rows["nameless"] = rng.random(len(rows)) < 0.003
    doubled = rows[rng.random(len(rows)) < 0.008]
    return pd.concat([rows, doubled], ignore_index=True)


def _apply(rng: np.random.Generator, rows: pd.DataFrame, shift: Shift) -> pd.DataFrame:
    inside = rows["InvoiceDate"] >= shift.start
    if shift.end:
        inside &= rows["InvoiceDate"] < shift.end
    if shift.kind == "prices":
        rows.loc[inside, "price"] = (rows.loc[inside, "price"] * shift.size).round(2)
    if shift.kind == "misbooked":
        return _misbook(rng, rows, inside & rows["CustomerID"].notna(), shift)
    return rows


def _misbook(
    rng: np.random.Generator, rows: pd.DataFrame, inside: pd.Series, shift: Shift
) -> pd.DataFrame:
    """Book a share of whole orders to wrong customers: each week to another eighth of them.

    Who seems to have stopped then says nothing about who did.
    """
    before = rows["InvoiceDate"].between(shift.start - timedelta(days=90), shift.start)
    pool = np.sort(rows.loc[before | inside, "CustomerID"].dropna().unique())
    orders = rows.loc[inside].drop_duplicates("order")
    orders = orders[rng.random(len(orders)) < min(shift.size, 1.0)]
    week = (orders["minute"] // (7 * _DAY)).to_numpy()
    few = np.array(
        [rng.choice(pool, max(1, len(pool) // 8)) for _ in range(week.max(initial=0) + 1)]
    )
    booked = pd.Series(few[week, rng.integers(0, few.shape[1], len(orders))], index=orders["order"])
    moved = inside & rows["order"].isin(booked.index)
    rows.loc[moved, "CustomerID"] = rows.loc[moved, "order"].map(booked)
    return rows


def _finish(rows: pd.DataFrame) -> pd.DataFrame:
    """Give the rows the names, types and order of the real file."""
    rows = rows.sort_values(["InvoiceDate", "order"], kind="stable", ignore_index=True)
    number = (536_365 + rows["order"]).astype("str")
    names = np.array([_name(i) for i in range(_PRODUCTS)], dtype=object)
    out = pd.DataFrame(
        {
            "InvoiceNo": np.where(rows["cancelled"], "C" + number, number),
            "StockCode": (20_000 + rows["product"]).astype("str"),
            "Description": names[rows["product"]],
            "Quantity": rows["units"].astype("int64"),
            "InvoiceDate": rows["InvoiceDate"].astype("datetime64[us, UTC]"),
            "UnitPrice": rows["price"],
            "CustomerID": rows["CustomerID"],
            "Country": rows["Country"],
        }
    )
    out.loc[rows["nameless"], "Description"] = None
    return out


def _name(product: int) -> str:
    colour, theme, thing = _WORDS
    return " ".join((colour[product % 8], theme[product // 8 % 8], thing[product // 64 % 8]))
