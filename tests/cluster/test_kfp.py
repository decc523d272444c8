"""The compiled pipeline on a real KFP backend, where one is given."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
# Read before any test takes our variables away.
GIVEN = {name: value for name, value in os.environ.items() if name.startswith("PERENNIAL_")}


@pytest.fixture(autouse=True)
def real() -> None:
    if "PERENNIAL_KFP_ENDPOINT" not in GIVEN:
        pytest.skip("no KFP backend here: set PERENNIAL_KFP_ENDPOINT")


def perennial(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **GIVEN, "PERENNIAL_LAUNCHER": "kfp"}
    command = [sys.executable, "-m", "perennial.cli", *args]
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600, check=False
    )


def test_the_whole_pipeline_runs_there_step_by_step():
    done = perennial("runs", "submit", "examples/retail", "--as-of", "2011-06-06", "--trials", "3")

    assert done.returncode == 0, done.stderr
    assert {"ingest", "train", "gate"} <= set(done.stdout.split())
    run = re.findall(r"run (\S+) succeeded", done.stdout)[0]
    assert perennial("runs", "logs", run, "--step", "train").stdout


def test_a_failure_is_told_with_step_and_reason_though_the_backend_does_not_know_it():
    done = perennial("runs", "submit", "examples/retail", "--source", "/no/such/rows.csv")

    assert done.returncode == 4
    assert re.match(r"perennial: step ingest failed: .*rows\.csv", done.stderr), done.stderr


def test_a_run_is_terminated():
    run = perennial("runs", "submit", "examples/retail", "--no-wait").stdout.strip()

    assert perennial("runs", "terminate", run).returncode == 0


def test_a_schedule_is_made_changed_and_removed():
    made = perennial("pipeline", "schedule", "examples/retail", "--cron", "0 30 3 1 1 *")
    changed = perennial("pipeline", "schedule", "examples/retail", "--cron", "0 40 3 1 1 *")
    removed = perennial("pipeline", "schedule", "examples/retail", "--off")

    assert [d.returncode for d in (made, changed, removed)] == [0, 0, 0]
    assert "schedule changed" in changed.stdout
    assert "schedule removed" in removed.stdout
