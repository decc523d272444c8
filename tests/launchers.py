"""What every launcher promises, whatever it runs pipelines by."""

import re
import threading
import time
from collections.abc import Callable
from typing import Protocol

import pytest

from perennial.errors import RunFailed
from perennial.ledger import Ledger
from perennial.retrain.launchers import Launcher, RunRequest, RunResult

# How a pipeline is asked to go.
WELL, WRONG, LONG = "well", "wrong", "long"
REASON = "row 17: churned is 2, expected 0 or 1"


class Bench(Protocol):
    """A launcher with a pipeline that goes as it is asked to."""

    launcher: Launcher
    project: str
    reason: str  # what a step says that goes wrong: a pattern

    @property
    def ledger(self) -> Ledger: ...

    def ask(self, how: str, key: str) -> RunRequest: ...

    def goes_on(self) -> bool:
        """Is a step of a run alive?"""
        ...


class LauncherContract:
    """Tests of one launcher; a subclass has a fixture ``bench``."""

    def test_a_run_that_ends_well_gives_its_id_and_tells_its_steps(self, bench):
        told: list[str] = []

        result = bench.launcher.run(bench.ask(WELL, "event 1"), progress=told.append)

        (finished,) = bench.ledger.entries(bench.project, "run.finished")
        assert (result.run, result.state) == (finished.subject, "succeeded")
        assert result.reason == finished.body["reason"]
        assert told[-1] == "notify" and len(told) >= 2

    def test_a_failed_run_names_step_and_reason_here_and_in_the_ledger(self, bench):
        with pytest.raises(RunFailed, match=rf"step \w+ failed: {bench.reason}"):
            bench.launcher.run(bench.ask(WRONG, "event 1"))

        (finished,) = bench.ledger.entries(bench.project, "run.finished")
        assert finished.body["state"] == "failed"
        assert re.search(bench.reason, finished.body["reason"])

    def test_stopping_ends_the_wait_and_the_run_unless_it_outlives_its_launcher(self, bench):
        ends = _in_thread(lambda: bench.launcher.run(bench.ask(LONG, "event 1")))
        assert eventually(bench.goes_on), "no step began"

        bench.launcher.stop()

        assert eventually(lambda: bool(ends)), "it waits still"
        assert isinstance(ends[0], RunFailed)
        assert bench.ledger.entries(bench.project, "run.finished") == []
        outlives = bench.launcher.outlives
        assert bench.goes_on() if outlives else eventually(lambda: not bench.goes_on())


class OutlivingContract(LauncherContract):
    """Tests of a launcher whose runs go on without it, and so are found again by their key."""

    def test_a_request_with_a_known_key_means_the_run_of_the_first(self, bench):
        assert bench.launcher.outlives

        first = bench.launcher.run(bench.ask(WELL, "event 1"))

        assert bench.launcher.run(bench.ask(WELL, "event 1")) == first
        assert len(bench.ledger.entries(bench.project, "run.started")) == 1


def eventually(happened: Callable[[], bool], seconds: float = 60) -> bool:
    """Does it happen within some time?"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.05)
    return False


def _in_thread(run: Callable[[], RunResult]) -> list[RunResult | Exception]:
    ends: list[RunResult | Exception] = []

    def target() -> None:
        try:
            ends.append(run())
        except Exception as exc:
            ends.append(exc)

    threading.Thread(target=target, daemon=True).start()
    return ends
