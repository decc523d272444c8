"""What a person does with a KFP backend at the command line, and what is said back."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kfp_backend import STEPS, FakeKfp, serving

from perennial import cli
from perennial.ledger import Ledger
from perennial.retrain import remote, schedules
from perennial.settings import Settings
from perennial.store.engine import make_engine

ROOT = Path(__file__).resolve().parents[1]
RETAIL = str(ROOT / "examples" / "retail")

# Exit code, what was printed, what was said on stderr.
Said = tuple[int, str, str]
Ask = Callable[..., Said]


@pytest.fixture
def fake() -> Iterator[FakeKfp]:
    with serving(FakeKfp()) as found:
        yield found


@pytest.fixture
def perennial(
    settings: Settings,
    fake: FakeKfp,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Ask:
    monkeypatch.setenv("PERENNIAL_LAUNCHER", "kfp")
    monkeypatch.setenv("PERENNIAL_KFP_ENDPOINT", fake.host)
    monkeypatch.setattr(remote, "POLL_S", 0.001)
    monkeypatch.setattr(schedules, "POLL_S", 0.001)

    def ask(*args: str) -> Said:
        code = cli.main(args)
        out, err = capsys.readouterr()
        return code, out, err

    return ask


def test_a_run_is_submitted_and_followed_step_by_step(perennial, fake):
    code, out, _ = perennial("runs", "submit", RETAIL, "--trials", "3")

    (run,) = fake.runs.values()
    assert code == 0
    assert out.splitlines() == [*STEPS, "notify", f"retail: run {run.id} succeeded"]
    assert run.parameters["trials"] == 3
    assert run.parameters["trigger"].startswith("by hand 2")


def test_a_run_that_failed_is_one_line_with_step_and_reason(perennial, fake):
    fake.plan["train"] = ["perennial.errors.BadInput: row 17: churned is 2"]

    code, _, err = perennial("runs", "submit", RETAIL)

    (run,) = fake.runs
    assert code == 4
    assert err == f"perennial: step train failed: row 17: churned is 2; the run is {run}\n"


def test_a_run_need_not_be_waited_for(perennial, fake):
    code, out, _ = perennial("runs", "submit", RETAIL, "--no-wait")

    (run,) = fake.runs.values()
    assert (code, out) == (0, f"{run.id}\n")
    assert run.run.state == "PENDING"


def test_two_runs_by_hand_are_two(perennial, fake):
    perennial("runs", "submit", RETAIL, "--no-wait")
    perennial("runs", "submit", RETAIL, "--no-wait")

    assert len(fake.runs) == 2


def test_who_stops_waiting_is_told_that_the_run_goes_on(perennial, fake, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remote.KfpLauncher, "_pause", interrupted)

    code, out, err = perennial("runs", "submit", RETAIL)

    assert code == 130
    assert "the run goes on" in out
    assert not [r for r in fake.requests if r.endswith(":terminate")]


def test_the_status_of_a_run_shows_its_steps(perennial, fake):
    fake.plan["validate"] = ["hang"]
    perennial("runs", "submit", RETAIL, "--no-wait")
    (run,) = fake.runs
    for _ in range(5):
        perennial("runs", "status", run)

    code, out, _ = perennial("runs", "status", run[:8])
    _, plain, _ = perennial("runs", "status", run[:8], "--json")

    lines = [line.split() for line in out.splitlines()]
    assert code == 0
    assert lines[0][:2] == ["run", run] and lines[0][-1] == "RUNNING"
    assert lines[2:] == [["ingest", "SUCCEEDED", "12"], ["validate", "RUNNING", "-"]]
    assert [s["step"] for s in json.loads(plain)["steps"]] == ["ingest", "validate"]
    assert json.loads(plain)["finished_at"] is None


def test_runs_are_listed_from_where_the_ledger_is_out_of_reach(perennial, fake):
    nothing = perennial("runs", "list")
    perennial("runs", "submit", RETAIL)
    perennial("runs", "submit", RETAIL, "--no-wait")
    done, newest = fake.runs

    _, out, _ = perennial("runs", "list")
    _, ours, _ = perennial("runs", "list", "--project", RETAIL, "--json")
    _, others, _ = perennial("runs", "list", "--project", str(ROOT / "examples" / "bank"), "--json")

    assert nothing[1] == "nothing yet\n"
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[1:] for row in rows] == [
        ["PENDING", "retail", newest],
        ["SUCCEEDED", "retail", done],
    ]
    assert [r["run"] for r in json.loads(ours)] == [newest, done]
    assert json.loads(others) == []


def test_the_logs_of_all_steps_or_of_one_are_shown(perennial, fake):
    fake.plan["validate"] = ["ValueError: a hole in the table"]
    perennial("runs", "submit", RETAIL)
    (run,) = fake.runs

    _, everything, _ = perennial("runs", "logs", run)
    _, one, _ = perennial("runs", "logs", run, "--step", "validate")
    code, _, err = perennial("runs", "logs", run, "--step", "trian")

    assert "== ingest: SUCCEEDED" in everything
    assert "ValueError: a hole in the table" in one
    assert "== " not in one
    assert code == 2
    assert "has no step 'trian'; it has ingest, validate, notify" in err


def test_a_failed_run_is_resumed_where_it_failed(perennial, fake):
    fake.plan["train"] = ["ValueError: no", "ok"]
    perennial("runs", "submit", RETAIL)
    (run,) = fake.runs

    code, out, _ = perennial("runs", "retry", run[:6])

    assert code == 0
    assert out.splitlines()[0] == f"run {run} goes on at train"
    assert out.splitlines()[-1] == f"retail: run {run} succeeded"
    assert fake.runs[run].attempts == 2


def test_a_run_that_succeeded_is_not_resumed(perennial, fake):
    perennial("runs", "submit", RETAIL)
    (run,) = fake.runs

    code, _, err = perennial("runs", "retry", run)

    assert code == 2
    assert "Workflow must be Failed/Error to retry" in err
    assert len(err.splitlines()) == 1


def test_a_run_is_terminated(perennial, fake):
    perennial("runs", "submit", RETAIL, "--no-wait")
    (run,) = fake.runs

    code, out, _ = perennial("runs", "terminate", run)

    assert code == 0
    assert "is told to end; the backend will call it FAILED" in out
    assert fake.runs[run].run.state == "CANCELING"


def test_a_pipeline_is_uploaded_once_under_a_name_that_follows_its_text(perennial, fake):
    first = perennial("pipeline", "upload")
    again = perennial("pipeline", "upload")

    (version,) = fake.versions.values()
    assert first[1] == f"training version {version.name} uploaded to {fake.host}\n"
    assert again[1] == f"training version {version.name} is there already, at {fake.host}\n"
    assert version.name.startswith("0.1.0-")


@pytest.mark.slow
def test_what_is_uploaded_is_compiled_for_this_clusters_settings(perennial, fake, monkeypatch):
    perennial("pipeline", "upload")
    monkeypatch.setenv("PERENNIAL_IMAGE", "registry.local/perennial:9-python3.11")
    perennial("pipeline", "upload")

    here, there = fake.versions.values()
    executors = there.pipeline_spec["pipeline_spec"]["deploymentSpec"]["executors"]
    images = {e["container"]["image"] for e in executors.values()}
    assert images == {"registry.local/perennial:9-python3.11"}
    assert here.name != there.name


def test_a_schedule_is_made_kept_and_removed(perennial, fake):
    made = perennial("pipeline", "schedule", RETAIL, "--cron", "0 30 3 * * *")
    kept = perennial("pipeline", "schedule", RETAIL, "--cron", "0 30 3 * * *")
    (recurring,) = fake.recurring.values()
    removed = perennial("pipeline", "schedule", RETAIL, "--off")
    nothing = perennial("pipeline", "schedule", RETAIL, "--off")

    assert "retail: schedule made (" in made[1] and "03:30 UTC" in made[1]
    assert "retail: schedule unchanged (" in kept[1]
    assert recurring.runtime_config.parameters == {
        "project": "projects/retail.yaml",
        "trigger": "schedule",
    }
    assert "retail: schedule removed" in removed[1]
    assert fake.recurring == {}
    assert "there was no schedule" in nothing[1]


def test_a_wrong_schedule_is_told_before_the_backend_is_asked(perennial, fake):
    code, _, err = perennial("pipeline", "schedule", RETAIL, "--cron", "*/1 * * * *")

    assert code == 2
    assert "KFP would take the first for seconds" in err
    assert fake.requests == []


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("runs", "status", "0" * 36), 2, "Run 000"),
        (("runs", "status", "zz"), 2, "no run begins with 'zz'"),
        (("runs", "submit", "nowhere"), 2, "no project.yaml in 'nowhere'"),
        (("runs", "submit", RETAIL, "--as-of", "soon"), 2, "--as-of is 'soon'"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_line_with_its_exit_code(perennial, args, code, says):
    given, out, err = perennial(*args)

    assert given == code
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [("runs", "submit", RETAIL), ("runs", "status", "x"), ("pipeline", "upload")],
    ids=" ".join,
)
def test_a_backend_that_is_away_is_one_line_and_exit_code_3(perennial, fake, args):
    fake.down = True

    code, _, err = perennial(*args)

    assert code == 3
    assert "does not answer" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("launcher", "args", "says"),
    [
        ("local", ("runs", "submit", RETAIL, "--no-wait"), "leave out --no-wait"),
        ("local", ("runs", "retry", "x"), "only a KFP backend resumes"),
        ("local", ("runs", "terminate", "x"), "ends with its command"),
        ("job", ("runs", "retry", "x"), "only a KFP backend resumes"),
        ("local", ("runs", "logs", "x", "--project", RETAIL), "nothing is known yet of retail"),
    ],
)
def test_what_a_launcher_cannot_do_is_told_with_what_to_do(
    perennial, monkeypatch, launcher, args, says
):
    monkeypatch.setenv("PERENNIAL_LAUNCHER", launcher)

    code, _, err = perennial(*args)

    assert code == 2
    assert says in err


def test_the_log_of_a_run_on_this_machine_is_its_file(perennial, settings, monkeypatch):
    monkeypatch.setenv("PERENNIAL_LAUNCHER", "local")
    state = settings.state("retail")
    body = {"run": "abc-1", "trigger": "by hand 20261121T120000", "as_of": "2011-09-01"}
    Ledger(make_engine(state.url)).append(
        "run.started", project="retail", subject="abc-1", body=body, now=datetime.now(UTC)
    )
    state.logs.mkdir(parents=True)
    (state.logs / "run-by-hand-20261121T120000.log").write_text("Executing task\n")

    code, out, err = perennial("runs", "logs", "abc", "--project", RETAIL)
    wrong = perennial("runs", "logs", "abc", "--project", RETAIL, "--step", "train")

    assert (code, out, err) == (0, "Executing task\n", "")
    assert wrong[0] == 2 and "leave out --step" in wrong[2]
