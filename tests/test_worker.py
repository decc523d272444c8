"""What becomes of events: each step is recorded once, wherever the process ended before."""

import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import retraining as loop
from sqlalchemy import Engine

from perennial.errors import BadInput, RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.records import DriftReport
from perennial.retrain import worker as workers
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Launch, Runs, Stopped
from perennial.store import lease, rollouts
from perennial.store.engine import make_engine

Make = Callable[..., workers.Worker]


def now() -> datetime:
    return datetime.now(UTC)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return make_engine(f"sqlite:///{tmp_path}/state.db")


@pytest.fixture
def inbox(engine: Engine) -> Inbox:
    return Inbox(engine)


@pytest.fixture
def ledger(engine: Engine) -> Ledger:
    return Ledger(engine)


@pytest.fixture
def launcher(ledger: Ledger) -> loop.FakeLauncher:
    return loop.FakeLauncher(ledger)


@pytest.fixture
def make(engine: Engine, inbox: Inbox, launcher: loop.FakeLauncher) -> Make:
    loop.serve(engine)

    def build(
        confirm: workers.Confirm = loop.drifted_up_to,
        launch: Launch = launcher,
        **retraining: object,
    ) -> workers.Worker:
        runs = Runs("churn", engine, launch, now, lease_s=0.3)
        return workers.Worker(loop.project(**retraining), engine, inbox, runs, confirm, now)

    return build


def told(ledger: Ledger, kind: str) -> list[str]:
    return [f"{e.body['action']}: {e.body['reason']}" for e in ledger.entries("churn", kind)]


def kinds(ledger: Ledger) -> list[str]:
    return [e.kind for e in ledger.entries("churn")]


