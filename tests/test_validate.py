"""Data that breaks a critical expectation stops the run, and a page says why."""

import re
from pathlib import Path

import pandas as pd
import pytest

from perennial.data import simulator, sources
from perennial.errors import BadInput, RunFailed
from perennial.project import Expectation, Project, Simulator, load
from perennial.steps import validate


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(Path(__file__).parents[1] / "examples" / "retail")


@pytest.fixture(scope="module")
def purchases() -> pd.DataFrame:
    return simulator.simulate(Simulator(seed=5, days=60, customers=120))


def written(folder: Path, frame: pd.DataFrame) -> Path:
    path = folder / "snapshot"
    frame.to_parquet(path, coerce_timestamps="us")
    return path


def expecting(*wanted: Expectation) -> Project:
    return Project.model_validate(
        {
            "name": "few",
            "kind": "table",
            "time": {"row_order": {}},
            "label": {"column": "label"},
            "features": [{"name": "x", "type": "number"}],
            "training": {"min_rows": 50},
            "expectations": [e.model_dump() for e in wanted],
        }
    )


FEW = pd.DataFrame({"x": range(100), "label": [0.0, 1.0] * 50})


def test_invented_purchases_pass(tmp_path: Path, retail: Project, purchases: pd.DataFrame):
    found = validate.validate(retail, written(tmp_path, purchases), tmp_path / "page.html")

    assert found.passed
    assert len(found.findings) > 20


def test_the_real_file_passes_with_warnings(
    tmp_path: Path, data_folder: Path, retail: Project, root: Path
):
    raw = sources.read(retail, str(data_folder / "online_retail.parquet"), root)

    found = validate.check(retail, raw)

    assert found.passed
    assert [f.expectation.args["column"] for f in found.warnings] == ["CustomerID"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        pytest.param(lambda r: r.rename(columns={"UnitPrice": "Cost"}), "UnitPrice", id="no price"),
        pytest.param(lambda r: r.assign(UnitPrice=None), "UnitPrice", id="empty prices"),
        pytest.param(lambda r: r.assign(UnitPrice=-r["UnitPrice"]), "UnitPrice", id="negative"),
        pytest.param(
            lambda r: r.assign(UnitPrice=r["UnitPrice"].where(r.index % 20 > 0, -1.0)),
            r"UnitPrice: .* rows break it, such as -1.0",
            id="one price in twenty negative",
        ),
        pytest.param(
            lambda r: r.assign(UnitPrice="£" + r["UnitPrice"].astype(str)),
            "UnitPrice: ExpectColumnValuesToBeInTypeList fails: .*, such as £",
            id="prices as texts",
        ),
        pytest.param(
            lambda r: r.assign(CustomerID="C" + r["CustomerID"].astype(str)),
            "CustomerID: ExpectColumnValuesToBeInTypeList",
            id="customers as texts",
        ),
        pytest.param(
            lambda r: r.assign(InvoiceNo=range(len(r))),
            "Quantity: .* Can only use .str accessor",
            id="a rule that cannot be tried",
        ),
        pytest.param(lambda r: r.assign(UnitPrice=r["UnitPrice"] * 1e3), "Median", id="in pence"),
        pytest.param(lambda r: r.assign(Quantity=-r["Quantity"]), "Quantity", id="turned round"),
        pytest.param(lambda r: r.assign(CustomerID=17_000.0), "CustomerID", id="one customer"),
        pytest.param(lambda r: r.head(100), "RowCount", id="too few rows"),
    ],
)
def test_spoiled_purchases_stop_the_run_after_the_page_is_written(
    tmp_path: Path, retail: Project, purchases: pd.DataFrame, spoil, said: str
):
    page = tmp_path / "page.html"

    with pytest.raises(RunFailed, match=said) as caught:
        validate.validate(retail, written(tmp_path, spoil(purchases)), page)

    text = page.read_text()
    assert "BROKEN" in text
    for name in re.findall(r"Expect\w+", str(caught.value)):
        assert name in text


@pytest.mark.parametrize("severity", ["warning", "info"])
def test_what_is_not_critical_is_only_reported(tmp_path: Path, severity: str):
    wanted = Expectation(
        expect="ExpectColumnMaxToBeBetween", severity=severity, args={"column": "x", "max_value": 5}
    )

    found = validate.validate(expecting(wanted), written(tmp_path, FEW), tmp_path / "page.html")

    assert found.passed
    assert [f.expectation.severity for f in found.warnings] == [severity]


def test_a_failure_counts_the_rows_and_shows_examples():
    wanted = Expectation(
        expect="ExpectColumnValuesToBeBetween", args={"column": "x", "max_value": 90}
    )

    (finding,) = validate.check(expecting(wanted), FEW).critical

    assert finding.unexpected == 9
    assert "9 of 100 rows break it" in finding.sentence
    assert "91" in finding.sentence


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        pytest.param(
            Expectation(expect="ExpectMiracles"), "ExpectMiracles is not", id="an unknown name"
        ),
        pytest.param(
            Expectation(expect="ExpectColumnToExist", args={"colum": "x"}),
            "ExpectColumnToExist has wrong args",
            id="a wrong argument",
        ),
    ],
)
def test_a_wrong_expectation_is_the_projects_fault(wanted: Expectation, said: str):
    with pytest.raises(BadInput, match=said):
        validate.check(expecting(wanted), FEW)


def test_what_data_says_is_escaped_on_the_page(tmp_path: Path):
    wanted = Expectation(
        expect="ExpectColumnValuesToBeInSet",
        severity="warning",
        args={"column": "x", "value_set": ["a"]},
    )
    frame = FEW.assign(x="<script>alert(1)</script>")

    with pytest.raises(RunFailed, match="x: ExpectColumnValuesToBeInTypeList"):
        validate.validate(expecting(wanted), written(tmp_path, frame), tmp_path / "page.html")

    assert "<script>alert" not in (tmp_path / "page.html").read_text()
