"""Who lost the lease of its work writes nothing more, however late it wakes up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import retraining as loop
import tiny
from sqlalchemy import Engine

from perennial import bundle
from perennial.errors import RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.records import Version
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Runs
from perennial.retrain.worker import Worker
from perennial.settings import Settings
from perennial.steps import context, deploy, ingest, notify, register
from perennial.steps.context import Context
from perennial.store import lease, rollouts, versions

LEASE, HOUR = "run:tiny", 3600.0
LOST = "the lease run:tiny went to .*; this one writes no more"
GATE = '{"candidate": "%s", "results": [{"passed": true, "reason": "fine"}]}'

Open = Callable[..., object]


@pytest.fixture
def project(tmp_path: Path) -> str:
    return str(tiny.project_file(tmp_path))


@pytest.fixture
def opened(
    settings: Settings, project: str, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> Open:
    """Opens steps of runs over each kind of database."""
    monkeypatch.setenv("PERENNIAL_STATE_URL", database_url)

    @contextmanager
    def open_step(step: str, run: str, trigger: str = "") -> Iterator[Context]:
        with context.opened(step, project, run, trigger) as ctx:
            yield ctx

    return open_step


@pytest.fixture
def book(engine: Engine) -> Ledger:
    return Ledger(engine)


def taken_over(engine: Engine, holder: str = "run-2") -> None:
    """Let another have the lease, as if that of the first had lapsed."""
    later = datetime.now(UTC).timestamp() + 100 * HOUR
    assert lease.acquire(engine, LEASE, holder, HOUR, later)


def began(ctx: Context, trigger: str = "by hand") -> None:
    """What the first step writes."""
    body = {"run": ctx.run, "trigger": trigger}
    ctx.ledger.append("run.started", project="tiny", subject=ctx.run, body=body, now=ctx.now)


def judged(folder: Path) -> Path:
    digest = tiny.bundle(folder)
    bundle.add_evidence(folder, "gate.json", GATE % digest)
    return folder


def append(ctx: Context, _folder: Path) -> None:
    ctx.ledger.append("gate", project="tiny", subject=ctx.run, body={}, now=ctx.now)


def begin(ctx: Context, folder: Path) -> None:
    tiny.rows(20).to_csv(folder / "rows.csv", index=False)
    ingest.ingest(
        ctx.settings,
        ctx.project,
        folder,
        str(folder / "rows.csv"),
        None,
        folder / "snapshot",
        run=ctx.run,
        trigger="by hand",
        now=ctx.now,
        guard=ctx.guard,
    )


def enter(ctx: Context, folder: Path) -> None:
    register.register(ctx, judged(folder / "late"))


def wish(ctx: Context, _folder: Path) -> None:
    versions.next_version(ctx.engine, "tiny", "sha256:1", "run-0", ctx.now)
    deploy.deploy(ctx, 1)


@pytest.mark.parametrize("write", [append, begin, enter, wish])
def test_a_step_whose_run_lost_its_lease_changes_nothing(opened, engine, book, tmp_path, write):
    with (
        pytest.raises(Unavailable, match=LOST.replace(".*", "run-2")),
        opened("any", "run-1", "by hand") as ctx,
    ):
        taken_over(engine)
        write(ctx, tmp_path)

    assert [entry.kind for entry in book.entries("tiny")] == [context.FAILED]
    assert len(versions.all_versions(engine, "tiny")) == (write is wish)
    assert rollouts.history(engine, "tiny") == []


@pytest.mark.parametrize("write", [append, begin, wish])
def test_a_step_whose_run_has_its_lease_still_writes(opened, engine, tmp_path, write):
    with opened("any", "run-1", "by hand") as ctx:
        write(ctx, tmp_path)

    assert Ledger(engine).entries("tiny")


def test_a_later_step_of_a_run_that_lost_its_lease_writes_nothing_but_its_end(opened, engine, book):
    with opened("ingest", "run-1", "by hand") as ctx:
        began(ctx)
    taken_over(engine)

    with pytest.raises(Unavailable, match=LOST), opened("gate", "run-1") as ctx:
        append(ctx, Path())
    with opened("notify", "run-1") as ctx:
        notify.notify(ctx, "FAILED", "")

    assert [e.kind for e in book.entries("tiny")] == ["run.started", context.FAILED, "run.finished"]
    later = datetime.now(UTC).timestamp() + 100 * HOUR
    assert lease.holder(engine, LEASE, later) == "run-2", "the other goes on"


def test_a_lost_lease_is_lost_also_when_the_other_run_is_over(opened, engine, book):
    with pytest.raises(Unavailable, match=LOST), opened("train", "run-1") as ctx:
        taken_over(engine)
        lease.let_go(engine, LEASE, "run-2")
        append(ctx, Path())

    assert [entry.kind for entry in book.entries("tiny")] == [context.FAILED]


def launched(engine: Engine, trigger: str, *, goes_on: bool, later_s: float = 0.0) -> int:
    """Take the lease as the retraining service does for a run of its own."""
    moment = datetime.now(UTC).timestamp() + later_s
    return lease.acquire(engine, LEASE, trigger, HOUR, moment, goes_on=goes_on) or 0


def test_a_run_goes_on_when_its_service_ended_and_another_copy_waits_for_it(opened, engine, book):
    number = launched(engine, "event-1", goes_on=True)
    with opened("ingest", "run-1", "event-1") as ctx:
        began(ctx, "event-1")
    with opened("train", "run-1") as ctx:
        lease.release(engine, LEASE, number)
        append(ctx, Path())
        launched(engine, "event-1", goes_on=True)
        append(ctx, Path())

    assert [entry.kind for entry in book.entries("tiny")] == ["run.started", "gate", "gate"]


def test_a_step_that_takes_the_lease_over_from_its_launcher_leaves_the_one_beside_it_its_right(
    opened, engine, book
):
    number = launched(engine, "event-1", goes_on=True)
    with opened("ingest", "run-1", "event-1") as ctx:
        began(ctx, "event-1")

    with opened("train", "run-1") as first:
        lease.release(engine, LEASE, number)
        with opened("evaluate", "run-1") as second:
            append(second, Path())
        append(first, Path())

    assert [entry.kind for entry in book.entries("tiny")] == ["run.started", "gate", "gate"]


def test_a_run_that_is_made_anew_shuts_the_first_one_out(opened, engine, book):
    launched(engine, "event-1", goes_on=False)
    with opened("ingest", "run-1", "event-1") as ctx:
        began(ctx, "event-1")
        launched(engine, "event-1", goes_on=False, later_s=2 * HOUR)
        with pytest.raises(Unavailable, match=LOST):
            append(ctx, Path())
    body = {"run": "run-1", "state": context.LOST, "reason": ""}
    now = datetime.now(UTC)
    book.append("run.finished", project="tiny", subject="run-1", body=body, now=now)

    with (
        pytest.raises(RunFailed, match="run run-1 was given up as lost"),
        opened("notify", "run-1") as ctx,
    ):
        notify.notify(ctx, "SUCCEEDED", "")

    ends = book.entries("tiny", "run.finished")
    assert [entry.body["state"] for entry in ends] == [context.LOST]


def test_a_service_that_lost_the_lease_of_a_run_does_not_tell_its_end(engine, book):
    launcher = loop.FakeLauncher(book)

    def overtaken() -> None:
        later = datetime.now(UTC).timestamp() + HOUR
        lease.acquire(engine, "run:churn", "another", HOUR, later)

    launcher.meanwhile = overtaken
    runs = Runs("churn", engine, launcher, lambda: datetime.now(UTC))

    with pytest.raises(Unavailable, match="the lease run:churn went to another"):
        runs.once("event-1", loop.START)

    assert book.entries("churn", "run.finished") == []


class Copies:
    """Two copies of the service's worker, of which the clock says whose turn it is."""

    def __init__(self, engine: Engine, meanwhile: Callable[[], None] = lambda: None) -> None:
        self.seconds = 100.0
        self.engine = engine
        self.inbox = Inbox(engine)
        self.launcher = loop.FakeLauncher(Ledger(engine), meanwhile=meanwhile)
        loop.serve(engine)
        self.first, self.second = (self._turn(name) for name in ("a", "b"))

    def _turn(self, holder: str) -> lease.Leader:
        return lease.Leader(self.engine, "retraining:churn", holder, 15.0, lambda: self.seconds)

    def worker(self, turn: lease.Leader, confirm=loop.drifted_up_to) -> Worker:
        def now() -> datetime:
            return datetime.now(UTC)

        runs = Runs("churn", self.engine, self.launcher, now, lease_s=0.2, beat=turn.keep)
        project = loop.project()
        leads, guard = turn.leads, turn.guard
        return Worker(project, self.engine, self.inbox, runs, confirm, now, leads, guard)

    def overtake(self) -> None:
        """The first one hangs for longer than its turn lasts."""
        self.seconds += 60
        assert self.second.leads()


