"""What does the ledger say about the end of one run that went on elsewhere?"""

from datetime import UTC, datetime

from perennial.errors import RunFailed
from perennial.ledger import Entry, Ledger
from perennial.retrain.launchers import RunResult
from perennial.settings import Settings
from perennial.steps import context
from perennial.store import lease
from perennial.store.engine import borrowed


class Story:
    """The entries of one run, by its id; whoever launched it may have been another process."""

    def __init__(self, settings: Settings, project: str, run: str) -> None:
        self._url = settings.state(project).url
        self._project = project
        self._run = run

    def result(self) -> RunResult | None:
        """How the run ended, None while it goes on. Raises RunFailed when it failed."""
        with borrowed(self._url) as engine:
            ledger = Ledger(engine)
            ends = ledger.entries(self._project, "run.finished", self._run)
            faults = ledger.entries(self._project, context.FAILED, self._run)
        if not ends:
            return None
        if ends[-1].body["state"] == "succeeded":
            return RunResult(self._run, "succeeded", ends[-1].body["reason"])
        raise RunFailed(f"{_reason(ends[-1], faults)}; the run is {self._run}")

    def ended(self) -> bool:
        """Did the run end, however?"""
        try:
            return self.result() is not None
        except RunFailed:
            return True

    def fail(self, reason: str) -> RunFailed:
        """Write that the run failed, unless it told its end itself, and let its lease go."""
        with borrowed(self._url) as engine:
            ledger = Ledger(engine)
            if not ledger.entries(self._project, "run.finished", self._run):
                ledger.append(
                    "run.finished",
                    project=self._project,
                    subject=self._run,
                    body={"run": self._run, "state": "failed", "reason": reason},
                    now=datetime.now(UTC),
                )
            lease.let_go(engine, context.lease_of_runs(self._project), self._run)
        return RunFailed(f"{reason}; the run is {self._run}")


def _reason(end: Entry, faults: list[Entry]) -> str:
    told = str(end.body["reason"])
    # The exit handler tells the last step that failed as "<step>: <reason>".
    if faults and told == f"{faults[-1].body['step']}: {faults[-1].body['reason']}":
        return f"step {faults[-1].body['step']} failed: {faults[-1].body['reason']}"
    return told
