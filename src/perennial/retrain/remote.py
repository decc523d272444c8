"""How does a run on a KFP backend go, and how did it end?"""

import contextlib
import hashlib
import logging
import re
import secrets
import threading
import time
from datetime import UTC, datetime
from typing import Any

from perennial import project as projects
from perennial.errors import BadInput, RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.retrain import ends, specs
from perennial.retrain.answers import SUCCEEDED, Run, Task
from perennial.retrain.backend import Backend, Refused, read_spec
from perennial.retrain.launchers import Progress, RunRequest, RunResult
from perennial.retrain.story import Story
from perennial.settings import Settings
from perennial.steps import context, notify
from perennial.store import lease
from perennial.store.engine import borrowed

log = logging.getLogger(__name__)

POLL_S = 2.0
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_RAISED = re.compile(r"^\s*(?:[a-z_][\w.]*\.)?[A-Z]\w+: (.+)$", re.MULTILINE)


class KfpLauncher:
    """Runs the spec on a KFP backend, where a run goes on when this process ends."""

    outlives = True

    def __init__(
        self,
        settings: Settings,
        spec: str = "",
        *,
        patience_s: float = 60.0,
    ) -> None:
        """``spec`` is a compiled one; empty is the one that fits the settings.

        A backend that is silent for longer than ``patience_s`` is Unavailable.
        """
        self.backend = Backend(settings)
        self._settings = settings
        self._spec = spec
        self._patience_s = patience_s
        self._stopping = threading.Event()

    def run(self, request: RunRequest, progress: Progress | None = None) -> RunResult:
        """Run once, or find the run of the same key again, and wait for its end."""
        self._stopping.clear()
        project = projects.load(request.project).name
        return self.follow(project, self.submit(request), progress)

    def stop(self) -> None:
        """Wait no longer; the run goes on, and a request of the same key finds it again."""
        self._stopping.set()

    def is_over(self, project: str, run: str) -> bool:
        """Ended by the word of the backend; the ledger may know only of an attempt before."""
        if not self._settings.state_url or not _ID.fullmatch(run):
            return False
        try:
            seen = self.backend.run(run)
        except Refused as exc:
            log.info("not a run of %s: %s (%s)", self.backend.host, run, exc)
            return False
        end = _End(self._settings, self.backend, project, run)
        if not seen.ended or (end.is_resumable(seen) and not self._is_seen_again(project, seen)):
            return False
        with contextlib.suppress(RunFailed):
            end.result(seen)
        return True

    def _is_seen_again(self, project: str, seen: Run) -> bool:
        """Whoever follows the run had the time to resume it, and did not."""
        with borrowed(self._settings.state(project).url) as engine:
            return ends.is_seen_again(engine, seen.end, time.time())

    def submit(self, request: RunRequest) -> str:
        """Start a run unless there is one of the request's key; gives its id."""
        project = projects.load(request.project).name
        experiment = self.backend.experiment(project)
        name = run_name(project, request)
        known = next(self.backend.runs(experiment, display_name=name), None)
        if known:
            log.info("run found again run=%s name=%s", known.id, name)
            return known.id
        self._spec = self._spec or specs.for_cluster(self._settings)
        run = self.backend.submit(
            experiment, name, read_spec(self._spec), parameters(project, request)
        )
        log.info("run submitted run=%s name=%s", run, name)
        return run

    def follow(self, project: str, run: str, progress: Progress | None = None) -> RunResult:
        """Wait for a run's end, and resume it where a step ended without a word.

        Raises RunFailed that names the step and its reason, Unavailable when nobody answers.
        """
        end = _End(self._settings, self.backend, project, run)
        until = time.monotonic() + self._settings.run_deadline_s
        told: set[str] = set()
        while True:
            seen, over = self._look(run, end)
            _tell(seen, told, progress)
            if over:
                return end.result(seen)
            if time.monotonic() > until:
                raise end.overdue(seen)
            self._pause(run)

    def _look(self, run: str, end: "_End") -> tuple[Run, bool]:
        """The run as it is, and whether it stays so; the backend may be silent for a while."""
        until = time.monotonic() + self._patience_s
        while True:
            try:
                seen = self.backend.run(run)
                return seen, seen.ended and not end.resumed(seen)
            except Unavailable as exc:
                self._bear(exc, until)
            self._pause(run)

    def _bear(self, silence: Unavailable, until: float) -> None:
        if time.monotonic() > until:
            raise silence
        log.warning("asking again: %s", silence)

    def _pause(self, run: str) -> None:
        if self._stopping.wait(POLL_S):
            raise RunFailed(f"nobody waits for run {run} any more; it goes on")