def test_a_copy_that_hung_beyond_its_turn_records_no_decision(engine, book):
    copies = Copies(engine)

    def hangs(start: datetime) -> list[object]:
        copies.overtake()
        return loop.drifted_up_to(start)

    copies.inbox.put(loop.event(0))
    late = copies.worker(copies.first, hangs)

    with pytest.raises(Unavailable, match="another retraining:churn leads now"):
        late.step()

    assert [entry.kind for entry in book.entries("churn")] == ["event.received"]
    assert copies.inbox.counts() == {"pending": 1, "settled": 0, "dead": 0}
    assert copies.launcher.launched == []
    assert copies.worker(copies.second).step(), "the other one handles it"
    assert copies.inbox.counts()["settled"] == 1


def test_a_copy_that_hung_beyond_its_turn_sets_no_event_aside(engine, book):
    copies = Copies(engine)

    def breaks(_start: datetime) -> list[object]:
        copies.overtake()
        raise ValueError("bad window")

    copies.inbox.put(loop.event(0))
    late = copies.worker(copies.first, breaks)

    with pytest.raises(Unavailable, match="another retraining:churn leads now"):
        late.step()

    with engine.connect() as connection:
        tried = connection.exec_driver_sql("SELECT attempts FROM inbox").scalar()
    assert tried == 0


