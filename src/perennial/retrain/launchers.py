"""Who runs the compiled pipeline, and how did it end?"""

import argparse
import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from sqlalchemy import Engine

from perennial import project as projects
from perennial.errors import BadInput, PerennialError, RunFailed
from perennial.ledger import Entry, Ledger
from perennial.settings import PREFIX, Settings, StateFolder
from perennial.steps import context
from perennial.store import lease
from perennial.store.engine import make_engine

SPEC = Path("pipelines") / "training.yaml"
GRACE_S = 5.0
_PR_SET_PDEATHSIG = 1
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_BEGINS = re.compile(r"Executing task '([\w-]+)'")
_FAILS = re.compile(r"Task '([\w-]+)' finished with status FAILURE")
_RAISED = re.compile(r"\s*(?:[a-z_][\w.]*\.)?([A-Z]\w+): (.+)")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class RunRequest:
    """What a run is started with; empty, 0 and -1 leave it to the project."""

    project: Path
    source: str = ""
    as_of: datetime | None = None
    trigger: str = "by hand"
    trials: int = 0
    seed: int = -1
    key: str = ""  # a second request with the same key means the run of the first


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end; ``reason`` says whether the gate let the model through."""

    run: str
    state: str
    reason: str


class Launcher(Protocol):
    """Runs the training pipeline somewhere and waits for it."""

    @property
    def outlives(self) -> bool:
        """Does a run go on when the process that asked for it ends?"""
        ...

    def run(self, request: RunRequest, progress: Progress | None = None) -> RunResult:
        """Run once. Raises RunFailed that names the failed step and its reason."""
        ...

    def stop(self) -> None:
        """End the present run, if there is one."""
        ...

    def is_over(self, project: str, run: str) -> bool:
        """Is a run over that this launcher made? If so, its end stands in the ledger from now on.

        False also for what is no run of such a launcher. Raises Unavailable when nobody answers.
        """
        ...


class LocalLauncher:
    """Runs the spec by kfp.local in a child process that never outlives this one."""

    outlives = False

    def __init__(self, settings: Settings, spec: Path) -> None:
        self._settings = settings
        self._spec = spec
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, request: RunRequest, progress: Progress | None = None) -> RunResult:
        """Run once and wait; ``progress`` is told the name of each step as it begins."""
        if not self._spec.is_file():
            raise BadInput(f"no compiled spec at {self._spec}; run 'make spec'")
        name = projects.load(request.project).name
        record = _Record(name, self._settings.state(name), request.trigger)
        log = Log(record.state.logs / f"run-{short_name(request.trigger)}.log", progress)
        try:
            code = self._wait(request, log)
        finally:
            record.let_go()
        if self._stopped:
            raise RunFailed(f"the run was stopped while it did {log.step or 'nothing yet'}")
        return record.result(code, log)

    def stop(self) -> None:
        """End the present run with all its steps; nothing is written about how it ended."""
        self._stopped = True
        if self._child is not None:
            end(self._child)

    def is_over(self, project: str, run: str) -> bool:
        """A run ends with its launcher, which lets its lease go: there is nothing to look at."""
        return False

    def _wait(self, request: RunRequest, log: "Log") -> int:
        self._stopped = False
        with tempfile.TemporaryDirectory(prefix="perennial-run-") as scratch:
            child = start(self._settings, self._spec, request, scratch)
            self._child = child
            try:
                for _ in log.lines(child):
                    pass
                return child.wait()
            finally:
                self._child = None
                end(child)


class Notes:
    """What the output of a run tells: which step goes on, which failed first, and why."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.step = ""
        self.failed = ""  # step that failed first
        self.error = ""  # what it said
        self.kind = ""  # class of the error that it raised; empty where it ended without a word
        self._last = ("", "")
        self._progress = progress

    def read(self, line: str) -> None:
        """Take notice of one line."""
        if found := _BEGINS.search(line):
            self.step, self._last = found[1], ("", "")
            if self._progress:
                self._progress(self.step)
        elif (found := _FAILS.search(line)) and not self.failed:
            self.failed = found[1]
            self.kind, self.error = self._last
        elif found := _RAISED.fullmatch(line.rstrip()):
            self._last = (found[1], found[2])


