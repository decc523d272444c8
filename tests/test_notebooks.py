"""The notebooks hold no outputs, import what they may, and run from the first cell to the last."""

import ast
import resource
import sys
from pathlib import Path

import pytest

from perennial.ledger import Ledger
from perennial.local import processes
from perennial.settings import Settings
from perennial.store.engine import make_engine
from tests import notebooks

PATHS = notebooks.paths()
MAY_IMPORT = {"perennial", "pandas", "numpy", "matplotlib", "httpx", "tritonclient"}
BUDGET_S = 240.0  # of processor time, all three: how busy the machine is else is not their fault


def test_there_are_three():
    assert [p.name[:2] for p in PATHS] == ["01", "02", "03"]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_no_cell_keeps_what_a_run_left(path):
    assert notebooks.left(path) == []


def test_outputs_and_counts_are_seen_and_stripped(tmp_path):
    used = notebooks.read(PATHS[0])
    cell = next(c for c in used.cells if c.cell_type == "code")
    cell.execution_count = 1
    copy = tmp_path / "used.ipynb"
    notebooks.write(used, copy)
    assert notebooks.left(copy) == [f"used.ipynb {cell.id}"]

    notebooks.strip(copy)

    assert notebooks.left(copy) == []
    assert copy.read_bytes() == PATHS[0].read_bytes()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_it_imports_what_it_may(path):
    tree = ast.parse(notebooks.source(path))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    tops = {name.split(".")[0] for name in names}

    assert tops - MAY_IMPORT - sys.stdlib_module_names == set()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_its_links_lead_somewhere(path):
    broken = [link for link in notebooks.links(path) if not (path.parent / link).exists()]

    assert broken == []


def processor_s() -> float:
    """Seconds that processes which were started here, and ended, kept a core busy."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_all_three_tell_their_story_on_one_machine(settings: Settings, tmp_path: Path):
    began = processor_s()
    first, second, third = (notebooks.executed(path, tmp_path) for path in PATHS)
    took_s = processor_s() - began
    state = settings.state("retail")
    ledger = Ledger(make_engine(state.url))
    runs = [e.body["trigger"] for e in ledger.entries("retail", "run.started")]

    assert "passed" in first and "refused: AUC" in first
    assert "succeeded: all 6 limits kept" in second
    assert "evaluate, features, gate, validate" in second
    assert "400 inputs.recency_days.data holds 'soon'" in third
    assert third.index("drift in") < third.index("wait:") < third.index("retrain:")
    assert third.index("retrain:") < third.index("pipeline run on") < third.index("promoted v2")
    assert runs[0].startswith("by hand") and len(runs) == 2
    assert processes.stack_pid(state.stack) is None
    assert took_s < BUDGET_S
