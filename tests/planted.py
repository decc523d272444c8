"""Ten leaks planted in public data sets, and twenty feature tables without any."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from perennial.data import churn, guess, history, leaks, sources
from perennial.data.leaks import Table, View
from perennial.project import Project, load

FILES = {
    "adult": "adult-train.csv.gz",
    "telco": "Telco-Customer-Churn.csv.gz",
    "elec": "elec.csv.gz",
    "bank": "bank-additional-full.csv.gz",
    "retail": "online_retail.parquet",
}
CUTOFF = pd.Timestamp("2011-08-01", tz="UTC")
HORIZON = timedelta(days=60)


@dataclass(frozen=True)
class Set:
    """One data set: its project, its raw rows and its feature table."""

    project: Project
    raw: pd.DataFrame
    rows: pd.DataFrame

    @property
    def table(self) -> Table:
        return leaks.of(self.project, self.rows)

    def with_column(self, name: str, values: object) -> Table:
        """The table with one more feature, its values in the order of the rows."""
        rows = self.rows.assign(**{name: values})
        return replace(self.table, rows=rows, features=(*self.table.features, name))

    def in_order(self, column: str) -> np.ndarray:
        """A raw column as numbers, in the order of the rows."""
        return sources.as_numbers(self.raw[column]).to_numpy()[self.rows["row_id"]]


def project_of(name: str, data: Path, root: Path) -> Project:
    """The project of an example, else what ``perennial init`` writes for the file."""
    if (root / "examples" / name).is_dir():
        return load(root / "examples" / name)
    return Project.model_validate(yaml.safe_load(guess.guess(data / FILES[name], name)))


def read(name: str, data: Path, root: Path) -> Set:
    project = project_of(name, data, root)
    raw = sources.read(project, str(data / FILES[name]), data)
    rows = history.examples(project, raw, datetime.min.replace(tzinfo=UTC), None)
    if project.kind == "table":
        # A leak is planted from columns that the project leaves out, too.
        raw = sources.read_file(data / FILES[name], header=project.source.header)
    return Set(project, raw, rows)


def noisy(found: Set, share: float) -> pd.Series:
    """The label, wrong in a share of the rows."""
    wrong = np.random.default_rng(1).random(len(found.rows)) < share
    return found.rows["label"].where(~wrong, 1 - found.rows["label"])


def joined(found: Set, *, honest: bool) -> Table:
    """Three features of each customer at the cut-off; not honest: as they are at the end."""
    bought = found.raw[found.raw["CustomerID"].notna() & (found.raw["Quantity"] > 0)]
    bought = bought[(bought["UnitPrice"] > 0) & ~bought["InvoiceNo"].str.startswith("C")]
    before = bought[bought["InvoiceDate"] <= CUTOFF]
    seen = before if honest else bought
    groups = seen.assign(money=seen["Quantity"] * seen["UnitPrice"]).groupby("CustomerID")
    last = groups["InvoiceDate"].max()
    at = CUTOFF if honest else found.raw["InvoiceDate"].max()
    rows = pd.DataFrame(
        {
            "recency_days": (at - last).dt.total_seconds() / 86400,
            "orders": groups["InvoiceNo"].nunique().astype(float),
            "spend": groups["money"].sum(),
            "of": last,
        }
    ).reindex(before["CustomerID"].unique())
    rows = rows.rename_axis("customer_id").reset_index().assign(event_time=CUTOFF)
    asked = rows[["customer_id", "event_time"]]
    rows["label"] = churn.churn_labels(found.raw, asked, HORIZON)
    rows["label_known_at"] = rows["event_time"] + HORIZON
    names = ("recency_days", "orders", "spend")
    view = View("customer_purchases", names, "of")
    return Table(rows, names, "churned", ("customer_id",), (view,))


def outcome_day(found: Set) -> pd.Series:
    days = np.random.default_rng(2).integers(1, 60, len(found.rows))
    ended = found.rows["event_time"] + pd.to_timedelta(days, unit="D")
    return ended.dt.strftime("%Y-%m-%d")


def reasons(found: Set) -> np.ndarray:
    rng = np.random.default_rng(3)
    told = (found.rows["label"] > 0) & (rng.random(len(found.rows)) < 0.95)
    return np.where(told, rng.choice(["price", "moved", "service"], len(told)), None)


# What is planted -> the data set, how, and the feature that a check must name.
PLANTED = {
    "retail: latest values joined": ("retail", lambda s: joined(s, honest=False), "recency_days"),
    "bank: length of the call": (
        "bank",
        lambda s: s.with_column("duration", s.in_order("duration")),
        "duration",
    ),
    "adult: label, 1 % wrong": ("adult", lambda s: s.with_column("tax", noisy(s, 0.01)), "tax"),
    "telco: label, 5 % wrong": ("telco", lambda s: s.with_column("paid", noisy(s, 0.05)), "paid"),
    "bank: label, 10 % wrong": ("bank", lambda s: s.with_column("said", noisy(s, 0.10)), "said"),
    "elec: label before it is known": (
        "elec",
        lambda s: s.with_column("was_up", s.rows["label"].shift(1)),
        "was_up",
    ),
    "adult: mean label of each weight": (
        "adult",
        lambda s: s.with_column("rate", s.rows.groupby("column_3")["label"].transform("mean")),
        "rate",
    ),
    "telco: filled in for churners": (
        "telco",
        lambda s: s.with_column("reason", reasons(s)),
        "reason",
    ),
    "telco: day of the outcome": (
        "telco",
        lambda s: s.with_column("ended", outcome_day(s)),
        "ended",
    ),
    "elec: price that the label is made of": (
        "elec",
        lambda s: s.with_column("nswprice", s.in_order("nswprice")),
        "nswprice",
    ),
    "adult: place after sorting by label": (
        "adult",
        lambda s: s.with_column("place", s.rows["label"].rank(method="first")),
        "place",
    ),
}
# One AUC of 0.82 alone lies inside of what honest features reach: no rule tells it apart.
NOT_FOUND = "bank: length of the call"


def redrawn(found: Set, seed: int) -> Table:
    """A bootstrap of the rows; a customer drawn twice counts as two."""
    rng = np.random.default_rng(seed)
    rows = found.rows.iloc[np.sort(rng.integers(0, len(found.rows), len(found.rows)))]
    rows = rows.reset_index(drop=True)
    if "customer_id" in rows:
        again = rows.groupby(["customer_id", "event_time"]).cumcount()
        rows["customer_id"] = rows["customer_id"] * 1000 + again
    return replace(found.table, rows=rows)


def clean(found: Set) -> Iterator[Table]:
    """Four tables of one data set: all of it, both halves, a bootstrap."""
    half = len(found.rows) // 2
    yield found.table
    yield replace(found.table, rows=found.rows.iloc[:half])
    yield replace(found.table, rows=found.rows.iloc[half:])
    yield redrawn(found, 1)
