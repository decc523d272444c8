"""What a step finds when it starts: its project, and whether its run may go on."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from perennial.errors import BadInput, RunFailed
from perennial.ledger import Ledger
from perennial.settings import Settings
from perennial.steps import context, notify
from perennial.store import lease
from perennial.store.engine import make_engine
from tests import tiny


@pytest.fixture
def project(tmp_path: Path) -> str:
    return str(tiny.project_file(tmp_path))


def holder(settings: Settings) -> str | None:
    engine = make_engine(settings.state("tiny").url)
    return lease.holder(engine, "run:tiny", datetime.now(UTC).timestamp())


def test_a_project_may_be_one_file_and_its_folder_is_where_that_lies(settings, project):
    with context.opened("train", project, "run-1") as ctx:
        seen = ctx.project.name, ctx.folder

    assert seen == ("tiny", Path(project).parent)


def test_a_yaml_that_is_missing_is_told():
    with pytest.raises(BadInput, match=r"no project.yaml in 'projects/nothing.yaml'"):
        context.find(Settings.load({}), "projects/nothing.yaml")


@pytest.mark.parametrize(
    ("baked", "dirty"), [("046f44a", False), ("046f44a-dirty", True)], ids=["clean", "dirty"]
)
def test_an_image_tells_its_commit_and_whether_files_differed_from_it(baked, dirty):
    settings = Settings.load({"PERENNIAL_CODE_COMMIT": baked})

    assert context.code_state(settings) == ("046f44a", dirty)


def test_a_run_that_nobody_launched_holds_the_lease_from_its_first_step_to_its_end(
    settings, project
):
    with context.opened("ingest", project, "run-1", trigger="by hand"):
        pass
    between = holder(settings)
    with context.opened("notify", project, "run-1") as ctx:
        notify.notify(ctx, "SUCCEEDED", "")

    assert (between, holder(settings)) == ("run-1", None)


def test_a_second_run_fails_at_its_first_step_and_names_the_one_that_goes_on(settings, project):
    with context.opened("ingest", project, "run-1", trigger="by hand"):
        pass

    with (
        pytest.raises(RunFailed, match=r"another run of tiny goes on \(run-1\)"),
        context.opened("ingest", project, "run-2", trigger="by hand"),
    ):
        pytest.fail("the second run went on")

    told = Ledger(make_engine(settings.state("tiny").url)).entries("tiny", context.FAILED, "run-2")
    assert len(told) == 1
    assert holder(settings) == "run-1"


def test_the_end_of_a_refused_run_does_not_give_away_the_lease_of_the_other(settings, project):
    with context.opened("ingest", project, "run-1", trigger="by hand"):
        pass

    with context.opened("notify", project, "run-2") as ctx:
        notify.notify(ctx, "FAILED", "")

    assert holder(settings) == "run-1"


def test_a_run_whose_launcher_holds_the_lease_goes_on_under_it(settings, project):
    engine = make_engine(settings.state("tiny").url)
    lease.acquire(engine, "run:tiny", "event-1", 60.0, datetime.now(UTC).timestamp())

    with context.opened("ingest", project, "run-1", trigger="event-1"):
        pass

    assert holder(settings) == "event-1"


def test_the_next_step_takes_the_lease_over_when_the_launcher_fell_silent(settings, project):
    engine = make_engine(settings.state("tiny").url)
    lease.acquire(engine, "run:tiny", "event-1", 0.01, datetime.now(UTC).timestamp() - 1)

    with context.opened("train", project, "run-1"):
        pass

    assert holder(settings) == "run-1"


def started(settings: Settings, run: str, trigger: str) -> Ledger:
    ledger = Ledger(make_engine(settings.state("tiny").url))
    body = {"run": run, "trigger": trigger}
    now = datetime.now(UTC)
    ledger.append("run.started", project="tiny", subject=run, body=body, now=now)
    return ledger


def test_a_copy_of_a_run_that_goes_on_does_not_pass_for_it(settings, project):
    started(settings, "run-1", "event-1")
    engine = make_engine(settings.state("tiny").url)
    lease.acquire(engine, "run:tiny", "event-1", 60.0, datetime.now(UTC).timestamp())

    with (
        pytest.raises(RunFailed, match=r"another run of tiny goes on \(run-1\)"),
        context.opened("ingest", project, "run-2", trigger="event-1"),
    ):
        pytest.fail("the copy went on")


def test_how_the_other_runs_of_a_trigger_ended(settings):
    ledger = started(settings, "run-1", "event-1")
    for run in ("run-2", "run-3"):
        started(settings, run, "event-1")
    body = {"run": "run-2", "state": "failed", "reason": ""}
    now = datetime.now(UTC)
    ledger.append("run.finished", project="tiny", subject="run-2", body=body, now=now)

    assert context.ends(ledger, "tiny", "run-3", "event-1") == {"run-1": None, "run-2": "failed"}
    assert context.ends(ledger, "tiny", "run-3", "") == {}
