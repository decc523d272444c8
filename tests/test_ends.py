"""A run that nobody follows gives its lease back when it is over, whoever sees it first."""

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import retraining as loop
from kfp_backend import FakeKfp, serving
from launchers import eventually
from lightkube.resources.batch_v1 import Job
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from perennial import cli, kube
from perennial.errors import Unavailable
from perennial.ledger import Ledger
from perennial.retrain import ends, job, remote
from perennial.retrain import runs as service_runs
from perennial.retrain import worker as workers
from perennial.retrain.inbox import Inbox
from perennial.retrain.launchers import RunRequest
from perennial.retrain.remote import KfpLauncher
from perennial.retrain.runs import Runs
from perennial.retrain.worker import Worker
from perennial.settings import Settings
from perennial.steps.context import lease_of_runs
from perennial.store import lease
from perennial.store.engine import make_engine
from perennial.store.tables import leases

ROOT = Path(__file__).resolve().parents[1]
RETAIL = str(ROOT / "examples" / "retail")
RUN = job.run_id("churn", "event 1")
HOUR = 3600.0


@pytest.fixture
def cluster(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a pod, of a command in it too."""
    monkeypatch.setenv("PERENNIAL_STATE_URL", f"sqlite:///{tmp_path}/db/state.db")
    return Settings.load()


@pytest.fixture
def state(cluster: Settings) -> Iterator[Engine]:
    engine = make_engine(cluster.state_url)
    yield engine
    engine.dispose()


def held(engine: Engine, run: str, project: str = "churn") -> None:
    """What the first step of a run did."""
    lease.hold(engine, lease_of_runs(project), run, HOUR, time.time())


def holder(engine: Engine, project: str = "churn") -> str | None:
    return lease.holder(engine, lease_of_runs(project), time.time())


def told(engine: Engine, project: str = "churn") -> list[str]:
    """How runs ended, by the ledger."""
    found = Ledger(engine).entries(project, "run.finished")
    return [f"{e.body['state']}: {e.body['reason']}" for e in found]


class Api:
    """An API server that knows at most one Job, and no pod."""

    def __init__(self, status: dict[str, Any] | None) -> None:
        self._status = status
        self.away = False

    def get(self, _kind: type, name: str, namespace: str | None = None) -> Job:
        if self.away:
            raise Unavailable("the API server does not answer")
        if self._status is None:
            raise missing()
        return Job.from_dict({"metadata": {"name": name}, "status": self._status})

    def list(self, _kind: type, labels: object = None) -> list[object]:
        return []


def missing() -> Exception:
    from lightkube.models.meta_v1 import Status

    exc = kube.ApiError.__new__(kube.ApiError)
    exc.status = Status(code=404, message="not found")
    return exc


def condition(kind: str, reason: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True", "reason": reason}]}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (condition("Failed", "BackoffLimitExceeded"), "its Job failed: BackoffLimitExceeded"),
        (condition("Failed", "DeadlineExceeded"), "it was ended after 7200 s"),
        (None, "its Job was deleted"),
    ],
    ids=["its pods died", "its deadline passed", "it was deleted"],
)
def test_a_job_that_ended_without_a_word_gives_its_lease_back_and_its_end_is_told(
    cluster, state, status, reason
):
    launcher = job.JobLauncher(cluster, Api(status))  # type: ignore[arg-type]
    held(state, RUN)

    assert ends.settle(state, "churn", launcher.is_over, time.time())

    assert holder(state) is None
    assert [words.startswith(f"failed: {reason}") for words in told(state)] == [True]


def test_a_job_that_told_its_end_itself_is_not_told_again(cluster, state):
    launcher = job.JobLauncher(cluster, Api(condition("Complete")))  # type: ignore[arg-type]
    held(state, RUN)
    body = {"run": RUN, "state": "succeeded", "reason": "fine"}
    now = datetime.now(UTC)
    Ledger(state).append("run.finished", project="churn", subject=RUN, body=body, now=now)

    assert ends.settle(state, "churn", launcher.is_over, time.time())

    assert (holder(state), told(state)) == (None, ["succeeded: fine"])


def test_a_job_that_goes_on_keeps_its_lease(cluster, state):
    launcher = job.JobLauncher(cluster, Api({"active": 1}))  # type: ignore[arg-type]
    held(state, RUN)

    assert not ends.settle(state, "churn", launcher.is_over, time.time())
    assert (holder(state), told(state)) == (RUN, [])


@pytest.mark.parametrize("name", ["event-1", "by hand 20260101T000000", "tiny-0123456789ab"])
def test_what_is_no_run_of_this_launcher_keeps_its_lease(cluster, state, name):
    launcher = job.JobLauncher(cluster, Api(None))  # type: ignore[arg-type]
    held(state, name)

    assert not ends.settle(state, "churn", launcher.is_over, time.time())
    assert holder(state) == name


def test_where_nobody_answers_the_lease_stays_and_nothing_breaks(cluster, state, caplog):
    api = Api(None)
    api.away = True
    held(state, RUN)

    assert not ends.settle(state, "churn", job.JobLauncher(cluster, api).is_over, time.time())  # type: ignore[arg-type]
    assert holder(state) == RUN
    assert "the API server does not answer" in caplog.text


def test_a_lease_that_another_took_meanwhile_is_left_to_it(engine):
    held(engine, "run-1")

    def is_over(_project: str, _run: str) -> bool:
        later = time.time() + 2 * HOUR
        lease.hold(engine, "run:churn", "run-2", HOUR, later)
        return True

    ends.settle(engine, "churn", is_over, time.time())

    assert holder(engine) == "run-2"


# A KFP backend.


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Iterator[FakeKfp]:
    monkeypatch.setattr(remote, "POLL_S", 0.001)
    with serving(FakeKfp()) as found:
        monkeypatch.setenv("PERENNIAL_LAUNCHER", "kfp")
        monkeypatch.setenv("PERENNIAL_KFP_ENDPOINT", found.host)
        yield found


def begun(launcher: KfpLauncher, fake: FakeKfp, state: Engine) -> str:
    """A run that nobody follows, and which took the lease in its first step."""
    fake.acts["ingest"] = lambda run: held(state, run.id, "retail")
    return launcher.submit(RunRequest(Path(RETAIL)))


def ended(launcher: KfpLauncher, run: str) -> None:
    """Let the engine work until the run is over."""
    while not launcher.backend.run(run).ended:
        pass


def settled(state: Engine, launcher: KfpLauncher, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What a second look gives, as long after the first as it must be."""
    monkeypatch.setattr(ends, "AGAIN_S", 0.0)
    ends.settle(state, "retail", launcher.is_over, time.time())
    return ends.settle(state, "retail", launcher.is_over, time.time())


Damage = Callable[[FakeKfp, KfpLauncher, str], None]


def dies(fake: FakeKfp, launcher: KfpLauncher, run: str) -> None:
    fake.runs[run].plan["train"] = ["killed"]
    ended(launcher, run)


def is_terminated(fake: FakeKfp, launcher: KfpLauncher, run: str) -> None:
    fake.runs[run].plan["train"] = ["hang"]
    while "train" not in fake.runs[run].done:
        launcher.backend.run(run)
    launcher.backend.terminate(run)
    ended(launcher, run)


def dies_again(fake: FakeKfp, launcher: KfpLauncher, run: str) -> None:
    dies(fake, launcher, run)
    launcher.backend.retry(run)
    ended(launcher, run)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (dies, "step train failed: it ended without a word"),
        (is_terminated, "the run was terminated"),
        (dies_again, "step train failed: it ended without a word"),
    ],
)
def test_a_backends_run_that_failed_unseen_gives_its_lease_back(
    cluster, state, fake, monkeypatch, damage: Damage, reason
):
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    damage(fake, launcher, run)
    assert holder(state, "retail") == run

    assert settled(state, launcher, monkeypatch)

    assert holder(state, "retail") is None
    assert [words.startswith(f"failed: {reason}") for words in told(state, "retail")] == [True]


