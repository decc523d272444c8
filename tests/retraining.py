"""A retraining loop with invented windows and runs, for tests of its worker, service and inbox."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sqlalchemy import Engine

from perennial import events
from perennial.ledger import Ledger
from perennial.project import Project
from perennial.records import DriftReport, Event, FeatureDrift
from perennial.store import rollouts

WEEK = timedelta(days=7)
START = datetime(2011, 5, 2, tzinfo=UTC)
SERVING = "sha256:" + "a" * 64


def project(**retraining: object) -> Project:
    """A project that retrains at its first drifted window, unless told otherwise."""
    rules = {"persistence": 1, "min_labelled_windows": 0, "cooldown": "0s", **retraining}
    return Project.model_validate(
        {
            "name": "churn",
            "kind": "table",
            "time": {"column": "day"},
            "label": {"column": "left"},
            "features": [{"name": "recency", "type": "number"}],
            "retraining": rules,
        }
    )


def serve(engine: Engine, digest: str = SERVING) -> None:
    """Let a first model serve."""
    state = rollouts.wish(
        engine, project="churn", version=1, digest=digest, bundle_uri="b", run_id="run-0"
    )
    rollouts.save(engine, promoted(state))
    rollouts.set_serving(engine, "churn", state.id)


def promoted(state: rollouts.RolloutState) -> rollouts.RolloutState:
    return rollouts.RolloutState(**{**vars(state), "phase": rollouts.Phase.PROMOTED, "weight": 100})


def window(number: int, drifted: bool = True, thin: bool = False) -> DriftReport:
    """The report of the week with this number."""
    found = FeatureDrift("recency", "ks", 0.4, 1e-6 if drifted else 0.5, drifted, 0.0)
    return DriftReport(
        window_start=START + number * WEEK,
        window_end=START + (number + 1) * WEEK,
        model_digest=SERVING,
        rows=500,
        thin=thin,
        threshold=0.01,
        features=() if thin else (found,),
    )


def event(number: int, now: datetime | None = None) -> Event:
    """The event of the week with this number."""
    return events.drift_event(window(number), "churn", "/transformer", now or datetime.now(UTC))


def drifted_up_to(start: datetime) -> list[DriftReport]:
    """Confirms every window."""
    return [window((start - START) // WEEK)]


@dataclass(frozen=True)
class Ended:
    """How an invented run ended."""

    run: str
    state: str = "succeeded"
    reason: str = ""


@dataclass
class FakeLauncher:
    """Runs that take no time and stand in the ledger as real ones do."""

    ledger: Ledger
    launched: list[tuple[datetime, str]] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None
    prefix: str = "run"

    def __call__(self, as_of: datetime, trigger: str) -> Ended:
        self.launched.append((as_of, trigger))
        run = f"{self.prefix}-{len(self.launched)}"
        self.began(run, as_of, trigger)
        self.meanwhile()
        return Ended(run)

    def began(self, run: str, as_of: datetime, trigger: str) -> None:
        """Write down that a run began."""
        body = {"run": run, "trigger": trigger, "as_of": as_of.isoformat()}
        now = datetime.now(UTC)
        self.ledger.append("run.started", project="churn", subject=run, body=body, now=now)
