"""A schedule is one recurring run, whatever was there before, and none of its runs is lost."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_backend import FakeKfp, serving

from perennial.errors import BadInput, Unavailable
from perennial.retrain import schedules
from perennial.retrain.answers import Wanted
from perennial.retrain.backend import Backend
from perennial.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "pipelines" / "training.yaml"


@pytest.fixture
def fake() -> Iterator[FakeKfp]:
    with serving(FakeKfp()) as found:
        yield found


@pytest.fixture
def backend(settings: Settings, fake: FakeKfp) -> Backend:
    return Backend(settings.model_copy(update={"kfp_endpoint": fake.host}))


@pytest.fixture
def experiment(backend: Backend) -> str:
    return backend.experiment("retail")


@pytest.fixture
def daily(backend: Backend) -> Wanted:
    made = backend.upload("training", "1", SPEC)
    parameters = {"project": "projects/retail.yaml", "trigger": "schedule"}
    return Wanted("retail", "0 30 3 * * *", made.pipeline, made.version, parameters)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "POLL_S", 0.01)


def hourly(daily: Wanted) -> Wanted:
    return Wanted(daily.name, "0 0 * * * *", daily.pipeline, daily.version, daily.parameters)


def reconciled(
    backend: Backend, experiment: str, wanted: Wanted, patience_s: float = 5.0
) -> tuple[schedules.Outcome, list[str]]:
    told: list[str] = []
    outcome = schedules.reconcile(
        backend,
        experiment,
        wanted,
        "pipeline-run",
        patience_s=patience_s,
        progress=told.append,
    )
    return outcome, told


def verbs(fake: FakeKfp, since: int) -> list[str]:
    """What was done to recurring runs, without the looking."""
    done = [r for r in fake.requests[since:] if "recurringruns" in r and not r.startswith("GET")]
    return [r.split()[0] + ":" + r.rpartition(":")[2] if ":" in r else r.split()[0] for r in done]


def test_a_first_schedule_is_made_that_never_runs_twice_at_once_nor_catches_up(
    backend, fake, experiment, daily
):
    outcome, _ = reconciled(backend, experiment, daily)

    made = fake.recurring[outcome.id]
    assert outcome.did == "made"
    assert (made.max_concurrency, made.no_catchup, made.status) == ("1", True, "ENABLED")
    assert made.trigger.cron_schedule.cron == "0 30 3 * * *"


def test_the_same_schedule_again_asks_and_changes_nothing(backend, fake, experiment, daily):
    reconciled(backend, experiment, daily)
    before = len(fake.requests)

    outcome, told = reconciled(backend, experiment, daily)

    assert outcome.did == "unchanged"
    assert verbs(fake, before) == []
    assert told == []


def test_a_changed_schedule_is_disabled_made_anew_and_deleted(backend, fake, experiment, daily):
    old, _ = reconciled(backend, experiment, daily)
    before = len(fake.requests)

    new, _ = reconciled(backend, experiment, hourly(daily))

    assert new.did == "changed"
    assert list(fake.recurring) == [new.id] != [old.id]
    assert verbs(fake, before) == ["POST:disable", "POST", "DELETE"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("status", "DISABLED"),
        ("max_concurrency", "2"),
        ("no_catchup", None),
        ("service_account", "default"),
    ],
)
def test_a_schedule_that_somebody_changed_is_made_anew(
    backend, fake, experiment, daily, field, value
):
    old, _ = reconciled(backend, experiment, daily)
    setattr(fake.recurring[old.id], field, value)

    new, _ = reconciled(backend, experiment, daily)

    assert new.did == "changed"
    assert list(fake.recurring) == [new.id] != [old.id]


def test_of_several_of_one_name_the_right_one_stays(backend, fake, experiment, daily):
    wrong = backend.recur(experiment, hourly(daily))
    right = backend.recur(experiment, daily)
    twin = backend.recur(experiment, daily)

    outcome, _ = reconciled(backend, experiment, daily)

    assert list(fake.recurring) == [outcome.id]
    assert outcome.id in (right, twin)
    assert wrong not in fake.recurring


def test_a_run_that_goes_on_is_waited_for_before_its_schedule_is_deleted(
    backend, fake, experiment, daily
):
    old, _ = reconciled(backend, experiment, daily)
    fake.plan["train"] = ["hang"]
    run = fake.fire(old.id)
    seen_at_delete: list[str] = []
    delete = fake.delete_recurringrun
    fake.delete_recurringrun = lambda query, one: (
        seen_at_delete.append(run.run.state),
        delete(query, one),
    )[1]
    threading.Timer(0.3, lambda: move_on(fake, run.id)).start()

    _, told = reconciled(backend, experiment, hourly(daily))

    assert seen_at_delete == ["SUCCEEDED"]
    assert f"waiting for run {run.id}" in told


def move_on(fake: FakeKfp, run: str) -> None:
    """The step goes on, and somebody looks until the run is over."""
    fake.runs[run].plan = {}
    while fake.runs[run].run.state in ("PENDING", "RUNNING"):
        fake.get_run({}, run)


def test_a_run_that_does_not_end_leaves_the_schedule_as_it_was(backend, fake, experiment, daily):
    old, _ = reconciled(backend, experiment, daily)
    run = fake.fire(old.id)

    with pytest.raises(Unavailable, match=rf"run that goes on \({run.id}\), and stays as it was"):
        reconciled(backend, experiment, hourly(daily), patience_s=0)

    assert list(fake.recurring) == [old.id]
    assert fake.recurring[old.id].status == "ENABLED"


@pytest.mark.parametrize(
    ("deed", "nth", "wrong"),
    [
        ("enable", 2, BadInput("refused")),
        ("runs", 1, KeyboardInterrupt()),
        ("recur", 1, BadInput("refused")),
    ],
    ids=["disabling the second", "waiting, by Ctrl-C", "making the new one"],
)
def test_whatever_breaks_a_change_leaves_the_old_schedules_in_force(
    backend, fake, experiment, daily, monkeypatch, deed, nth, wrong
):
    old = {backend.recur(experiment, daily), backend.recur(experiment, daily)}
    monkeypatch.setattr(backend, deed, breaking(getattr(backend, deed), nth, wrong))

    with pytest.raises(type(wrong)):
        reconciled(backend, experiment, hourly(daily))

    assert {one: fake.recurring[one].status for one in fake.recurring} == dict.fromkeys(
        old, "ENABLED"
    )


def breaking(deed: Callable[..., Any], nth: int, wrong: BaseException) -> Callable[..., Any]:
    """The same, but for one time that goes wrong."""
    turns = itertools.count(1)

    def act(*args: Any, **more: Any) -> Any:
        if next(turns) == nth:
            raise wrong
        return deed(*args, **more)

    return act


def test_an_old_schedule_that_cannot_be_put_back_is_told_with_the_first_fault(
    backend, fake, experiment, daily, monkeypatch, caplog
):
    old, _ = reconciled(backend, experiment, daily)
    monkeypatch.setattr(backend, "recur", breaking(backend.recur, 1, BadInput("refused")))
    monkeypatch.setattr(backend, "enable", breaking(backend.enable, 2, Unavailable("away")))

    with pytest.raises(BadInput, match="refused"):
        reconciled(backend, experiment, hourly(daily))

    assert f"schedule stays disabled name=retail id={old.id}: away" in caplog.text
