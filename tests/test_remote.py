"""A run on a KFP backend ends with a result or a reason, and is found again by whoever asks."""

import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from kfp_backend import STEPS, Answer, FakeKfp, acts, failing, serving

from perennial.errors import RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.retrain import remote
from perennial.retrain.backend import read_spec
from perennial.retrain.launchers import RunRequest, RunResult
from perennial.retrain.remote import KfpLauncher
from perennial.settings import Settings
from perennial.steps import context
from perennial.store import lease
from perennial.store.engine import make_engine

ROOT = Path(__file__).resolve().parents[1]
SPEC = (ROOT / "pipelines" / "training.yaml").read_text()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "POLL_S", 0.001)


@pytest.fixture
def fake() -> Iterator[FakeKfp]:
    with serving(FakeKfp()) as found:
        yield found


@pytest.fixture
def cluster(settings: Settings, fake: FakeKfp, tmp_path: Path) -> Settings:
    """Settings of a pod beside the backend: the ledger is where the steps write it too."""
    (tmp_path / "db").mkdir()
    given = {"kfp_endpoint": fake.host, "state_url": f"sqlite:///{tmp_path / 'db' / 'state.db'}"}
    return settings.model_copy(update=given)


@pytest.fixture
def laptop(settings: Settings, fake: FakeKfp) -> Settings:
    """Settings of a machine that reaches the backend and not the database."""
    return settings.model_copy(update={"kfp_endpoint": fake.host})


@pytest.fixture
def ledger(cluster: Settings, fake: FakeKfp) -> Ledger:
    """The ledger that the fake's steps write to, as ours do."""
    found = Ledger(make_engine(cluster.state_url))
    fake.acts |= acts(found)
    return found


def launching(settings: Settings, **more: float) -> KfpLauncher:
    return KfpLauncher(settings, SPEC, **more)


def request(key: str = "event 1") -> RunRequest:
    return RunRequest(ROOT / "examples" / "retail", trigger="event 1", key=key)


def test_a_run_that_ends_well_gives_its_id_and_tells_its_steps(cluster, fake, ledger):
    told: list[str] = []

    result = launching(cluster).run(request(), progress=told.append)

    (run,) = fake.runs.values()
    assert result == RunResult(run.id, "succeeded", "all 1 limits kept")
    assert told == [*STEPS, "notify"]
    (finished,) = ledger.entries("retail", "run.finished")
    assert finished.subject == run.id


def test_the_backend_is_told_project_parameters_and_account(cluster, fake):
    as_of = datetime(2011, 9, 1, tzinfo=UTC)
    asked = RunRequest(
        ROOT / "examples" / "retail", source="s3://x", as_of=as_of, trigger="e", trials=3, seed=7
    )

    launching(cluster).submit(asked)

    (run,) = fake.runs.values()
    assert run.parameters == {
        "project": "projects/retail.yaml",
        "source": "s3://x",
        "as_of": "2011-09-01T00:00:00+00:00",
        "trials": 3,
        "seed": 7,
        "trigger": "e",
    }
    assert run.run.service_account == "pipeline-run"
    assert run.run.pipeline_spec == read_spec(SPEC)
    (experiment,) = fake.experiments.values()
    assert experiment.display_name == "retail"


def test_the_same_key_finds_the_run_again_and_another_key_does_not(cluster, fake, ledger):
    first = launching(cluster).run(request("event 1"))

    again = launching(cluster).run(request("event 1"))
    other = launching(cluster).run(request("event 2"))

    assert again == first
    assert other.run != first.run
    assert len(fake.runs) == 2


def test_a_run_is_waited_for_that_outlived_whoever_started_it(cluster, fake, ledger):
    fake.plan["train"] = ["hang"]
    launcher = launching(cluster)
    caught: list[Exception] = []

    def wait() -> None:
        with pytest.raises(RunFailed, match="nobody waits for run") as told:
            launcher.run(request())
        caught.append(told.value)

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not fake.runs or "train" not in next(iter(fake.runs.values())).done:
        pass
    launcher.stop()
    waiting.join(10)
    (run,) = fake.runs.values()
    assert caught and run.run.state == "RUNNING"

    run.plan = {}
    assert launching(cluster).run(request()).run == run.id
    assert f"POST /apis/v2beta1/runs/{run.id}:terminate" not in fake.requests


