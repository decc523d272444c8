"""A run ends with a result or with a reason, and nothing of it outlives whoever started it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest
import tiny
import yaml
from launchers import LONG, REASON, WELL, WRONG, LauncherContract, eventually

from perennial import bundle
from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.records import Phase
from perennial.retrain import launchers
from perennial.settings import Settings
from perennial.store import lease, rollouts, versions
from perennial.store.engine import make_engine

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "pipelines" / "training.yaml"

# A pipeline with the real parameters and the real exit handler, whose one step does what the
# source says: quick enough to be started a dozen times.
FAKE = '''
from kfp import compiler, dsl
from components.notify import notify

@dsl.component(base_image="python", install_kfp_package=False)
def step(project: str, source: str, as_of: str, trials: int, trigger: str, run: str) -> str:
    """Do what the source says."""
    import os, pathlib, sys, time
    from perennial.steps import context
    with context.opened("step", project, run) as ctx:
        body = dict(run=run, trigger=trigger, as_of=as_of, threads=os.environ["OMP_NUM_THREADS"])
        if source != "early":
            ctx.ledger.append("run.started", project=ctx.project.name, subject=run, body=body,
                              now=ctx.now)
        (ctx.folder / "pid").write_text(str(os.getpid()))
        if source == "sleep":
            time.sleep(120)
        if source in ("raise", "early"):
            raise ValueError("row 17: churned is 2, expected 0 or 1")
        if source == "crash":
            os.kill(os.getpid(), 9)
    return sys.executable

@dsl.pipeline(name="fake")
def fake(project: str, source: str = "", as_of: str = "", trials: int = 0, seed: int = -1,
         trigger: str = ""):
    told = notify(project=project, run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)
    with dsl.ExitHandler(told):
        step(project=project, source=source, as_of=as_of, trials=trials, trigger=trigger,
             run=dsl.PIPELINE_JOB_ID_PLACEHOLDER)

compiler.Compiler().compile(fake, "{out}")
'''


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spec")
    (folder / "fake.py").write_text(FAKE.replace("{out}", str(folder / "fake.yaml")))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(folder / "fake.py")], check=True, env=env)
    return folder / "fake.yaml"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A project folder with a table beside it."""
    found = tmp_path / "project"
    found.mkdir()
    text = {
        "name": "tiny",
        "kind": "table",
        "time": {"row_order": {"start": tiny.START.isoformat(), "step": "1h"}},
        "label": {"column": "label"},
        "source": {"path": "rows.csv"},
        "features": [
            {"name": "a", "type": "number"},
            {"name": "b", "type": "number"},
            {"name": "c", "type": "number"},
            {"name": "colour", "type": "category"},
        ],
        "sensitive": ["colour"],
        "training": {"trials": 3},
        "gates": {"max_calibration_error": 0.5, "min_rows": 50},
        "window": {"every": "200 rows", "min_rows": 50},
    }
    (found / "project.yaml").write_text(yaml.safe_dump(text))
    return found


@pytest.fixture
def ledger(settings: Settings) -> Ledger:
    return Ledger(make_engine(settings.state("tiny").url))


def request(folder: Path, source: str = "", trigger: str = "event 1") -> launchers.RunRequest:
    return launchers.RunRequest(project=folder, source=source, trigger=trigger)