class Log(Notes):
    """The output of a run, kept in a file while it is read."""

    def __init__(self, path: Path, progress: Progress | None = None) -> None:
        super().__init__(progress)
        self.path = path

    def lines(self, child: "subprocess.Popen[str]") -> Iterator[str]:
        """Each line as soon as it was kept and read, until the child closes its output."""
        assert child.stdout is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", encoding="utf-8") as file, child.stdout as output:
            for line in output:
                plain = _ANSI.sub("", line)
                file.write(plain)
                file.flush()
                self.read(plain)
                yield plain


class _Record:
    """What the ledger says of the run that begins now."""

    def __init__(self, project: str, state: StateFolder, trigger: str) -> None:
        self.state = state
        self._project = project
        self._trigger = trigger
        self._before = {e.seq for e in self._entries()}

    def result(self, code: int, log: Log) -> RunResult:
        """How the run ended. Raises RunFailed unless it succeeded."""
        entries = [e for e in self._entries() if e.seq not in self._before]
        run = self._run(entries)
        ends = [e for e in entries if e.kind == "run.finished" and e.subject == run]
        if ends and ends[-1].body["state"] == "succeeded" and code == 0:
            return RunResult(run, "succeeded", ends[-1].body["reason"])
        faults = [e for e in entries if e.kind == context.FAILED and e.subject == run]
        reason = _reason(faults[0] if faults else None, log, code)
        if run and not ends:
            self._finish(run, reason)
        raise RunFailed(f"{reason}; the log is {log.path}")

    def let_go(self) -> None:
        """Let the lease of a run go whose processes are gone, however it ended."""
        name = context.lease_of_runs(self._project)
        with self._opened() as engine:
            for run in self._ours(Ledger(engine).entries(self._project)):
                lease.let_go(engine, name, run)

    def _ours(self, entries: list[Entry]) -> list[str]:
        return [
            e.subject
            for e in entries
            if e.kind == "run.started"
            and e.body["trigger"] == self._trigger
            and e.seq not in self._before
        ]

    def _run(self, entries: list[Entry]) -> str:
        ours = self._ours(entries)
        # A run that failed before it could write its start still says how it ended.
        others = [e.subject for e in entries if e.kind in ("run.finished", context.FAILED)]
        return (ours or others or [""])[-1]

    def _entries(self) -> list[Entry]:
        with self._opened() as engine:
            return Ledger(engine).entries(self._project)

    def _finish(self, run: str, reason: str) -> None:
        body = {"run": run, "state": "failed", "reason": reason}
        with self._opened() as engine:
            Ledger(engine).append(
                "run.finished",
                project=self._project,
                subject=run,
                body=body,
                now=datetime.now(UTC),
            )

    @contextmanager
    def _opened(self) -> Iterator[Engine]:
        engine = make_engine(self.state.url)
        try:
            yield engine
        finally:
            engine.dispose()


def _reason(fault: Entry | None, log: Log, code: int) -> str:
    if fault:
        return f"step {fault.body['step']} failed: {fault.body['reason']}"
    if log.failed:
        return f"step {log.failed} failed: {log.error or 'it ended without a word'}"
    ended = f"by signal {-code}" if code < 0 else f"with code {code}"
    return f"the run ended {ended} while it did {log.step or 'nothing yet'}"


def short_name(trigger: str) -> str:
    """A trigger as it stands in the name of a log."""
    return re.sub(r"[^A-Za-z0-9]+", "-", trigger).strip("-")[:24] or "unnamed"