def test_what_a_step_said_in_the_ledger_is_the_reason_and_is_final(cluster, fake, ledger):
    fake.plan["train"] = ["killed"]
    fake.acts["train"] = failing(ledger, "row 17: churned is 2, expected 0 or 1")

    with pytest.raises(RunFailed, match="row 17: churned is 2, expected 0 or 1"):
        launching(cluster).run(request())

    assert not [r for r in fake.requests if r.endswith(":retry")]
    (end,) = ledger.entries("retail", "run.finished")
    assert end.body["reason"] == "train: row 17: churned is 2, expected 0 or 1"


def test_without_a_ledger_the_log_tells_what_a_step_said(laptop, fake):
    fake.plan["train"] = ["perennial.errors.BadInput: row 17: churned is 2"]

    with pytest.raises(RunFailed, match="step train failed: row 17: churned is 2; the run is "):
        launching(laptop).run(request())

    assert not [r for r in fake.requests if r.endswith(":retry")]
    assert not laptop.home.exists()


def test_a_step_that_ended_without_a_word_is_resumed_where_it_failed(cluster, fake, ledger):
    fake.plan["train"] = ["killed", "killed", "ok"]

    result = launching(cluster).run(request())

    (run,) = fake.runs.values()
    assert result == RunResult(run.id, "succeeded", "all 1 limits kept")
    assert run.attempts == 3
    # The steps before it were not made again.
    assert len(ledger.entries("retail", "run.started")) == 1
    # The exit handler told of the failure once and is not run again: we tell the end.
    ends = [e.body["state"] for e in ledger.entries("retail", "run.finished")]
    assert ends == ["failed", "succeeded"]


def test_a_run_that_was_resumed_lets_its_lease_go_at_its_end(cluster, fake, ledger):
    engine, name = ledger._engine, context.lease_of_runs("retail")
    fake.plan["train"] = ["killed", "ok"]
    fake.acts["train"] = lambda run: lease.hold(engine, name, run.id, 3600, time.time())

    launching(cluster).run(request())

    assert lease.holder(engine, name, time.time()) is None


def test_it_is_resumed_twice_and_then_told(cluster, fake, ledger):
    fake.plan["train"] = ["killed"]

    with pytest.raises(RunFailed, match="step train failed: it ended without a word"):
        launching(cluster).run(request())

    (run,) = fake.runs.values()
    assert run.attempts == 3
    # The exit handler knew no reason; the ledger has one all the same.
    *_, last = ledger.entries("retail", "run.finished")
    assert last.body["reason"].startswith("step train failed: it ended without a word")


def test_on_a_laptop_too_the_step_is_named_that_ended_without_a_word(laptop, fake):
    fake.plan["train"] = ["killed"]
    once = laptop.model_copy(update={"kfp_retries": 0})

    with pytest.raises(RunFailed, match="step train failed: it ended without a word"):
        launching(once).run(request())


def test_a_terminated_run_is_told_as_such_and_not_resumed(laptop, fake):
    fake.plan["train"] = ["hang"]
    launcher = launching(laptop)
    run = launcher.submit(request())
    while "train" not in fake.runs[run].done:
        launcher.backend.run(run)

    launcher.backend.terminate(run)

    with pytest.raises(RunFailed, match="the run was terminated"):
        launcher.follow("retail", run)
    assert fake.runs[run].attempts == 1


def test_a_run_that_never_ends_is_terminated_at_its_deadline(cluster, fake, ledger):
    """A missing image leaves a run RUNNING for ever."""
    fake.plan["train"] = ["hang"]
    impatient = cluster.model_copy(update={"run_deadline_s": 0})

    with pytest.raises(RunFailed, match="the run was not over after 0 s, at no step yet"):
        launching(impatient).run(request())

    (run,) = fake.runs.values()
    assert run.run.state == "CANCELING"
    assert ledger.entries("retail", "run.finished")[0].body["state"] == "failed"


