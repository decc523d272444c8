"""Public data sets give the rows that plain pandas reads from them, to the last bit."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from perennial.data import guess, sources
from perennial.project import Project, load

MISSING = ["", "?", "NA", "N/A", "NaN", "nan", "null", "NULL"]


def plain(path: Path, mark: str = ",", header: int | None = 0) -> pd.DataFrame:
    """A CSV as pandas reads it, with numbers rounded as they should be."""
    found = pd.read_csv(
        path,
        sep=mark,
        header=header,
        skipinitialspace=True,
        na_values=MISSING,
        keep_default_na=False,
        float_precision="round_trip",
    )
    return found if header == 0 else found.rename(columns=lambda i: f"column_{i + 1}")


def expected(project: Project, raw: pd.DataFrame, times: pd.Series) -> pd.DataFrame:
    """What a table's rows mean, in a few lines of pandas."""
    label = raw[project.label.column].map(lambda v: f"{v:g}" if isinstance(v, float) else str(v))
    rows = pd.DataFrame({"row_id": np.arange(len(raw))})
    rows["event_time"] = pd.to_datetime(times.to_numpy(), utc=True).astype("datetime64[us, UTC]")
    rows["label"] = (label == project.label.positive).astype(float)
    rows["label_known_at"] = rows["event_time"] + project.label.known_after
    for feature in project.features:
        column = raw[feature.name]
        is_number = feature.type == "number"
        if is_number:
            rows[feature.name] = column.astype(float)
        else:
            rows[feature.name] = column.map(str, na_action="ignore").astype(object)
            rows.loc[column.isna(), feature.name] = None
    return rows.sort_values("event_time", kind="stable", ignore_index=True)


def steps(project: Project, raw: pd.DataFrame) -> pd.Series:
    order = project.time.row_order
    return pd.Series([order.start + i * order.step for i in range(len(raw))])


def assert_same(found: pd.DataFrame, wanted: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)


def test_the_calls_of_the_bank(data_folder: Path, root: Path):
    bank, path = load(root / "examples" / "bank"), data_folder / "bank-additional-full.csv.gz"
    days = plain(data_folder / "bank_event_dates.csv.gz").iloc[:, 1]

    found = sources.table_rows(bank, sources.read(bank, str(path), root))

    assert_same(found, expected(bank, plain(path, ";"), days))
    assert len(found) == 41_188


def test_the_half_hours_of_elec(data_folder: Path, root: Path):
    elec, path = load(root / "examples" / "elec"), data_folder / "elec.csv.gz"

    found = sources.table_rows(elec, sources.read(elec, str(path), root))

    raw = plain(path)
    assert_same(found, expected(elec, raw, steps(elec, raw)))
    assert found["label_known_at"].iloc[-1] - found["event_time"].iloc[-1] == timedelta(days=1)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("Telco-Customer-Churn.csv.gz", 7_043, id="Telco"),
        pytest.param("adult-train.csv.gz", 32_561, id="Adult"),
        pytest.param("adult-test.csv.gz", 16_281, id="Adult's test"),
        pytest.param("bank-additional-full.csv.gz", 41_188, id="bank"),
        pytest.param("elec.csv.gz", 45_312, id="Elec2"),
    ],
)
def test_a_guessed_project_of(data_folder: Path, name: str, rows: int):
    guessed = Project.model_validate(yaml.safe_load(guess.guess(data_folder / name)))
    mark = ";" if name.startswith("bank") else ","

    found = sources.table_rows(guessed, sources.read(guessed, None, data_folder))

    raw = plain(data_folder / name, mark, 0 if guessed.source.header else None)
    assert_same(found, expected(guessed, raw, steps(guessed, raw)))
    assert len(found) == rows


def test_the_purchases_of_online_retail(data_folder: Path, root: Path):
    retail, path = load(root / "examples" / "retail"), data_folder / "online_retail.parquet"

    found = sources.read(retail, str(path), root)

    wanted = pd.read_parquet(path)[list(sources.TRANSACTIONS)]
    wanted["InvoiceDate"] = wanted["InvoiceDate"].dt.tz_localize("UTC")
    for name in ("Quantity", "UnitPrice", "CustomerID"):
        wanted[name] = wanted[name].astype(float)
    for name in ("InvoiceNo", "StockCode", "Description", "Country"):
        text = wanted[name].str.strip()
        # Descriptions are free text: "?" is one.
        missing = [""] if name == "Description" else MISSING
        wanted[name] = text.mask(text.isin(missing) | text.isna(), None).astype(object)
    assert_same(found, wanted.sort_values("InvoiceDate", kind="stable", ignore_index=True))
    assert int(found["CustomerID"].isna().sum()) == 135_080
