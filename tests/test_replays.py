"""The main job, end to end: real servers, real Envoy, real pipeline runs, real data."""

import contextlib
import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
VICTORIAN = {"vicprice", "vicdemand", "transfer"}
LIMIT_S = 3000
FULL = pytest.mark.full

pytestmark = pytest.mark.replay


def perennial(home: Path, *args: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, with its state below ``home``."""
    command = [str(Path(sys.executable).parent / "perennial"), *args]
    env = {**os.environ, "PERENNIAL_HOME": str(home), "PERENNIAL_EDGE_PORT": "0"}
    return subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def replay(home: Path, *args: str, cwd: Path = ROOT) -> dict[str, Any]:
    """Replay and return the JSON summary; the loop must not have broken."""
    done = perennial(home, "replay", *args, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout)
    assert summary["problems"] == []
    assert summary["failed_requests"] == 0
    return summary


def events(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [w for w in summary["windows"] if w["event"]]


def promoted(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in summary["rollouts"] if r["phase"] == "promoted"]


def refused(summary: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in summary["runs"] if r["passed"] is False]


def judged_windows(summary: dict[str, Any], run: dict[str, Any]) -> str:
    """First day of the rows that judged the candidate of ``run``."""
    return str(run["judged_from"])[:7]


def processes() -> list[bytes]:
    """Command line and environment of each process that we may look at."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
            found.append(told)
    return found


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("default")
    return home, replay(home, "examples/retail")


def test_the_default_project_drifts_retrains_promotes_and_refuses(default):
    _, summary = default

    assert events(summary)
    assert promoted(summary)
    assert refused(summary)
    assert summary["pooled"]["auc_fresh"] > summary["pooled"]["auc_frozen"]


def test_the_refused_candidate_of_the_default_project_fails_on_its_data_alone(default):
    _, summary = default

    spoiled = [r for r in refused(summary) if r["judged_from"] >= "2011-11-21"]

    assert any("is below 0.600" in r["reason"] for r in spoiled)


def test_every_step_of_the_promoted_canary_was_judged_on_requests(default):
    _, summary = default

    advances = [s for s in promoted(summary)[0]["steps"] if s["verdict"] == "advance"]

    assert [s["weight"] for s in advances] == [10, 50, 100]
    assert all(s["canary_requests"] >= 30 for s in advances)


def test_why_tells_the_story_from_the_event_to_the_seed(default):
    home, summary = default

    story = perennial(home, "why").stdout

    version = promoted(summary)[-1]["version"]
    assert version in story
    pins = ("drifted", "data  ", "commit", "parameters", "lock", "seed", "kept   AUC", "promoted")
    for part in (*pins, "Refused", refused(summary)[-1]["candidate"]):
        assert part in story, f"{part} is missing in:\n{story}"


def test_the_report_tells_all_without_outside_links(default):
    home, summary = default

    page = next((home / "reports").glob("*.html")).read_text()

    assert promoted(summary)[0]["version"] in page
    assert refused(summary)[0]["reason"].split(";")[0][:40] in page
    assert 'src="http' not in page and 'href="http' not in page


def test_nothing_of_the_stack_runs_after_a_replay(default):
    home, _ = default

    assert [p for p in processes() if str(home).encode() in p] == []
    assert [p for p in processes() if b"PATH=" in p], "surroundings of processes can be read"


def test_the_real_retail_file_runs_the_same_way_with_an_honest_auc(tmp_path, data_folder):
    source = data_folder / "online_retail.parquet"

    summary = replay(tmp_path, "examples/retail", "--source", str(source))

    assert events(summary) and len(summary["runs"]) > 1
    assert 0.66 <= summary["pooled"]["auc_frozen"] <= 0.76
    assert 0.66 <= summary["pooled"]["auc_fresh"] <= 0.76


@pytest.mark.parametrize("until", [("--until", "1997-07-08"), pytest.param((), marks=FULL)])
def test_elec2_sees_its_abrupt_change_in_the_first_full_window_and_recovers(
    tmp_path, data_folder, until
):
    source = data_folder / "elec.csv.gz"
    change = datetime.fromisoformat("1997-05-05T00:00:00+00:00")  # row 17,424

    summary = replay(tmp_path, "examples/elec", "--source", str(source), *until)

    seen = [w for w in events(summary) if VICTORIAN & set(w["drifted"])]
    full = [w for w in summary["windows"] if datetime.fromisoformat(w["start"]) >= change]
    assert not [w for w in seen if datetime.fromisoformat(w["end"]) <= change]
    assert full[0] in seen
    runs_after = [r for r in summary["runs"] if datetime.fromisoformat(r["as_of"]) > change]
    assert {r["version"] for r in runs_after} & {r["version"] for r in promoted(summary)}


@pytest.mark.parametrize("until", [("--until", "2009-11-15"), pytest.param((), marks=FULL)])
def test_bank_refuses_2008_and_promotes_a_model_judged_on_2009(tmp_path, data_folder, until):
    source = data_folder / "bank-additional-full.csv.gz"

    summary = replay(tmp_path, "examples/bank", "--source", str(source), *until)

    promoted_versions = {r["version"] for r in promoted(summary)}
    kept = [r for r in summary["runs"] if r["version"] in promoted_versions]
    months = {judged_windows(summary, r) for r in kept}
    assert not months & {"2008-08", "2008-11"}
    assert any(month.startswith("2009") for month in months)
    thin = [w["start"][:7] for w in summary["windows"] if w["thin"]]
    assert thin == ["2008-10", "2008-12"]


@pytest.mark.parametrize("table", ["Telco-Customer-Churn.csv.gz", "adult-train.csv.gz"])
def test_a_table_that_no_example_covers_works_and_stays_silent(tmp_path, data_folder, table):
    made = perennial(tmp_path, "init", str(data_folder / table), "--to", "mine", cwd=tmp_path)
    assert made.returncode == 0, made.stderr

    summary = replay(tmp_path, "mine", cwd=tmp_path)

    assert len(summary["runs"]) == 1, "only the first training"
    assert promoted(summary) == []
    assert summary["windows"]
