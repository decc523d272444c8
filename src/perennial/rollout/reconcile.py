"""Move every project's rollouts on a cluster, and show them as ModelRollouts.

One process leads by a lease row, the others wait. The store stays the truth: what is kept here is
made anew from it by whoever leads next.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError

from perennial.errors import BadInput, PerennialError
from perennial.ledger import Entry, Ledger
from perennial.project import Rollout
from perennial.records import RolloutState, Version
from perennial.rollout import plan, resource
from perennial.rollout.board import Board
from perennial.rollout.controller import Controller, is_end_told
from perennial.rollout.led import LedRevisions, LedTraffic
from perennial.rollout.places import Adapters
from perennial.rollout.ports import Clock
from perennial.rollout.resource import Document, Look, Wish
from perennial.rollout.watch import ROLLOUTS, Change
from perennial.store import rollouts, versions
from perennial.store.lease import Leader

log = logging.getLogger(__name__)

EDITED, RESTORED = "serving.edited", "serving.restored"
# After a refusal: the same words may be taken later, but not within a second.
REST_S = 10.0
# After this a turn ends, so that the lease is renewed and new wishes are heard.
LONG_S = 5.0


class Changes(Protocol):
    """What changed on the API server since it was asked last."""

    def take(self) -> list[Change]: ...


@dataclass(frozen=True)
class Named:
    """What a controller knows of a project here: each wish brings its own limits."""

    name: str
    rollout: Rollout = field(default_factory=Rollout)


@dataclass
class Desk:
    """One project at work."""

    adapters: Adapters
    controller: Controller
    edits: list[str] = field(default_factory=list)
    generations: dict[str, int] = field(default_factory=dict)  # of each InferenceService
    is_dirty: bool = False  # somebody changed its InferenceService
    is_told: bool = False
    rests_until: float = -math.inf  # by the monotonic clock, after a refusal

    @property
    def is_steady(self) -> bool:
        return self.controller.settled and self.is_told and not self.is_dirty


class Reconciler:
    """All projects of one namespace."""

    def __init__(
        self,
        engine: Engine,
        board: Board,
        leader: Leader,
        changes: Changes,
        adapters_of: Callable[[str], Adapters],
        clock: Clock,
        on_promoted: Callable[[RolloutState], None],
        bundle_uri: Callable[[str, str], str],
        on_worked: Callable[[], None] = lambda: None,
        keep: int = 50,
    ) -> None:
        self._engine = engine
        self._ledger = Ledger(engine, leader.guard)
        self._board = board
        self._leader = leader
        self._changes = changes
        self._adapters_of = adapters_of
        self._clock = clock
        self._on_promoted = on_promoted
        self._bundle_uri = bundle_uri
        self._on_worked = on_worked
        self._keep = keep
        self._desks: dict[str, Desk] = {}
        self._asked: dict[str, Document] = {}
        self._unseen: set[str] = set()  # since this process leads
        self._said: dict[str, str] = {}
        self._faulty: dict[str, float] = {}  # until when, by the monotonic clock
        self._last = ""  # who had a step last
        self._term: int | None = None

    def turn(self) -> bool:
        """Look at everything that moves, once; says whether this process leads."""
        for change in self._changes.take():
            self._learn(change)
        if not self._leader.leads():
            return False
        if self._term != self._leader.term:
            self._begin_anew()
        self._answer()
        self._work_all()
        return True

    def close(self) -> None:
        for desk in self._desks.values():
            desk.adapters.close()
        self._desks.clear()

    def _begin_anew(self) -> None:
        """What another leader did meanwhile stands in the store, not here."""
        self.close()
        self._board.read()
        self._unseen = set(rollouts.projects(self._engine))
        # Last: whoever could not read everything begins anew at the next turn.
        self._term = self._leader.term

    def _busy(self) -> set[str]:
        """Projects that have something to do: the others cost neither a query nor a call."""
        known = {p for p, desk in self._desks.items() if not desk.is_steady}
        busy = known | self._unseen | set(rollouts.open_projects(self._engine))
        return {p for p in busy if not self._rests(p)}

    def _work_all(self) -> None:
        """A step of each project; who had none because others took long comes first next time."""
        began = self._clock.monotonic()
        for project in sorted(self._busy(), key=lambda p: (p <= self._last, p)):
            self._work(project)
            self._last = project
            self._on_worked()
            # An API server that does not answer takes ten seconds for each question.
            if self._clock.monotonic() - began > LONG_S:
                return

    def _work(self, project: str) -> None:
        try:
            desk = self._desk(project)
            before = rollouts.open_rollout(self._engine, project)
            self._move(project, desk)
            desk.is_told = False
            self._inspect(project, desk)
            desk.is_told = self._show(project, desk, before)
        except PerennialError as exc:
            self._say(project, exc)
        except DBAPIError:
            raise
        except Exception:
            self._put_aside(project)

    def _put_aside(self, project: str) -> None:
        """A fault of ours in one project stops no other one; it is tried again, more rarely."""
        log.exception("project=%s is put aside for %g s: a fault of the operator", project, REST_S)
        self._faulty[project] = self._clock.monotonic() + REST_S

    def _move(self, project: str, desk: Desk) -> None:
        """One step; what is refused is shown as what is waited for, and asked again more rarely."""
        # It may be here only to be told.
        if self._clock.monotonic() < desk.rests_until:
            return
        try:
            desk.controller.tick()
            self._said.pop(project, None)
        except BadInput as exc:
            desk.rests_until = self._clock.monotonic() + REST_S
            self._say(project, exc)

    def _say(self, project: str, exc: PerennialError) -> None:
        """Log a trouble once, not at every turn."""
        if self._said.get(project) != str(exc):
            log.warning("project=%s: %s", project, exc)
        self._said[project] = str(exc)

    def _rests(self, project: str) -> bool:
        now, desk = self._clock.monotonic(), self._desks.get(project)
        if now < self._faulty.get(project, -math.inf):
            return True
        return bool(desk and desk.is_told and now < desk.rests_until)

    def _desk(self, project: str) -> Desk:
        if project not in self._desks:
            adapters = self._adapters_of(project)
            controller = Controller(
                Named(project),
                self._engine,
                self._ledger,
                LedTraffic(adapters.traffic, self._leader),
                adapters.evidence,
                LedRevisions(adapters.revisions, self._leader),
                self._clock,
                on_promoted=self._on_promoted,
                platform_name=adapters.platform_name,
                guard=self._leader.guard,
                on_restored=self._record_restored,
            )
            # What was changed while nobody led is looked for, and what was told is not told again.
            told = self._ledger.entries(project, EDITED)
            edits = list(told[-1].body["edits"]) if told else []
            self._desks[project] = Desk(adapters, controller, edits, is_dirty=True)
            self._unseen.discard(project)
        return self._desks[project]

    def _learn(self, change: Change) -> None:
        if change.kind == ROLLOUTS[2]:
            self._board.learn(change.name, None if change.gone else change.body)
            self._asked.pop(change.name, None)
            if not change.gone and resource.is_unanswered(change.body):
                self._asked[change.name] = change.body
            return
        desk = self._desks.get(_project(change))
        generation = 0 if change.gone else int(change.body["metadata"].get("generation", 0))
        if desk and change.gone:
            # What serves may have been in it: that is looked at now, and made anew.
            desk.controller.settled = False
        if desk and generation != desk.generations.get(change.name, 0):
            desk.generations[change.name], desk.is_dirty = generation, True

    def _inspect(self, project: str, desk: Desk) -> None:
        """Tell once what somebody else changed; it is not taken back."""
        if not desk.is_dirty or not desk.controller.settled:
            return
        going = rollouts.open_rollout(self._engine, project)
        # What could not be cleared away stands at 0 %, as we put it there.
        ours: set[int | None] = {0} if desk.controller.untidy else set()
        found = desk.adapters.edits(ours | plan.percents(going, self._limits(going).steps))
        desk.is_dirty = False
        if found != desk.edits:
            desk.edits = found
            self._record_edits(project, found)

    def _record_edits(self, project: str, found: list[str]) -> None:
        serving = rollouts.serving(self._engine, project)
        told = self._ledger.entries(project, EDITED)
        if serving is None or found == (told[-1].body["edits"] if told else []):
            return
        body = {"rollout": serving.id, "version": serving.version, "edits": found}
        self._ledger.append(
            EDITED,
            project=project,
            subject=plan.name(serving),
            body=body,
            now=self._clock.now(),
        )
        log.warning("project=%s was edited from outside: %s", project, "; ".join(found) or "undone")

    def _record_restored(self, serving: RolloutState) -> None:
        """What serves had no servers: somebody deleted them, or the cluster is a new one."""
        name = plan.name(serving)
        reason = f"{name} serves by the store, and the cluster had no InferenceService of it"
        self._ledger.append(
            RESTORED,
            project=serving.project,
            subject=name,
            body={"rollout": serving.id, "version": serving.version, "reason": reason},
            now=self._clock.now(),
        )
        log.warning("project=%s is made anew: %s", serving.project, reason)

    def _show(self, project: str, desk: Desk, before: RolloutState | None) -> bool:
        """Tell of what moved, of the newest and of what serves: there people look.

        Does all of it stand there now?
        """
        history = rollouts.history(self._engine, project)
        serving = rollouts.serving(self._engine, project)
        moved = {r.id for r in (before, serving, plan.newest_over(history)) if r}
        shown = [r for r in history if not r.phase.over or r.id in moved]
        told = [self._show_one(state, desk, history) for state in shown]
        self._board.remove(self._outlived(history, serving))
        return all(told)

    def _outlived(self, history: list[RolloutState], serving: RolloutState | None) -> set[int]:
        """Rollouts that need no resource any more; what a person made, a person deletes.

        Somebody who keeps it in git would make it anew, and that is another wish for it.
        """
        over = [r for r in history if r.phase.over][: -self._keep]
        kept = {r.id for r in (serving, plan.newest_over(history)) if r}
        return {r.id for r in over if not resource.is_by_resource(r)} - kept

    def _show_one(self, state: RolloutState, desk: Desk, history: list[RolloutState]) -> bool:
        called = resource.name(state, history)
        limits = self._limits(state)
        if not self._board.knows(called):
            if state.phase.over and resource.is_by_resource(state):
                return True
            self._board.make(resource.document(state, called, limits))
        latest = state == history[-1] or not state.phase.over
        # Until it is settled, what ended last is not all done.
        unsettled = not desk.controller.settled and state == plan.newest_over(history)
        is_going = unsettled or not state.phase.over
        look = Look(
            steps=self._steps(state),
            revision=desk.adapters.platform_name(plan.name(state)) if latest else "",
            waits=desk.controller.problem if is_going else "",
            edits=desk.edits,
            is_moving=unsettled and not is_end_told(self._ledger, state, history),
        )
        before = self._board.before(called)
        now = self._clock.now()
        return self._board.tell(called, resource.status(state, limits, look, before, now))

    def _steps(self, state: RolloutState) -> list[Entry]:
        found = self._ledger.entries(state.project, "rollout.step", plan.name(state))
        return [e for e in found if e.body.get("rollout") == state.id]

    def _limits(self, state: RolloutState | None) -> Rollout:
        text = state.limits if state else "{}"
        return Rollout.model_validate_json(text or "{}")

    def _answer(self) -> None:
        """Make wishes of what people asked for; what could not be is asked again."""
        for name, found in list(self._asked.items()):
            try:
                self._wish(resource.wish(found))
            except BadInput as exc:
                self._refuse(name, str(exc))
            del self._asked[name]

    def _refuse(self, name: str, why: str) -> None:
        before = self._board.before(name)
        try:
            self._board.tell(name, resource.refusal(why, before, self._clock.now()))
        except BadInput as exc:
            log.warning("ModelRollout %s is refused, and cannot be told so: %s", name, exc)

    def _wish(self, wish: Wish) -> None:
        version = versions.by_number(self._engine, wish.project, wish.version)
        _check(wish, version)
        limits = self._wished_limits(wish)
        state = rollouts.wish(
            self._engine,
            project=wish.project,
            version=wish.version,
            digest=wish.digest,
            bundle_uri=wish.bundle_uri or self._bundle_uri(wish.project, wish.digest),
            run_id=wish.run_id,
            limits=limits.model_dump_json(),
            guard=self._leader.guard,
        )
        self._record_wish(wish, state)

    def _record_wish(self, wish: Wish, state: RolloutState) -> None:
        told = self._ledger.entries(wish.project, "rollout.wished", plan.name(state))
        if any(e.body.get("rollout") == state.id for e in told):
            return
        body = {
            "rollout": state.id,
            "version": state.version,
            "digest": state.digest,
            "run": state.run_id,
        }
        self._ledger.append(
            "rollout.wished",
            project=wish.project,
            subject=plan.name(state),
            body=body,
            now=self._clock.now(),
        )

    def _wished_limits(self, wish: Wish) -> Rollout:
        """What they said, over what was said of this project last."""
        history = rollouts.history(self._engine, wish.project)
        base = self._limits(history[-1] if history else None).model_dump()
        try:
            return Rollout.model_validate({**base, **wish.limits})
        except ValueError as exc:
            raise BadInput(f"ModelRollout {wish.name} has no usable limits: {exc}") from exc


def _check(wish: Wish, version: Version | None) -> None:
    if version is None:
        raise BadInput(
            f"{wish.project} has no version v{wish.version}; only what passed its gate is rolled"
            " out, see 'perennial models list'"
        )
    if version.digest != wish.digest:
        raise BadInput(f"v{wish.version} has digest {version.digest}, wanted {wish.digest}")


def _project(change: Change) -> str:
    labels = change.body["metadata"].get("labels") or {}
    return str(labels.get("perennial.dev/project", change.name))