def alive(pid: int) -> bool:
    """Does a process run? One that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def step_pid(folder: Path) -> int:
    path = folder / "pid"
    assert eventually(lambda: path.is_file() and bool(path.read_text())), "the step never began"
    return int(path.read_text())


class Bench:
    """The fake pipeline in a process of this machine."""

    project = "tiny"
    reason = REASON

    def __init__(self, settings: Settings, spec: Path, folder: Path) -> None:
        self.launcher = launchers.LocalLauncher(settings, spec)
        self.ledger = Ledger(make_engine(settings.state("tiny").url))
        self._folder = folder

    def ask(self, how: str, key: str) -> launchers.RunRequest:
        source = {WELL: "", WRONG: "raise", LONG: "sleep"}[how]
        return launchers.RunRequest(self._folder, source=source, trigger=key, key=key)

    def goes_on(self) -> bool:
        path = self._folder / "pid"
        text = path.read_text() if path.is_file() else ""
        return bool(text) and alive(int(text))


class TestLocalLauncher(LauncherContract):
    @pytest.fixture
    def bench(self, settings: Settings, fake: Path, folder: Path) -> Bench:
        return Bench(settings, fake, folder)


def test_the_run_sees_the_settings_as_they_are_now_and_few_threads(
    settings, fake, folder, tmp_path
):
    elsewhere = settings.model_copy(update={"home": tmp_path / "elsewhere"})

    launchers.LocalLauncher(elsewhere, fake).run(request(folder))

    found = Ledger(make_engine(elsewhere.state("tiny").url)).entries("tiny", "run.started")
    assert found[0].body["threads"] == "2"


def test_a_run_that_was_cut_off_leaves_no_lease_behind(settings, fake, folder, ledger):
    launcher, engine = launchers.LocalLauncher(settings, fake), ledger._engine
    waiting = threading.Thread(target=stopped, args=(launcher, request(folder, "sleep")))
    waiting.start()
    step_pid(folder)
    (began,) = ledger.entries("tiny", "run.started")
    held = lease.holder(engine, "run:tiny", time.time())

    launcher.stop()
    waiting.join(30)

    assert (held, lease.holder(engine, "run:tiny", time.time())) == (began.subject, None)


def stopped(launcher: launchers.LocalLauncher, asked: launchers.RunRequest) -> None:
    with pytest.raises(RunFailed, match="was stopped"):
        launcher.run(asked)


def test_a_run_that_failed_before_it_could_say_that_it_began_still_has_its_reason(
    settings, fake, folder
):
    with pytest.raises(RunFailed, match="row 17: churned is 2"):
        launchers.LocalLauncher(settings, fake).run(request(folder, "early"))


def test_a_step_that_crashed_is_named(settings, fake, folder, ledger):
    with pytest.raises(RunFailed, match="step step failed: it ended without a word"):
        launchers.LocalLauncher(settings, fake).run(request(folder, "crash"))

    assert ledger.entries("tiny", "run.finished")[0].body["state"] == "failed"


def test_the_whole_output_is_kept_in_a_log_without_colours(settings, fake, folder):
    launchers.LocalLauncher(settings, fake).run(request(folder, trigger="a/b c"))

    text = (settings.state("tiny").logs / "run-a-b-c.log").read_text()

    assert "Executing task 'step'" in text
    assert "\x1b" not in text


def test_no_folder_is_left_behind_in_tmp(settings, fake, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()

    launchers.LocalLauncher(settings, fake).run(request(folder))

    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_missing_spec_is_told_with_its_remedy(settings, folder, tmp_path):
    with pytest.raises(BadInput, match="run 'make spec'"):
        launchers.LocalLauncher(settings, tmp_path / "none.yaml").run(request(folder))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill -9", "SIGTERM"])
def test_a_run_dies_with_whoever_started_it(settings, fake, folder, number):
    code = (
        "import sys; from pathlib import Path; from perennial.settings import Settings\n"
        "from perennial.retrain import launchers as l\n"
        f"l.LocalLauncher(Settings.load(), Path({str(fake)!r}))"
        f".run(l.RunRequest(Path({str(folder)!r}), 'sleep'))"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    pid = step_pid(folder)

    starter.send_signal(number)
    starter.wait()

    assert eventually(lambda: not alive(pid))
    assert eventually(lambda: not _of(settings), 10), _of(settings)


def _of(settings: Settings) -> list[str]:
    """Command lines of all processes of this test's runs."""
    done = subprocess.run(
        ["pgrep", "-af", str(settings.home.parent)], capture_output=True, text=True, check=False
    )
    return [line for line in done.stdout.splitlines() if "launchers" in line or "kfp" in line]