def test_confirmed_drift_is_recorded_decided_and_trained_for(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    event = loop.event(3)
    inbox.put(event)
    worker = make()

    assert worker.step()
    assert not worker.step()

    assert launcher.launched == [(loop.START + 4 * loop.WEEK, event.id)]
    assert kinds(ledger) == ["event.received", "decision", "run.started", "run.finished"]
    received, decision, _, finished = ledger.entries("churn")
    assert received.body["drifted"] == ["recency"]
    assert decision.body["confirmed"] == ["recency"]
    assert decision.body["action"] == "retrain"
    assert decision.event_time == loop.START + 4 * loop.WEEK
    assert finished.body == {"run": "run-1", "state": "succeeded", "reason": ""}
    assert worker.status() == workers.Status(0, False, loop.START + 4 * loop.WEEK, ())


@pytest.mark.parametrize("cut_after", ["event.received", "decision", "run.finished"])
def test_an_event_that_was_cut_off_is_finished_without_doing_a_step_twice(
    make: Make,
    inbox: Inbox,
    ledger: Ledger,
    launcher: loop.FakeLauncher,
    monkeypatch: pytest.MonkeyPatch,
    cut_after: str,
):
    inbox.put(loop.event(0))
    append = Ledger.append

    def cut(self: Ledger, kind: str, **rest: object) -> object:
        made = append(self, kind, **rest)  # type: ignore[arg-type]
        if kind == cut_after:
            raise Stopped
        return made

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", cut)
        with pytest.raises(Stopped):
            make().step()
    make().step()

    assert kinds(ledger) == ["event.received", "decision", "run.started", "run.finished"]
    assert len(launcher.launched) == 1
    assert inbox.counts() == {"pending": 0, "settled": 1, "dead": 0}


def test_a_run_whose_end_nobody_saw_is_lost_and_made_anew(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    launcher.began("cut-off", loop.START, loop.event(0).id)

    make().step()

    ends = [(e.body["run"], e.body["state"]) for e in ledger.entries("churn", "run.finished")]
    assert ends == [("cut-off", "lost"), ("run-1", "succeeded")]


def test_a_run_that_is_cut_off_again_and_again_is_given_up(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    for n in range(3):
        launcher.began(f"cut-off-{n}", loop.START, loop.event(0).id)

    make().step()

    assert launcher.launched == []
    assert inbox.counts()["settled"] == 1


def test_two_copies_of_a_server_that_tell_of_one_window_cause_one_run(
    make: Make, inbox: Inbox, launcher: loop.FakeLauncher
):
    for source in ("/one", "/two"):
        inbox.put(replace(loop.event(0), source=source))
    worker = make()

    while worker.step():
        pass

    assert len(launcher.launched) == 1
    assert inbox.counts()["settled"] == 2


def test_an_event_of_a_model_that_no_longer_serves_is_declined(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    event = loop.event(0)
    inbox.put(replace(event, data={**event.data, "model_digest": "sha256:" + "b" * 64}))

    make().step()

    assert told(ledger, "decision") == ["decline: the event is about bbbbbbbb, but v1 serves"]
    assert launcher.launched == []


def test_an_event_before_any_model_serves_is_declined(
    engine: Engine, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    runs = Runs("churn", engine, launcher, now)

    workers.Worker(loop.project(), engine, inbox, runs, loop.drifted_up_to, now).step()

    assert told(ledger, "decision") == ["decline: no model serves yet"]


UNCONFIRMED: dict[str, list[DriftReport]] = {
    "are stable": [loop.window(0), loop.window(1, drifted=False)],
    "are missing": [],
    "are of the window before": [loop.window(0)],
}


@pytest.mark.parametrize("reports", UNCONFIRMED.values(), ids=UNCONFIRMED.keys())
def test_a_hint_costs_no_training_when_our_own_rows(
    make: Make,
    inbox: Inbox,
    ledger: Ledger,
    launcher: loop.FakeLauncher,
    reports: list[DriftReport],
):
    inbox.put(loop.event(1))

    make(confirm=lambda _start: reports).step()

    assert told(ledger, "decision") == ["decline: the served rows do not confirm the drift"]
    assert launcher.launched == []


def test_a_thin_window_is_not_judged(make: Make, inbox: Inbox, ledger: Ledger):
    inbox.put(loop.event(1))

    make(confirm=lambda _start: [loop.window(0), loop.window(1, thin=True)]).step()

    assert told(ledger, "decision") == ["decline: the window has too few rows to be judged"]


def test_the_cooldown_counts_from_the_data_of_the_last_retraining(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    launcher.began("first model", loop.START, "by hand")
    ledger.append("served", project="churn", subject="v1", body={}, now=now())
    for number in (0, 1, 4):
        inbox.put(loop.event(number))
    worker = make(cooldown="28d")

    while worker.step():
        pass

    ends = [as_of for as_of, _ in launcher.launched]
    assert ends == [loop.START + loop.WEEK, loop.START + 5 * loop.WEEK]
    assert told(ledger, "decision")[1] == (
        "wait: the last retraining is too recent; next from 2011-06-06"
    )


def test_training_waits_while_a_rollout_is_under_way(
    make: Make, engine: Engine, inbox: Inbox, ledger: Ledger
):
    inbox.put(loop.event(0))
    worker = make()
    rollouts.wish(
        engine, project="churn", version=2, digest="sha256:c", bundle_uri="b", run_id="run-9"
    )

    worker.step()

    assert told(ledger, "decision") == ["wait: a retraining or its rollout is still under way"]


def test_training_waits_while_somebody_else_runs_the_pipeline(
    make: Make, engine: Engine, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    lease.acquire(engine, "run:churn", "somebody", ttl_s=60, now=now().timestamp())

    make().step()

    assert told(ledger, "decision") == ["wait: a retraining or its rollout is still under way"]
    assert launcher.launched == []


def test_a_decided_run_waits_for_the_lease_of_a_process_that_died(
    make: Make, engine: Engine, inbox: Inbox, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))

    def dying() -> None:
        raise Stopped

    launcher.meanwhile = dying
    with pytest.raises(Stopped):
        make().step()
    lease.acquire(engine, "run:churn", "dead process", ttl_s=0.4, now=now().timestamp())
    launcher.meanwhile = lambda: None
    begun = now()
    make().step()

    assert now() - begun >= timedelta(seconds=0.3)
    assert len(launcher.launched) == 2


def test_the_lease_is_kept_for_longer_than_it_lasts_by_itself(
    make: Make, engine: Engine, inbox: Inbox, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    seen: list[str | None] = []

    def long() -> None:
        threading.Event().wait(0.8)
        seen.append(lease.holder(engine, "run:churn", now().timestamp()))

    launcher.meanwhile = long
    make().step()

    assert seen == [loop.event(0).id]
    assert lease.holder(engine, "run:churn", now().timestamp()) is None


def test_a_poison_event_is_set_aside_after_three_tries_and_the_others_go_on(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    poison, good = loop.event(0), loop.event(1)
    inbox.put(poison)
    inbox.put(good)
    tries: list[datetime] = []

    def confirm(start: datetime) -> list[DriftReport]:
        if start == loop.START:
            tries.append(start)
            raise ZeroDivisionError("no rows")
        return loop.drifted_up_to(start)

    worker = make(confirm=confirm)
    while worker.step():
        pass

    assert len(tries) == 3
    assert [trigger for _, trigger in launcher.launched] == [good.id]
    assert inbox.counts() == {"pending": 0, "settled": 1, "dead": 1}
    reason = "ZeroDivisionError: no rows"
    assert worker.status().failed == (f"event {poison.id}: {reason}",)
    assert told(ledger, "decision")[0] == (f"decline: set aside, it could not be handled: {reason}")


def test_an_event_that_is_no_drift_event_is_set_aside(make: Make, inbox: Inbox):
    inbox.put(replace(loop.event(0), data={}))
    worker = make()

    while worker.step():
        pass

    assert inbox.counts()["dead"] == 1


def test_a_disk_that_is_full_is_not_the_fault_of_the_event(
    make: Make, inbox: Inbox, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))

    def full(_start: datetime) -> list[DriftReport]:
        raise Unavailable("no space left")

    for _ in range(5):
        with pytest.raises(Unavailable):
            make(confirm=full).step()
    make().step()

    assert len(launcher.launched) == 1


@pytest.mark.parametrize("error", [RunFailed("validate: 3 nulls"), BadInput("no source")])
def test_a_run_that_fails_is_recorded_and_not_repeated(
    make: Make, inbox: Inbox, ledger: Ledger, error: Exception
):
    def launch(as_of: datetime, trigger: str) -> loop.Ended:
        raise error

    inbox.put(loop.event(0))
    worker = make(launch=launch)
    while worker.step():
        pass

    ends = ledger.entries("churn", "run.finished")
    assert [(e.body["state"], e.body["reason"]) for e in ends] == [("failed", str(error))]
    assert inbox.counts() == {"pending": 0, "settled": 1, "dead": 0}


def test_an_end_that_the_run_wrote_itself_is_not_written_again(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    def finish() -> None:
        body = {"run": "run-1", "state": "refused", "reason": "AUC lost 0.05"}
        ledger.append("run.finished", project="churn", subject="run-1", body=body, now=now())

    inbox.put(loop.event(0))
    launcher.meanwhile = finish
    make().step()

    assert [e.body["state"] for e in ledger.entries("churn", "run.finished")] == ["refused"]


def test_a_failure_that_the_run_wrote_itself_is_not_written_again(
    make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    def fail() -> None:
        body = {"run": "run-1", "state": "failed", "reason": "step train failed"}
        ledger.append("run.finished", project="churn", subject="run-1", body=body, now=now())
        raise RunFailed("step train failed; the log is run.log")

    inbox.put(loop.event(0))
    launcher.meanwhile = fail
    make().step()

    ends = [(e.subject, e.body["reason"]) for e in ledger.entries("churn", "run.finished")]
    assert ends == [("run-1", "step train failed")]


def test_stopping_cuts_off_the_run_and_the_next_start_makes_it_anew(
    engine: Engine, make: Make, inbox: Inbox, ledger: Ledger, launcher: loop.FakeLauncher
):
    inbox.put(loop.event(0))
    begun, ended = threading.Event(), threading.Event()

    def until_cancelled() -> None:
        begun.set()
        ended.wait(10)

    launcher.meanwhile = until_cancelled
    make()
    runs = Runs("churn", engine, launcher, now, cancel=ended.set)
    worker = workers.Worker(loop.project(), engine, inbox, runs, loop.drifted_up_to, now)
    worker.start()
    assert begun.wait(10)
    assert worker.status().running
    worker.stop()

    assert not worker.alive
    assert inbox.counts()["pending"] == 1
    assert ledger.entries("churn", "run.finished") == []
    launcher.meanwhile = lambda: None
    make().step()
    ends = [e.body["state"] for e in ledger.entries("churn", "run.finished")]
    assert ends == ["lost", "succeeded"]


def test_a_worker_that_starts_again_knows_what_it_decided_last(make: Make, inbox: Inbox):
    for number in (5, 2):
        inbox.put(loop.event(number))
    worker = make()
    while worker.step():
        pass

    assert make().status().last_decided == loop.START + 6 * loop.WEEK


def test_labels_of_transactions_are_known_after_the_horizon():
    table = loop.project()
    label = table.label.model_copy(update={"horizon": timedelta(days=60)})
    churn = table.model_copy(update={"kind": "transactions", "label": label})

    assert workers.label_delay(table) == timedelta(0)
    assert workers.label_delay(churn) == timedelta(days=60)


def test_of_two_copies_only_the_one_whose_turn_it_is_handles_events(
    engine: Engine, inbox: Inbox, launcher: loop.FakeLauncher
):
    loop.serve(engine)
    turns = [False, True]
    copies = []
    for mine in turns:
        runs = Runs("churn", engine, launcher, now, lease_s=0.3)
        copies.append(
            workers.Worker(
                loop.project(), engine, inbox, runs, loop.drifted_up_to, now, lambda mine=mine: mine
            )
        )
    inbox.put(loop.event(0))

    assert [copy.step() for copy in copies] == [False, True]
    assert len(launcher.launched) == 1


def test_a_run_that_outlived_its_service_is_waited_for_and_not_lost(
    engine: Engine, ledger: Ledger, launcher: loop.FakeLauncher
):
    launcher.began("run-0", loop.START, "event-1")
    runs = Runs("churn", engine, launcher, now, outlives=True, lease_s=0.3)

    told = runs.once("event-1", loop.START)

    assert launcher.launched == [(loop.START, "event-1")], "the launcher finds it by its key"
    assert told == "succeeded"
    ends = {e.subject: e.body["state"] for e in ledger.entries("churn", "run.finished")}
    assert ends["run-0"] == "succeeded"