def start(
    settings: Settings, spec: Path, request: RunRequest, scratch: str, kept: Path | None = None
) -> "subprocess.Popen[str]":
    """The child that runs a spec; ``kept`` is where it finds steps that are done already."""
    return subprocess.Popen(
        _command(spec, request, kept),
        env=_environment(settings, scratch),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def _command(spec: Path, request: RunRequest, kept: Path | None) -> list[str]:
    return [
        *(sys.executable, "-m", "perennial.retrain.launchers"),
        *("--child-of", str(os.getpid())),
        *("--spec", str(spec.resolve())),
        # Not resolved: a mounted ConfigMap is a link that leads elsewhere in each pod.
        *("--project", str(request.project.absolute())),
        *("--source", request.source),
        *("--as-of", request.as_of.isoformat() if request.as_of else ""),
        *("--trigger", request.trigger),
        *("--trials", str(request.trials)),
        *("--seed", str(request.seed)),
        *(("--kept", str(kept)) if kept else ()),
    ]


def _environment(settings: Settings, scratch: str) -> dict[str, str]:
    """Our settings as they are now, this Python first, and threads that do not spin."""
    given = settings.model_copy(update={"home": settings.home.resolve()}).model_dump()
    return {
        **os.environ,
        **{f"{PREFIX}{k.upper()}": str(value) for k, value in given.items() if value is not None},
        "TMPDIR": scratch,  # kfp leaves a folder behind for every step
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONUNBUFFERED": "1",
        # Eight processes import the same libraries: compiling them anew each time doubles a run.
        "PYTHONDONTWRITEBYTECODE": "",
    }


def end(child: "subprocess.Popen[str]") -> None:
    """End the child's whole session, softly first; nothing of it may go on."""
    _signal(child.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def main() -> int:
    """Run the pipeline once by hand, or, as a child of a launcher, inside kfp.local."""
    asked = _parser().parse_args()
    if asked.child_of:
        _end_with_parent(asked.child_of)
        return _run_inside(asked)
    settings = Settings.load()
    try:
        folder = context.find(settings, asked.project)
        request = RunRequest(
            folder,
            asked.source,
            context.moment(asked.as_of),
            asked.trigger,
            asked.trials,
            asked.seed,
        )
        launcher = LocalLauncher(settings, asked.spec or settings.root / SPEC)
        result = launcher.run(request, progress=lambda step: print(step, flush=True))
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    print(f"run {result.run} {result.state}: {result.reason}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m perennial.retrain.launchers", description=main.__doc__
    )
    parser.add_argument("--project", default="examples/retail", help="folder with a project.yaml")
    parser.add_argument("--source", default="", help="file with raw rows")
    parser.add_argument("--as-of", default="", help="moment up to which data is known")
    parser.add_argument("--trigger", default="by hand", help="what started this run")
    parser.add_argument("--trials", type=int, default=0, help="0: the project's")
    parser.add_argument("--seed", type=int, default=-1, help="-1: the project's")
    parser.add_argument("--spec", type=Path, help="compiled pipeline")
    parser.add_argument("--kept", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--child-of", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def _end_with_parent(parent: int) -> None:
    """End with all steps when told to, and be told when the parent ends in any way."""
    signal.signal(signal.SIGTERM, _end_group)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # The parent may have ended before the kernel was asked to tell.
    if os.getppid() != parent:
        sys.exit(1)


def _end_group(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    os._exit(128 + signal.SIGTERM)


def _run_inside(asked: argparse.Namespace) -> int:
    """Run the spec by kfp.local; its own error says less than the step's, so it is not shown."""
    warnings.filterwarnings("ignore", message=r"Task .*: settings \[.*\] have no effect")
    from kfp import components, local

    state = Settings.load().state(projects.load(Path(asked.project)).name)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(asked.kept or state.runs),
        raise_on_error=False,
        enable_caching=asked.kept is not None,
    )
    components.load_component_from_file(str(asked.spec))(
        project=asked.project,
        source=asked.source,
        as_of=asked.as_of,
        trials=asked.trials,
        seed=asked.seed,
        trigger=asked.trigger,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
