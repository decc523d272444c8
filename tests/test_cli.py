"""What a person sees at the command line: one grammar, one line an error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from perennial import cli
from perennial.local import spec
from perennial.retrain import launchers
from perennial.store import lease
from perennial.store.engine import make_engine

ROOT = Path(__file__).resolve().parents[1]


def perennial(home: Path, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "perennial.cli", *args]
    env = {**os.environ, "PERENNIAL_HOME": str(home)}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False
    )


def test_there_are_at_most_eighteen_first_words():
    actions = [a for a in cli.build_parser()._actions if a.dest == "command"]

    assert len(actions[0].choices) <= 18


def test_help_imports_nothing_large():
    code = "import sys; from perennial import cli; cli.main([]); print(sorted(sys.modules))"

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    loaded = done.stdout.splitlines()[-1]
    assert not [n for n in ("pydantic", "pandas", "sqlalchemy", "kfp") if f"'{n}'" in loaded]


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("nonsense",), 2, "invalid choice"),
        (("replay", "nowhere"), 2, "no project.yaml in 'nowhere'"),
        (("replay", "examples/bank"), 2, "--source"),
        (("replay", "examples/bank", "--source", "/nowhere.csv"), 2, "/nowhere.csv"),
        (("init", "/nowhere.csv"), 2, "no file at /nowhere.csv"),
        (("why",), 2, "nothing is known yet"),
        (("status", "examples/retail"), 2, "nothing is known yet of retail"),
        (("pipeline", "run", "examples/retail", "--as-of", "soon"), 2, "--as-of is 'soon'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_a_mistake_is_told_in_one_line_with_its_exit_code(tmp_path, args, code, says):
    done = perennial(tmp_path, *args)

    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_state_folder_that_is_a_file_is_told_in_one_line(tmp_path):
    home = tmp_path / "home"
    home.write_text("not a folder")

    done = perennial(home, "replay", "examples/retail")

    assert done.returncode == 3
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_damaged_state_database_is_told_in_one_line(tmp_path):
    (tmp_path / "retail").mkdir()
    (tmp_path / "retail" / "state.db").write_bytes(b"junk" * 1000)

    done = perennial(tmp_path, "status", "examples/retail")

    assert done.returncode == 3
    assert "state.db cannot be used as the state database" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_table_whose_name_begins_with_a_digit_gets_a_project(tmp_path):
    rows = "\n".join(f"{i % 7},{i % 11},{int(i % 3 == 0)}" for i in range(1500))
    (tmp_path / "2020-sales.csv").write_text(f"a,b,churn\n{rows}\n")

    done = perennial(tmp_path, "init", "2020-sales.csv", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "table-2020-sales" / "project.yaml").is_file()


def test_the_schema_of_a_project_is_json():
    done = perennial(ROOT, "project", "schema")

    assert "label" in json.loads(done.stdout)["properties"]


def test_a_run_by_hand_holds_the_lease_so_that_one_run_goes_on_at_a_time(settings, monkeypatch):
    held = []

    class Launcher:
        def __init__(self, *_: object) -> None: ...

        def run(self, request: launchers.RunRequest, progress: object) -> launchers.RunResult:
            engine = make_engine(settings.state("retail").url)
            held.append(lease.holder(engine, "run:retail", time.time()))
            return launchers.RunResult(run="r1", state="succeeded", reason="fine")

    monkeypatch.setattr(spec.launchers, "LocalLauncher", Launcher)

    assert spec.run_once(settings, "examples/retail", source="", as_of="2011-06-06") == 0
    assert held and held[0] is not None
