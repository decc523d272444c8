"""Bad data stops a run of real pods with its reason, and rows that break rules stay aside."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import sqlalchemy as sa
import yaml

from perennial.data import sources
from perennial.errors import RunFailed
from perennial.ledger import Ledger
from perennial.project import load
from perennial.retrain import job
from perennial.store.objects import Folder
from tests.cluster.jobs import AS_OF, ROOT, ask

pytestmark = [pytest.mark.cluster, pytest.mark.stores]

RETAIL = ROOT / "examples" / "retail"


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Purchases until some weeks after a first model, some lines of them booked twice."""
    raw = sources.read(load(RETAIL), None, RETAIL)
    return raw[raw["InvoiceDate"] < pd.Timestamp(AS_OF)].reset_index(drop=True)


def given(folder: Folder, rows: pd.DataFrame, name: str) -> str:
    """Rows in two parts of an object store; gives their pattern."""
    half = len(rows) // 2
    for number, part in enumerate((rows.iloc[:half], rows.iloc[half:])):
        folder.write(f"{name}/{number}.parquet", part.to_parquet(index=False))
    return f"{folder.uri}/{name}/*.parquet"


def test_a_run_goes_on_without_the_rows_that_break_rules(tenant, launcher, rows):
    store = Folder(tenant.settings.artifacts)
    twice = int(rows.duplicated().sum())
    assert twice > 0

    result = launcher.run(ask("kept aside", source=given(store, rows, "rows")))

    assert result.state == "succeeded", result
    with tenant.engine() as engine:
        (told,) = Ledger(engine).entries("retail", "rows.quarantined")
        (start,) = Ledger(engine).entries("retail", "run.started")
    assert told.body["run"] == result.run
    assert (start.body["rows_read"], told.body["rows"]) == (len(rows), twice)
    command = ["quarantine", "show", told.subject[:6], "--project", str(RETAIL), "--json"]
    shown = subprocess.run(
        [sys.executable, "-m", "perennial.cli", *command],
        capture_output=True,
        check=True,
        text=True,
    )
    assert json.loads(shown.stdout)["rows"] == twice
    files = Folder(f"{tenant.settings.artifacts}/retail/runs").names(result.run)
    for artifact in ("page", "aside", "kept"):
        assert any(Path(file).name == artifact and "validate" in file for file in files), files


def test_a_run_is_stopped_by_a_batch_in_another_unit(tenant, launcher, rows):
    store = Folder(tenant.settings.artifacts)
    in_pence = rows.assign(UnitPrice=rows["UnitPrice"] * 100)

    with pytest.raises(RunFailed, match="step validate failed: .*UnitPrice") as caught:
        launcher.run(ask("in pence", source=given(store, in_pence, "pence")))

    page = re.search(r"see (s3://\S+?\.html)", str(caught.value))
    assert page, caught.value
    where, _, name = page[1].rpartition("/")
    assert "Stopped" in Folder(where).read(name).decode()
    run = job.run_id("retail", "in pence")
    assert tenant.kinds(run).count("run.started") == 1
    assert "registered" not in tenant.kinds(run)


def test_rows_come_from_a_database_that_a_secret_names(tenant, launcher, rows):
    engine = sa.create_engine(tenant.settings.state_url)
    rows.to_sql("purchases", engine, index=True, index_label="place", chunksize=5000)
    engine.dispose()
    project = yaml.safe_load((RETAIL / "project.yaml").read_text())
    query = "select * from purchases order by place"
    project["source"] = {"query": query, "wanted": "purchases"}
    tenant.apply("ConfigMap", "projects", data={"retail.yaml": yaml.safe_dump(project)})
    tenant.apply("Secret", "data", stringData={"source-url": tenant.settings.state_url})

    result = launcher.run(ask("from a database"))

    assert result.state == "succeeded", result
    with tenant.engine() as found:
        (start,) = Ledger(found).entries("retail", "run.started")
    assert start.body["rows_read"] == len(rows)
    assert start.body["source"] == "query"