class _End:
    """How one run ends, from the backend's state, our ledger and the step's log."""

    def __init__(self, settings: Settings, backend: Backend, project: str, run: str) -> None:
        self._settings = settings
        self._backend = backend
        self._project = project
        self._run = run
        # Without the database of the cluster, as on a laptop, there is only the log.
        self._story = Story(settings, project, run) if settings.state_url else None
        self._retried: set[str] = set()

    def resumed(self, seen: Run) -> bool:
        """Was a run resumed whose step ended without a word of its own?

        Raises Unavailable when nobody answers: the next look tells whether it was.
        """
        if not self.is_resumable(seen):
            return False
        self._retried.add(seen.end)
        try:
            self._backend.retry(self._run)
        except BadInput as exc:
            log.warning("run not resumed run=%s: %s", self._run, exc)
            return False
        log.info("run resumed run=%s step=%s", self._run, seen.failed[0].name)
        return True

    def is_resumable(self, seen: Run) -> bool:
        """Did a step end without a word of its own, for the first times?"""
        # An end that is asked about twice, because no answer came, was resumed once at most.
        spent = len(self._retried - {seen.end}) >= self._settings.kfp_retries
        if seen.state == SUCCEEDED or seen.terminated or spent or not seen.failed:
            return False
        return not self._word(seen)

    def result(self, seen: Run) -> RunResult:
        """The result of a run that is over. Raises RunFailed when it failed."""
        if seen.state == SUCCEEDED:
            return self._succeeded()
        reason = self._word(seen) or _wordless(seen)
        if self._story is None:
            raise RunFailed(f"{reason}; the run is {self._run}")
        failed = self._story.fail(reason)
        self._tell_better(reason)
        raise failed

    def _tell_better(self, reason: str) -> None:
        """The exit handler is not told why a step ended that said nothing itself."""
        with borrowed(self._settings.state(self._project).url) as engine:
            ledger = Ledger(engine)
            last = ledger.entries(self._project, "run.finished", self._run)[-1]
            if str(last.body["reason"]).startswith(notify.UNTOLD):
                self._write(ledger, "failed", reason)

    def overdue(self, seen: Run) -> RunFailed:
        """End a run that takes longer than it may, and say what it was at."""
        self._backend.terminate(self._run)
        at = " and ".join(t.name for t in seen.steps if t.state not in (SUCCEEDED, "SKIPPED"))
        reason = (
            f"the run was not over after {self._settings.run_deadline_s} s,"
            f" at {at or 'no step yet'}, and was terminated"
        )
        return self._story.fail(reason) if self._story else RunFailed(reason)

    def _succeeded(self) -> RunResult:
        if self._story is None:
            return RunResult(self._run, "succeeded", "")
        try:
            told = self._story.result()
        except RunFailed:
            told = None
        if told:
            return told
        return self._told_late()

    def _told_late(self) -> RunResult:
        """Do what the exit handler did not: it is not run again for a run that was resumed."""
        with borrowed(self._settings.state(self._project).url) as engine:
            ledger = Ledger(engine)
            reason = notify.verdict(ledger, self._project, self._run)
            self._write(ledger, "succeeded", reason)
            # The resumed steps took the lease again, that the exit handler had let go.
            lease.let_go(engine, context.lease_of_runs(self._project), self._run)
        return RunResult(self._run, "succeeded", reason)

    def _write(self, ledger: Ledger, state: str, reason: str) -> None:
        ledger.append(
            "run.finished",
            project=self._project,
            subject=self._run,
            body={"run": self._run, "state": state, "reason": reason},
            now=datetime.now(UTC),
        )

    def _word(self, seen: Run) -> str:
        """What the failed step said itself, in the ledger or at the end of its log."""
        fault = self._fault() if self._story else ""
        if fault:
            return fault
        for task in seen.failed:
            said = last_error(self._backend.log(self._run, task))
            if said:
                return f"step {task.name} failed: {said}"
        return ""

    def _fault(self) -> str:
        with borrowed(self._settings.state(self._project).url) as engine:
            faults = Ledger(engine).entries(self._project, context.FAILED, self._run)
        if not faults:
            return ""
        return f"step {faults[-1].body['step']} failed: {faults[-1].body['reason']}"


def parameters(project: str, request: RunRequest) -> dict[str, Any]:
    """What the pipeline is started with; a cluster's steps find projects in one place."""
    return {
        "project": f"projects/{project}.yaml",
        "source": request.source,
        "as_of": request.as_of.isoformat() if request.as_of else "",
        "trials": request.trials,
        "seed": request.seed,
        "trigger": request.trigger,
    }


def run_name(project: str, request: RunRequest) -> str:
    """A name that a person can read: the same for the same key, else a new one."""
    short = re.sub(r"[^A-Za-z0-9]+", "-", request.trigger).strip("-")[:40]
    key = request.key or secrets.token_hex()
    return f"{project} {short} {hashlib.sha256(key.encode()).hexdigest()[:12]}"


def last_error(text: str) -> str:
    """The last exception that a log shows; empty where a step ended without a word."""
    found = _RAISED.findall(text)
    return " ".join(str(found[-1]).split()) if found else ""


def _wordless(seen: Run) -> str:
    if seen.terminated:
        return "the run was terminated"
    if not seen.failed:
        return f"the run ended as {seen.state} before any step of ours failed"
    return f"step {seen.failed[0].name} failed: it ended without a word (no memory, or a lost node)"


def _tell(seen: Run, told: set[str], progress: Progress | None) -> None:
    for task in seen.steps:
        if progress and _begun(task) and task.name not in told:
            told.add(task.name)
            progress(task.name)


def _begun(task: Task) -> bool:
    return task.state in ("RUNNING", SUCCEEDED, "FAILED")
