"""Point MLflow's alias ``champion`` at what serves, later if need be; no rollout waits for it."""

import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sqlalchemy import Engine

from perennial.errors import Unavailable
from perennial.ledger import Ledger
from perennial.records import RolloutState
from perennial.rollout import plan
from perennial.rollout.ports import Clock
from perennial.store import rollouts
from perennial.store.lease import Leader

log = logging.getLogger(__name__)

TOLD = "registry.told"
CHAMPION = "champion"
PATIENCE_S = 120.0
_PAUSE_S = (10.0, 3600.0)  # first and longest


class Child(Protocol):
    """A process that tells it; MLflow takes memory and seconds that a loop does not have."""

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def wait(self) -> int: ...


@dataclass(frozen=True)
class Telling:
    """What is being told now."""

    state: RolloutState
    child: Child
    began: float


@dataclass
class Due:
    """When a project is looked at, and how long it rests if that fails."""

    at: float
    pause_s: float = _PAUSE_S[0]


def start(project: str, revision: str) -> Child:
    """The process that knows MLflow."""
    command = [sys.executable, "-m", "perennial.registry", "alias", project, revision, CHAMPION]
    try:
        return subprocess.Popen(command)
    except OSError as exc:
        raise Unavailable(f"no process can be started to tell MLflow: {exc}") from exc


class Champion:
    """Compares what serves with what the ledger says was told, and tells one project at a time.

    So whatever a process that was killed did not tell, the one that leads next does.
    """

    def __init__(
        self,
        engine: Engine,
        leader: Leader,
        clock: Clock,
        start: Callable[[str, str], Child] = start,
    ) -> None:
        self._engine = engine
        self._ledger = Ledger(engine, leader.guard)
        self._leader = leader
        self._clock = clock
        self._start = start
        self._due: dict[str, Due] = {}
        self._telling: Telling | None = None
        self._term: int | None = None

    def promoted(self, state: RolloutState) -> None:
        """Another version serves from now on."""
        self._due[state.project] = Due(self._clock.monotonic())

    def turn(self) -> None:
        """Note how the telling goes; begin the next one when there is none, as long as we lead."""
        if self._leader.term != self._term:
            self._begin_anew()
        if self._telling:
            self._go_on(self._telling)
        while self._term is not None and self._telling is None and (project := self._next()):
            self._look(project)

    def stop(self) -> None:
        """Tell nothing more: another process may have more to say."""
        if self._telling:
            self._telling.child.kill()
            self._telling.child.wait()
        self._telling = None

    def _begin_anew(self) -> None:
        """What others told meanwhile stands in the store: every project is looked at once."""
        self.stop()
        self._due, term, now = {}, self._leader.term, self._clock.monotonic()
        if term is not None:
            self._due = {project: Due(now) for project in rollouts.projects(self._engine)}
        self._term = term

    def _next(self) -> str:
        now = self._clock.monotonic()
        due = [(one.at, project) for project, one in self._due.items() if one.at <= now]
        # Who waits longest: one that hangs must not keep the others waiting.
        return min(due, default=(now, ""))[1]

    def _look(self, project: str) -> None:
        state = rollouts.serving(self._engine, project)
        if state is None or self._is_told(state):
            del self._due[project]
            return
        self._leader.check()
        # As if it failed; when it does not, the next look finds it told.
        due, now = self._due[project], self._clock.monotonic()
        due.at, due.pause_s = now + due.pause_s, min(2 * due.pause_s, _PAUSE_S[1])
        self._telling = Telling(state, self._start(project, plan.name(state)), now)

    def _go_on(self, telling: Telling) -> None:
        code = telling.child.poll()
        if code is None and self._clock.monotonic() - telling.began <= PATIENCE_S:
            return
        if code is None:
            telling.child.kill()
            telling.child.wait()
        self._telling = None
        if code == 0:
            self._record(telling.state)
            return
        name, project = plan.name(telling.state), telling.state.project
        how = "does not answer" if code is None else f"ended with {code}"
        log.warning("MLflow is not told yet project=%s serving=%s: it %s", project, name, how)

    def _is_told(self, state: RolloutState) -> bool:
        told = self._ledger.entries(state.project, TOLD)
        return bool(told) and told[-1].body["version"] == state.version

    def _record(self, state: RolloutState) -> None:
        self._leader.check()
        body = {"rollout": state.id, "version": state.version, "alias": CHAMPION}
        name, now = plan.name(state), self._clock.now()
        self._ledger.append(TOLD, project=state.project, subject=name, body=body, now=now)