def test_a_backend_that_is_away_for_a_moment_is_borne(cluster, fake, ledger):
    launcher = launching(cluster, patience_s=30)
    run = launcher.submit(request())
    fake.down = True
    threading.Timer(0.3, lambda: setattr(fake, "down", False)).start()

    assert launcher.follow("retail", run).state == "succeeded"


def silent_once(fake: FakeKfp, monkeypatch: pytest.MonkeyPatch, route: str, *, late: bool) -> None:
    """The next request of a route gets no answer; if ``late``, it had its effect all the same."""
    really = getattr(fake, route)

    def asked(*args: str) -> object:
        monkeypatch.setattr(fake, route, really)
        if late:
            really(*args)
        raise Answer(503, "no healthy upstream")

    monkeypatch.setattr(fake, route, asked)


@pytest.mark.parametrize(
    ("route", "late"),
    [("get_log", False), ("post_retry", False), ("post_retry", True)],
    ids=["when asked for a log", "when asked to resume", "after it resumed"],
)
def test_a_run_is_resumed_though_the_backend_was_away_for_a_moment(
    cluster, fake, ledger, monkeypatch, route, late
):
    fake.plan["train"] = ["killed", "ok"]
    once = cluster.model_copy(update={"kfp_retries": 1})
    silent_once(fake, monkeypatch, route, late=late)

    assert launching(once).run(request()).state == "succeeded"

    (run,) = fake.runs.values()
    assert run.attempts == 2


def test_a_resuming_that_nobody_answered_counts_as_one(cluster, fake, ledger, monkeypatch):
    fake.plan["train"] = ["killed"]
    once = cluster.model_copy(update={"kfp_retries": 1})
    silent_once(fake, monkeypatch, "post_retry", late=True)

    with pytest.raises(RunFailed, match="step train failed: it ended without a word"):
        launching(once).run(request())

    (run,) = fake.runs.values()
    assert run.attempts == 2


def test_a_run_that_cannot_be_resumed_now_is_not_told_as_failed(cluster, fake, ledger, monkeypatch):
    fake.plan["train"] = ["killed"]
    silent_once(fake, monkeypatch, "post_retry", late=False)

    with pytest.raises(Unavailable, match="no healthy upstream"):
        launching(cluster, patience_s=-1).run(request())


def test_a_refusal_to_resume_is_the_end(cluster, fake, ledger, monkeypatch):
    def refuse(*_: str) -> None:
        raise Answer(409, "Workflow must be Failed/Error to retry")

    fake.plan["train"] = ["killed"]
    monkeypatch.setattr(fake, "post_retry", refuse)

    with pytest.raises(RunFailed, match="step train failed: it ended without a word"):
        launching(cluster).run(request())

    assert len([r for r in fake.requests if r.endswith(":retry")]) == 1


def test_a_backend_that_stays_away_is_unavailable_and_the_run_is_left_alone(cluster, fake):
    launcher = launching(cluster, patience_s=0)
    run = launcher.submit(request())
    fake.down = True

    with pytest.raises(Unavailable, match="does not answer"):
        launcher.follow("retail", run)

    assert fake.runs[run].run.state == "PENDING"


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (
            "x\nperennial.errors.BadInput: no table\nF1121 12:00 main.go] exit status 1\n",
            "no table",
        ),
        ("ValueError: first\nKeyError: 'second'\n", "'second'"),
        ("I1121 12:00:00.0 1 launcher_v2.go:90] Execution: fine\n", ""),
        ("F1121 12:00:00.0 1 main.go:49] failed to execute component: signal: killed\n", ""),
        ("", ""),
    ],
    ids=["ours", "the last", "a word of kfp's", "killed", "nothing"],
)
def test_the_last_exception_of_a_log_is_found(log, said):
    assert remote.last_error(log) == said
