"""The launchers' contract on a KFP endpoint: PERENNIAL_KFP_ENDPOINT, else a stand-in."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kfp_backend import FakeKfp, FakeRun, acts, failing, serving
from launchers import LONG, WELL, WRONG, OutlivingContract

from perennial.ledger import Entry, Ledger
from perennial.retrain import remote
from perennial.retrain.launchers import RunRequest
from perennial.retrain.remote import KfpLauncher
from perennial.settings import Settings
from perennial.store.engine import make_engine

ROOT = Path(__file__).resolve().parents[1]
# Read before any test takes our variables away.
GIVEN = {name: value for name, value in os.environ.items() if name.startswith("PERENNIAL_")}
NOWHERE = "/no/such/rows.csv"
MANY_TRIALS = 500


class Since:
    """What a ledger tells from now on: on an endpoint that is given it is not empty."""

    def __init__(self, ledger: Ledger, project: str) -> None:
        self._ledger = ledger
        self._before = {e.seq for e in ledger.entries(project)}

    def entries(self, *asked: str) -> list[Entry]:
        return [e for e in self._ledger.entries(*asked) if e.seq not in self._before]


class Endpoint:
    """The launcher before an endpoint; a run goes as its parameters make it go."""

    project = "retail"
    reason = r".*rows\.csv"

    def __init__(self, launcher: KfpLauncher, ledger: Ledger) -> None:
        self.launcher = launcher
        self.ledger: Any = Since(ledger, self.project)
        self._own = uuid.uuid4().hex
        self._asked: list[RunRequest] = []

    def ask(self, how: str, key: str) -> RunRequest:
        source = NOWHERE if how == WRONG else ""
        trials = {WELL: 2, WRONG: 2, LONG: MANY_TRIALS}[how]
        folder, own = ROOT / "examples" / "retail", f"{key} {self._own}"
        self._asked.append(RunRequest(folder, source, trigger=key, trials=trials, key=own))
        return self._asked[-1]

    def goes_on(self) -> bool:
        """Between two steps none is alive, so the run is asked."""
        return any(self.launcher.backend.run(run).state == "RUNNING" for run in self._runs())

    def end(self) -> None:
        """Leave nothing that runs on and keeps the next run of the project out."""
        for run in self._runs():
            if not self.launcher.backend.run(run).ended:
                self.launcher.backend.terminate(run)

    def _runs(self) -> set[str]:
        names = {remote.run_name(self.project, request) for request in self._asked}
        backend = self.launcher.backend
        found = [backend.runs(backend.experiment(self.project), display_name=n) for n in names]
        return {run.id for runs in found for run in runs}


class TestKfpLauncher(OutlivingContract):
    @pytest.fixture
    def bench(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
        if "PERENNIAL_KFP_ENDPOINT" in GIVEN:
            yield from _before_a_real_one(monkeypatch)
        else:
            monkeypatch.setattr(remote, "POLL_S", 0.001)
            yield from _before_a_stand_in(settings)


def _before_a_real_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    assert settings.state_url, "the contract reads the steps' ledger: set PERENNIAL_STATE_URL too"
    bench = Endpoint(KfpLauncher(settings), Ledger(make_engine(settings.state_url)))
    yield bench
    bench.end()


def _before_a_stand_in(settings: Settings) -> Iterator[Endpoint]:
    settings.home.mkdir()
    url = f"sqlite:///{settings.home / 'state.db'}"
    spec = (ROOT / "pipelines" / "training.yaml").read_text()
    ledger = Ledger(make_engine(url))
    with serving(standing_in(ledger)) as fake:
        given = {"kfp_endpoint": fake.host, "state_url": url}
        yield Endpoint(KfpLauncher(settings.model_copy(update=given), spec), ledger)


def standing_in(ledger: Ledger) -> FakeKfp:
    """A stand-in on which a run's parameters have the effect that they have in our steps."""
    fake, ours = FakeKfp(), acts(ledger)
    broken = failing(ledger, f"no file matches {NOWHERE}", "ingest")

    def plan(parameters: dict[str, Any]) -> dict[str, list[str]]:
        if parameters.get("source") == NOWHERE:
            return {"ingest": ["killed"]}
        return {"train": ["hang"]} if parameters.get("trials") == MANY_TRIALS else {}

    def ingest(run: FakeRun) -> None:
        ours["ingest"](run)
        if run.parameters.get("source") == NOWHERE:
            broken(run)

    fake.plan_for = plan
    fake.acts = {**ours, "ingest": ingest}
    return fake