def test_a_run_whose_follower_is_about_to_resume_it_is_not_given_up(cluster, state, fake):
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    dies(fake, launcher, run)

    looks = [ends.settle(state, "retail", launcher.is_over, time.time()) for _ in range(3)]

    assert looks == [False] * 3
    assert (holder(state, "retail"), told(state, "retail")) == (run, [])


def test_each_failure_of_a_resumed_run_is_looked_at_twice(cluster, state, fake, monkeypatch):
    monkeypatch.setattr(ends, "AGAIN_S", 0.0)
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    fake.runs[run].plan["train"] = ["killed", "killed"]
    ended(launcher, run)

    first = ends.settle(state, "retail", launcher.is_over, time.time())
    launcher.backend.retry(run)
    ended(launcher, run)
    second = [ends.settle(state, "retail", launcher.is_over, time.time()) for _ in range(2)]

    assert (first, second) == (False, [False, True])


def test_looks_at_ends_of_runs_are_forgotten_after_a_week_and_nothing_else_is(engine):
    week = 7 * 24 * HOUR
    lease.acquire(engine, "run:churn", "run-1", HOUR, now=0.0)
    ends.is_seen_again(engine, "old", now=0.0)
    ends.is_seen_again(engine, "late", now=week)

    again = ends.is_seen_again(engine, "late", now=week + HOUR)

    with engine.connect() as connection:
        kept = sorted(connection.execute(select(leases.c.name)).scalars())
    assert kept == ["ended:late", "run:churn"]
    assert again, "what is young still counts"


def test_a_run_that_nobody_resumes_is_over_at_the_first_look(cluster, state, fake):
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    is_terminated(fake, launcher, run)

    assert ends.settle(state, "retail", launcher.is_over, time.time())


