"""What is served is made of the rows that train."""

from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from perennial.data import history, simulator
from perennial.local import rows
from perennial.project import Project, Simulator, load

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def retail() -> Project:
    return load(Path(__file__).parents[1] / "examples" / "retail")


def test_lines_that_were_booked_twice_count_once(retail: Project):
    once = simulator.simulate(Simulator(seed=5, days=120, customers=100)).drop_duplicates()
    some = once.sample(frac=0.02, random_state=1)
    twice = pd.concat([once, some]).sort_values("InvoiceDate", kind="stable", ignore_index=True)

    found = rows.examples(retail, twice, LONG_AGO, None)

    wanted = history.examples(retail, once.reset_index(drop=True), LONG_AGO, None)
    pd.testing.assert_frame_equal(found, wanted)
    assert not history.examples(retail, twice, LONG_AGO, None).equals(wanted)


def test_rows_of_a_table_that_break_a_rule_are_not_served():
    below = {"expect": "ExpectColumnValuesToBeBetween", "args": {"column": "x", "max_value": 97}}
    project = Project.model_validate(
        {
            "name": "few",
            "kind": "table",
            "time": {"row_order": {}},
            "label": {"column": "y"},
            "features": [{"name": "x", "type": "number"}],
            "expectations": [below],
        }
    )
    raw = pd.DataFrame({"x": range(100), "y": [0, 1] * 50})

    assert rows.examples(project, raw, LONG_AGO, None)["x"].tolist() == list(range(98))
    # Where a run would stop, there is nothing that it would learn from either: all is shown.
    assert len(rows.examples(project, raw.assign(x=raw["x"] + 90), LONG_AGO, None)) == 100