def test_the_child_does_not_start_when_its_parent_is_gone(fake, folder):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "perennial.retrain.launchers", "--child-of", "1"),
            *("--project", str(folder), "--spec", str(fake)),
        ],
        check=False,
    )

    assert done.returncode == 1


def test_bad_input_by_hand_is_one_line(settings, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "perennial.retrain.launchers", "--project", "no/such"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert done.returncode == 2
    assert re.fullmatch(r"error: no project.yaml in 'no/such'.*\n", done.stderr)


@pytest.fixture
def table(folder: Path) -> Path:
    tiny.rows(2000).drop(columns=["row_id", "event_time"]).to_csv(folder / "rows.csv", index=False)
    return folder


@pytest.mark.slow
def test_the_real_pipeline_makes_judges_and_wishes_a_model(settings, table, ledger):
    launcher = launchers.LocalLauncher(settings, SPEC)
    state = settings.state("tiny")
    engine = make_engine(state.url)

    first = launcher.run(request(table, trigger="first"))
    wished = rollouts.open_rollout(engine, "tiny")
    rollouts.set_serving(engine, "tiny", wished.id)
    second = launcher.run(request(table, trigger="second"))

    assert first.reason.startswith("all 6 limits kept")
    assert wished.phase is Phase.WISHED
    (version,) = versions.all_versions(engine, "tiny")
    made = bundle.load(state.bundles / version.digest.removeprefix("sha256:"), version.digest)
    started = ledger.entries("tiny", "run.started")
    assert made.lineage.data_digest == started[0].body["data_digest"]
    assert second.reason.startswith("refused: AUC +0.000 against the champion")
    gates = ledger.entries("tiny", "gate")
    assert [g.body["record"]["champion"] for g in gates] == ["", version.digest]
    # Same data, code and seed: the second run made the very same model.
    assert {g.body["record"]["candidate"] for g in gates} == {version.digest}
    ledger.verify()


@pytest.mark.slow
def test_artifacts_carry_digest_run_and_parents(settings, table):
    launcher = launchers.LocalLauncher(settings, SPEC)
    result = launcher.run(request(table))
    (run,) = settings.state("tiny").runs.iterdir()

    def metadata(step: str, name: str) -> dict[str, object]:
        out = yaml.safe_load((run / step / "executor_output.json").read_text())
        return dict(out["artifacts"][name]["artifacts"][0]["metadata"])

    snapshot, feature_table = metadata("ingest", "snapshot"), metadata("features", "table")
    model, judged = metadata("train", "model"), metadata("gate", "judged")
    assert {m["run"] for m in (snapshot, feature_table, model, judged)} == {result.run}
    assert feature_table["parents"] == [snapshot["digest"]]
    assert model["parents"] == [snapshot["digest"], feature_table["digest"]]
    assert judged["digest"] == model["digest"] == bundle.verify(run / "gate" / "judged")
    assert metadata("evaluate", "curves")["confusionMatrix"]["rows"]
    assert 0.5 < metadata("evaluate", "metrics")["auc"] <= 1
    assert (run / "evaluate" / "page").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_real_run_without_its_source_says_what_file_is_wanted(settings, folder, ledger):
    with pytest.raises(RunFailed, match=r"step ingest failed: .*rows\.csv"):
        launchers.LocalLauncher(settings, SPEC).run(request(folder))

    assert ledger.entries("tiny", "run.finished")[0].body["state"] == "failed"


@pytest.mark.slow
def test_as_of_is_what_the_run_may_know(settings, table, ledger):
    as_of = tiny.START + 1500 * tiny.STEP
    asked = launchers.RunRequest(table, as_of=as_of, trigger="then")

    launchers.LocalLauncher(settings, SPEC).run(asked)

    (started,) = ledger.entries("tiny", "run.started")
    assert datetime.fromisoformat(started.body["as_of"]) == as_of
    snapshot = next(settings.state("tiny").snapshots.glob("*.parquet"))
    assert pd.read_parquet(snapshot)["event_time"].max() < as_of
    assert as_of.tzinfo == UTC