def test_a_copy_keeps_its_turn_for_as_long_as_its_run_takes(engine, book):
    copies = Copies(engine)
    kept = []

    def long() -> None:
        """Three times as long as a turn, with looks at the clock as often as the real one's."""
        for _ in range(9):
            copies.seconds += 5
            copies.first.keep()
            kept.append(copies.second.leads())

    copies.launcher.meanwhile = long
    copies.inbox.put(loop.event(0))

    assert copies.worker(copies.first).step()
    assert kept == [False] * 9
    assert copies.inbox.counts()["settled"] == 1


def test_a_turn_that_was_lost_is_not_taken_anew_in_the_midst_of_work(engine):
    copies = Copies(engine)
    assert copies.first.leads()
    copies.overtake()
    copies.second.resign()

    copies.seconds += 60
    copies.first.keep()

    with (
        pytest.raises(Unavailable, match="another retraining:churn leads now"),
        engine.begin() as c,
    ):
        copies.first.guard(c)


def test_versions_and_wishes_are_refused_in_their_own_transaction(engine: Engine):
    def refuse(_connection: object) -> None:
        raise Unavailable("no longer")

    now = datetime(2026, 1, 1, tzinfo=UTC)
    with pytest.raises(Unavailable, match="no longer"):
        versions.next_version(engine, "tiny", "sha256:1", "run-1", now, refuse)
    with pytest.raises(Unavailable, match="no longer"):
        rollouts.wish(
            engine,
            project="tiny",
            version=1,
            digest="sha256:1",
            bundle_uri="b",
            run_id="run-1",
            guard=refuse,
        )

    assert versions.all_versions(engine, "tiny") == []
    assert rollouts.history(engine, "tiny") == []
    assert versions.next_version(engine, "tiny", "sha256:1", "run-1", now) == Version(
        1, "sha256:1", "run-1", now
    )
