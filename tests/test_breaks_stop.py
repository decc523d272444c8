"""Broken deliveries stop before training and name what is wrong; clean ones pass.

The rules are those that anybody gets: of the project as it is shipped or guessed, and proposed for
the first clean delivery.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import planted
import pytest
from contexts import opened

from perennial.data import breaks, snapshots, sources, suggest
from perennial.errors import PerennialError
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import ingest, validate

pytestmark = pytest.mark.slow

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WEEK = timedelta(days=7)
BATCHES = 100
MOST_FALSE_STOPS = 1
BATCH_WEEKS = 4


@dataclass(frozen=True)
class Case:
    """A fault in a file, and what the reason must name (a pattern)."""

    data: str
    fault: str
    column: str = ""
    other: str = ""
    share: float | None = None
    named: str = ""

    @property
    def wanted(self) -> str:
        return self.named or rf"\b{re.escape(self.column)}\b"

    def __str__(self) -> str:
        return " ".join(part for part in (self.data, self.fault, self.column) if part)


FILE = r"broken\.\w+"
CASES = (
    Case("retail", "renamed-column", "UnitPrice"),
    Case("retail", "missing-column", "CustomerID"),
    Case("retail", "numbers-as-texts", "UnitPrice"),
    Case("retail", "swapped-columns", "Quantity", other="UnitPrice", named="Quantity|UnitPrice"),
    Case("retail", "unit-x100", "UnitPrice"),
    Case("retail", "nulls", "CustomerID", share=0.6),
    Case("retail", "duplicated-rows", named="InvoiceNo"),
    Case("retail", "future-dates", "InvoiceDate"),
    Case("retail", "sign-flipped", "Quantity"),
    Case("retail", "constant-column", "CustomerID"),
    Case("retail", "lost-rows", named="RowCount"),
    Case("retail", "truncated-file", named=FILE),
    Case("retail", "day-for-month", "InvoiceDate"),
    Case("retail", "empty-rows", named="InvoiceDate"),
    Case("telco", "empty-rows", named="tenure"),
    Case("bank", "no-bytes", named=FILE),
    Case("telco", "label-flip", "Churn"),
    Case("telco", "label-jump", "Churn"),
    Case("telco", "renamed-category", "Contract"),
    Case("telco", "nulls", "tenure"),
    Case("telco", "unit-x100", "MonthlyCharges"),
    Case("telco", "encoding-utf-16", named=FILE),
    Case("telco", "no-rows", named=FILE),
    Case("bank", "missing-column", "y"),
    Case("bank", "numbers-as-texts", "age"),
    Case("bank", "unit-x100", "euribor3m"),
    Case("bank", "renamed-category", "contact"),
    Case("bank", "label-flip", "y"),
    Case("bank", "truncated-file", named=FILE),
    Case("elec", "label-flip", "class"),
    Case("elec", "constant-column", "nswdemand"),
    Case("elec", "outliers", "nswdemand"),
    Case("adult", "label-jump", "column_15"),
    Case("adult", "encoding-latin-1", "column_2", named=FILE),
)


@dataclass(frozen=True)
class Place:
    """Where one data set is delivered, checked and accepted."""

    settings: Settings
    project: Project
    folder: Path
    file: Path

    def deliver(self, source: Path, name: str) -> None:
        """Ingest and validate one file. Raises what stops a run before training."""
        folder = self.folder / name
        with opened(self.settings, self.project, self.folder, name, NOW) as ctx:
            taken = ingest.ingest(
                self.settings, self.project, self.folder, str(source), None, folder / "snapshot",
                run=name, trigger="by hand", now=NOW,
            )  # fmt: skip
            given = validate.Given(folder / "snapshot", taken.digest, taken.as_of)
            out = validate.Out(folder / "kept", folder / "aside", folder / "page.html")
            validate.validate(ctx, given, out)


@pytest.fixture(scope="module")
def places(
    tmp_path_factory: pytest.TempPathFactory, data_folder: Path, root: Path
) -> Iterator[Callable[[str], Place]]:
    """Each data set with a first delivery that is clean, and so the last accepted one."""
    made: dict[str, Place] = {}

    def place(name: str) -> Place:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = ruled(first(name, folder, data_folder, root))
            made[name].deliver(made[name].file, "clean")
        return made[name]

    yield place


def first(name: str, folder: Path, data: Path, root: Path) -> Place:
    file = folder / planted.FILES[name]
    file.write_bytes((data / file.name).read_bytes())
    if name == "retail":
        recent(pd.read_parquet(file)).to_parquet(file, index=False)
    if name == "bank":
        times = "bank_event_dates.csv.gz"
        (folder / times).write_bytes((data / times).read_bytes())
    settings = Settings.load().model_copy(update={"home": folder / "state"})
    return Place(settings, planted.project_of(name, data, root), folder, file)


def ruled(place: Place) -> Place:
    """With the rules that a user gets: those of the project, and those proposed for its file."""
    project, near = place.project, place.folder / "proposed"
    near.mkdir()
    path = near / "rows.parquet"
    with sources.opened(project, str(place.file), place.folder, near) as found:
        snapshots.write(path, found.rows.schema, found.rows.known(None))
    proposed = suggest.suggest(path, near, is_timed=not project.time.row_order)
    more = {"expectations": (*project.expectations, *proposed)}
    return replace(place, project=project.model_copy(update=more))


def recent(rows: pd.DataFrame) -> pd.DataFrame:
    """Twelve weeks are enough to tell, and quicker."""
    return rows[rows["InvoiceDate"] >= rows["InvoiceDate"].max() - 12 * WEEK]


@pytest.mark.parametrize("name", planted.FILES)
def test_a_delivery_like_the_last_one_passes(places: Callable[[str], Place], name: str):
    place = places(name)

    place.deliver(place.file, "again")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_break_stops_before_training_under_its_name(places: Callable[[str], Place], case: Case):
    place = places(case.data)
    # A name that holds no column: the reason must know it by itself.
    source = place.folder / f"case-{CASES.index(case)}" / "broken.csv"
    source.parent.mkdir()
    breaks.write(
        place.file, case.fault, source, column=case.column, other=case.other, share=case.share,
        header=place.project.source.header,
    )  # fmt: skip
    times = place.folder / "bank_event_dates.csv.gz"
    if times.exists():
        (source.parent / times.name).write_bytes(times.read_bytes())

    with pytest.raises(PerennialError, match=case.wanted):
        place.deliver(source, source.parent.name)


def test_the_cases_are_more_than_thirty_and_of_every_kind():
    assert len(set(CASES)) == 34
    assert {case.data for case in CASES} == set(planted.FILES)
    assert {case.fault for case in CASES} == set(breaks.names())


def redrawn(weeks: pd.DataFrame, seed: int) -> pd.DataFrame:
    """A bootstrap of invoices within each week; one drawn twice gets a number of its own."""
    rng = np.random.default_rng(seed)
    week = (weeks["InvoiceDate"] - weeks["InvoiceDate"].min()) // WEEK
    bills = weeks.assign(week=week).groupby("InvoiceNo")["week"].min()
    chosen = [rng.choice(group.index, len(group)) for _, group in bills.groupby(bills, sort=True)]
    drawn = pd.DataFrame({"InvoiceNo": np.concatenate(chosen)})
    drawn["number"] = np.arange(len(drawn)) + 600_000
    rows = drawn.merge(weeks, on="InvoiceNo", sort=False)
    letter = rows["InvoiceNo"].str.extract(r"^([A-Z]*)")[0]
    rows["InvoiceNo"] = letter + rows.pop("number").astype(str)
    return rows.sort_values("InvoiceDate", kind="stable")[weeks.columns]


def weeks_from(raw: pd.DataFrame, begin: pd.Timestamp) -> pd.DataFrame:
    return raw[raw["InvoiceDate"].between(begin, begin + BATCH_WEEKS * WEEK)]


def test_clean_batches_of_real_weeks_pass(
    tmp_path: Path, settings: Settings, data_folder: Path, root: Path
):
    raw = pd.read_parquet(data_folder / planted.FILES["retail"])
    start = raw["InvoiceDate"].min().normalize()
    starts = [start + n * WEEK for n in range(1, 52 - BATCH_WEEKS)]
    project = planted.project_of("retail", data_folder, root)
    place = Place(settings, project, tmp_path, tmp_path / "batch.parquet")
    weeks_from(raw, starts[0]).to_parquet(place.file, index=False)
    place = ruled(place)

    stopped = []
    for number in range(BATCHES):
        weeks = weeks_from(raw, starts[number * len(starts) // BATCHES])
        redrawn(weeks, number).to_parquet(place.file, index=False)
        stopped += refusal(place, number)

    assert len(stopped) <= MOST_FALSE_STOPS, stopped


def refusal(place: Place, number: int) -> list[str]:
    try:
        place.deliver(place.file, f"batch-{number}")
    except PerennialError as exc:
        return [f"{number}: {exc}"]
    return []