def test_a_backends_run_that_was_resumed_and_succeeded_unseen_is_told_so(
    cluster, state, fake, monkeypatch
):
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    dies(fake, launcher, run)
    settled(state, launcher, monkeypatch)
    fake.runs[run].plan = {}
    launcher.backend.retry(run)
    ended(launcher, run)
    held(state, run, "retail")

    assert ends.settle(state, "retail", launcher.is_over, time.time())

    assert holder(state, "retail") is None
    assert [words.split(":")[0] for words in told(state, "retail")] == ["failed", "succeeded"]


def test_a_resumed_run_keeps_its_lease_though_the_ledger_knows_an_end(
    cluster, state, fake, monkeypatch
):
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    dies(fake, launcher, run)
    settled(state, launcher, monkeypatch)
    fake.runs[run].plan["train"] = ["hang"]
    launcher.backend.retry(run)
    held(state, run, "retail")

    assert not ends.settle(state, "retail", launcher.is_over, time.time())
    assert holder(state, "retail") == run


@pytest.mark.parametrize("name", ["event-1", "00000000-0000-4000-8000-000000000000"])
def test_what_the_backend_does_not_know_keeps_its_lease(cluster, state, fake, name):
    held(state, name, "retail")

    launcher = KfpLauncher(Settings.load())
    assert not ends.settle(state, "retail", launcher.is_over, time.time())
    assert holder(state, "retail") == name


@pytest.mark.parametrize(
    "words",
    [("list", "--project", RETAIL), ("status", "{run}"), ("submit", RETAIL, "--no-wait")],
    ids=["list", "status", "submit"],
)
def test_a_command_that_sees_the_end_again_lets_the_lease_go(
    cluster, state, fake, monkeypatch, words
):
    monkeypatch.setattr(ends, "AGAIN_S", 0.0)
    launcher = KfpLauncher(Settings.load())
    run = begun(launcher, fake, state)
    dies(fake, launcher, run)
    typed = ["runs", *(word.format(run=run) for word in words)]

    assert cli.main(typed) == 0
    assert holder(state, "retail") == run
    assert cli.main(typed) == 0
    assert holder(state, "retail") is None


# The retraining service.


@pytest.fixture
def making(engine: Engine) -> Callable[..., Runs]:
    def make(is_over: ends.IsOver) -> Runs:
        launcher = loop.FakeLauncher(Ledger(engine))
        return Runs("churn", engine, launcher, lambda: datetime.now(UTC), is_over=is_over)

    return make


def test_the_service_decides_as_if_a_run_that_is_over_were_not_there(engine, making):
    held(engine, "run-1")
    over = [False]
    runs = making(lambda _project, _run: over[0])

    before = runs.is_held()
    over[0] = True

    assert (before, runs.is_held(), holder(engine)) == (True, False, None)


def test_the_service_begins_a_run_when_the_one_before_it_is_over(engine, making):
    held(engine, "run-1")

    assert making(lambda _project, _run: True).once("event-1", loop.START) == "succeeded"


def test_the_service_looks_seldom_at_a_run_that_goes_on(engine, making, monkeypatch):
    held(engine, "run-1")
    asked = []
    runs = making(lambda _project, run: bool(asked.append(run)))

    for _ in range(5):
        runs.settle()
    monkeypatch.setattr(service_runs, "SETTLE_S", -1.0)
    runs.settle()

    assert asked == ["run-1", "run-1"]


def test_a_service_without_events_lets_the_lease_of_a_run_go_that_is_over(engine, making):
    held(engine, "run-1")
    runs = making(lambda _project, _run: True)
    box = Inbox(engine)
    worker = Worker(loop.project(), engine, box, runs, loop.drifted_up_to, lambda: loop.START)

    worker.start()
    freed = eventually(lambda: holder(engine) is None)
    worker.stop()

    assert freed


@pytest.mark.parametrize(
    "fault",
    [
        Unavailable("the state database cannot be used now"),
        OperationalError("select", {}, Exception("the state database cannot be used now")),
    ],
    ids=["as PostgreSQL's is told", "as SQLite's is told"],
)
def test_a_service_outlives_a_database_that_answers_no_question_about_leases_for_a_while(
    engine, making, monkeypatch, caplog, fault
):
    held(engine, "run-1")
    looks = []

    def away_at_first(*asked: Any) -> str | None:
        looks.append(asked)
        if len(looks) <= 3:
            raise fault
        return lease.holder(*asked)

    monkeypatch.setattr(ends, "lease", SimpleNamespace(holder=away_at_first, let_go=lease.let_go))
    monkeypatch.setattr(workers, "_RETRY_S", 0.01)
    runs = making(lambda _project, _run: True)
    box = Inbox(engine)
    worker = Worker(loop.project(), engine, box, runs, loop.drifted_up_to, lambda: loop.START)

    worker.start()
    freed = eventually(lambda: holder(engine) is None, seconds=10)
    alive = worker.alive
    worker.stop()

    assert (freed, alive) == (True, True)
    said = [r.getMessage() for r in caplog.records if "cannot be used now" in r.getMessage()]
    assert len(said) == 1
