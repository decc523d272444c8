"""Bring wished models to traffic: look, judge, move, record, one small step a tick.

Every move is written to the store before it is made, and made again by whoever finds it unmade: a
controller that was killed at any point is gone on with by the next one.
"""

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial
from typing import Protocol

from sqlalchemy import Connection, Engine

from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.ledger import Ledger, alone
from perennial.project import Rollout
from perennial.records import BY_HAND, Evidence, Judgement, Phase, RolloutState, Verdict
from perennial.rollout import judge, plan
from perennial.rollout.ports import Clock, EvidenceSource, Revisions, Traffic
from perennial.store import fence, rollouts

log = logging.getLogger(__name__)

ROLLED_BACK = "rolled_back"  # kind of the ledger's entry about a rollout that was taken back


class Subject(Protocol):
    """Whose rollouts are moved: a project, or what a cluster knows of one."""

    @property
    def name(self) -> str: ...

    @property
    def rollout(self) -> Rollout: ...


def _nameless(_name: str) -> str:
    return ""


class Controller:
    """Moves the rollouts of one project."""

    def __init__(
        self,
        project: Subject,
        engine: Engine,
        ledger: Ledger,
        traffic: Traffic,
        evidence: EvidenceSource,
        revisions: Revisions,
        clock: Clock,
        on_promoted: Callable[[RolloutState], None] | None = None,
        platform_name: Callable[[str], str] = _nameless,
        guard: fence.Guard = fence.free,
        on_restored: Callable[[RolloutState], None] | None = None,
    ) -> None:
        self._project = project
        self._engine = engine
        self._ledger = ledger
        self._traffic = traffic
        self._evidence = evidence
        self._revisions = revisions
        self._clock = clock
        self._on_promoted = on_promoted
        self._on_restored = on_restored
        self._platform_name = platform_name
        self._guard = guard
        self._stopwatch = ("", 0.0)
        self.settled = False
        self.problem = ""
        self.untidy = False  # a rejected revision could not be cleared away
        self._why = ""

    def tick(self) -> RolloutState | None:
        """Look once and move at most one step; gives the rollout it looked at.

        Raises a PerennialError that waiting does not mend; ``problem`` says it as well.
        """
        try:
            self._why = ""
            state = self._tick()
            self.problem = self._why
            return state
        except Unavailable as exc:
            # What does not answer now is asked again at the next tick, with nothing half moved.
            if str(exc) != self.problem:
                log.warning("rollout waits project=%s reason=%s", self._project.name, exc)
            self.problem = str(exc)
            return rollouts.open_rollout(self._engine, self._project.name)
        except PerennialError as exc:
            # Asking again the same way changes nothing: when to do so, the caller decides.
            self.problem = str(exc)
            raise

    def _tick(self) -> RolloutState | None:
        by_hand = plan.going_by_hand(rollouts.history(self._engine, self._project.name))
        if not self.settled and by_hand:
            self._settle_before(by_hand)
        elif not self.settled:
            self._settle()
        state = rollouts.open_rollout(self._engine, self._project.name)
        if state is None or not (self.settled or by_hand):
            return state
        history = rollouts.history(self._engine, self._project.name)
        if state.phase is not Phase.WISHED and plan.overruled_by(state, history):
            return self._end(state, "a rollback by hand was asked for meanwhile")
        moves = {
            Phase.WISHED: self._begin,
            Phase.STARTING: self._start,
            Phase.CANARY: self._step,
        }
        return moves[state.phase](state)

    def _begin(self, state: RolloutState) -> RolloutState:
        serving = self._serving()
        if serving and serving.digest == state.digest:
            reason = f"{plan.name(serving)} is the same model and serves already"
            return self._save(plan.end(state, Phase.SUPERSEDED, reason))
        for old in set(self._revisions.names()) - self._names(serving, state):
            self._revisions.stop(old)
        return self._start(self._save(plan.start(state)))

    def _start(self, state: RolloutState) -> RolloutState:
        name = plan.name(state)
        if fault := self._bring_up(state):
            return self._end(state, f"{name} did not start: {fault}")
        waits = self._waits(name)
        if waits is not None:
            ready_s = self._limits(state).ready_s
            if self._elapsed(f"start {state.id}") > ready_s:
                return self._end(state, f"{name} was not ready within {ready_s:g} s{waits}")
            return state
        if self._serving() is None:
            return self._move(plan.end(state, Phase.PROMOTED, "first model, nothing to compare"))
        if plan.is_by_hand(state):
            return self._move(plan.end(state, Phase.PROMOTED, "rollback by hand"))
        return self._move(plan.first_step(state, self._limits(state).steps))

    def _waits(self, name: str) -> str | None:
        """None when a revision is ready, else how a sentence about it goes on."""
        try:
            return None if self._revisions.ready(name) else ""
        except Unavailable as exc:
            self._why = str(exc)
            return f": {exc}"

    def _bring_up(self, state: RolloutState) -> str:
        """Start the revision if need be; says why that cannot succeed."""
        name = plan.name(state)
        try:
            if name not in self._revisions.names():
                self._revisions.start(state)
        except Unavailable as exc:
            # Asked again until the time to become ready is over.
            if self._elapsed(f"start {state.id}") <= self._limits(state).ready_s:
                raise
            return str(exc)
        except PerennialError as exc:
            return str(exc)
        fault = self._revisions.died(name)
        # What a person goes back to may have been restarted long ago, and be well since.
        is_well = plan.is_by_hand(state) and self._waits(name) is None
        return "" if is_well else fault

    def _step(self, state: RolloutState) -> RolloutState:
        stable = self._stable()
        if self._shares() != _shares(plan.weights(state, stable)):
            return self._take_share(state)
        evidence = self._look(state)
        if died := self._revisions.died(plan.name(state)):
            return self._end(state, died)
        elapsed_s = self._elapsed(f"step {_key(state)}")
        limits = self._limits(state)
        judgement = judge.judge(evidence, limits, elapsed_s)
        if judgement.verdict is Verdict.HOLD:
            return self._hold(state, judgement)
        moved = plan.after(state, judgement, limits.steps)
        self._record_step(state, judgement, evidence, moved)
        return self._carry_out(moved)

    def _take_share(self, state: RolloutState) -> RolloutState:
        """Give a canary the share its step says, once it is ready: it may have to start again."""
        stable = self._stable()
        name = plan.name(state)
        if fault := self._bring_up(state):
            return self._end(state, f"{name} is down: {fault}")
        if self._elapsed(f"share {_key(state)}") > self._limits(state).ready_s:
            return self._end(state, f"{name} did not get its share: {self.problem or 'not ready'}")
        if not self._revisions.ready(name):
            self._traffic.set_weights({plan.name(stable): 100})
            return state
        self._traffic.set_weights(_shares(plan.weights(state, stable)))
        self._look(state)
        self._elapsed(f"step {_key(state)}")
        log.info("canary moved revision=%s weight=%d", name, state.weight)
        return state

    def _hold(self, state: RolloutState, judgement: Judgement) -> RolloutState:
        if judgement.reason == state.reason:
            return state
        return self._save(plan.after(state, judgement, self._limits(state).steps))

    def _end(self, state: RolloutState, reason: str) -> RolloutState:
        return self._move(plan.end(state, Phase.ROLLED_BACK, reason))

    def _move(self, state: RolloutState) -> RolloutState:
        return self._carry_out(self._save(state))

    def _carry_out(self, state: RolloutState) -> RolloutState:
        """Make the move that is written down."""
        if not state.phase.over:
            return self._take_share(state)
        log.info("rollout over version=%s phase=%s", plan.name(state), state.phase)
        self.settled = False
        self._settle()
        return state

    def _settle(self) -> None:
        """Make what the store says true: who serves, who gets traffic, what the ledger tells."""
        history = rollouts.history(self._engine, self._project.name)
        last = plan.newest_over(history)
        if last and last.phase is Phase.PROMOTED:
            origin = plan.origin(last, history)
            rollouts.set_serving(self._engine, self._project.name, origin.id, self._guard)
        serving = self._serving()
        if serving and not self._serve(serving, history):
            return
        if last:
            self._record_end(last, history)
            self._stop_rejected(last, serving, history)
        self.settled = True

    def _settle_before(self, by_hand: RolloutState) -> None:
        """Settle as far as it goes: a rollback by hand waits for nothing that it replaces."""
        begun = by_hand.phase is not Phase.WISHED
        if begun and plan.name(by_hand) in self._revisions.names():
            # On Knative what serves would be started anew in its place.
            return
        try:
            self._settle()
        except Unavailable as exc:
            self._why = str(exc)
        history = rollouts.history(self._engine, self._project.name)
        last = plan.newest_over(history)
        if not self.settled and last:
            # The next end hides this one, so it is told now.
            self._record_end(last, history)

    def _serve(self, serving: RolloutState, history: list[RolloutState]) -> bool:
        """Let the serving version have its traffic; says whether it is ready."""
        name = plan.name(serving)
        canary = next((r for r in history if r.phase is Phase.CANARY), None)
        if name not in self._revisions.names():
            shares = self._shares()
            # On Knative what lost all of its share to another is not up, and yet not gone.
            passed = bool(shares) and name not in shares
            if passed and canary:
                return True
            self._revisions.start(serving)
            if self._on_restored and not passed:
                self._on_restored(serving)
        # A canary in flight keeps its share through a restart of the controller.
        if canary is None and self._owes(name, history):
            self._traffic.set_weights({name: 100})
        return self._revisions.ready(name)

    def _owes(self, name: str, history: list[RolloutState]) -> bool:
        """Was the last move not finished? What was, and somebody changed since, stays changed."""
        last = plan.newest_over(history)
        finished = last is None or is_end_told(self._ledger, last, history)
        return not finished or not self._shares() or name not in self._shares()

    def _stop_rejected(
        self, last: RolloutState, serving: RolloutState | None, history: list[RolloutState]
    ) -> None:
        self.untidy = False
        going = next((r for r in history if not r.phase.over), None)
        name = plan.name(last)
        if last.phase is not Phase.ROLLED_BACK or name in self._names(serving, going):
            return
        try:
            self._revisions.stop(name)
        except Unavailable:
            # It has no traffic: what cannot be cleared away must not keep the next model waiting.
            if self._elapsed(f"stop {last.id}") <= self._limits(last).ready_s:
                raise
            self.untidy = True
            log.warning("rejected revision=%s is not cleared away", name)

    def _record_step(
        self, state: RolloutState, judgement: Judgement, evidence: Evidence, moved: RolloutState
    ) -> None:
        """Tell of a judged step, and write down where it leads: a kill leaves both or neither."""
        body = {
            **_subject(state, state),
            "weight": state.weight,
            "verdict": str(judgement.verdict),
            "reason": judgement.reason,
            "canary_requests": evidence.canary.requests if evidence.canary else 0,
        }
        told = {**body, **self._platform(plan.name(state))}
        self._append("rollout.step", told, partial(rollouts.write, state=moved))

    def _record_end(self, last: RolloutState, history: list[RolloutState]) -> None:
        if is_end_told(self._ledger, last, history):
            return
        before = plan.before(last, history)
        body = {**_subject(last, last), "reason": last.reason}
        if last.phase is Phase.PROMOTED and before and plan.is_by_hand(last):
            reason = f"by hand; {plan.name(last)} serves again"
            body = {**_subject(last, before), "reason": reason}
        self._append(_kind(last, before), {**body, **self._platform(plan.name(last))})
        if self._on_promoted and last.phase is Phase.PROMOTED:
            self._on_promoted(last)

    def _platform(self, name: str) -> dict[str, object]:
        """What the platform calls a revision, where it has a name of its own."""
        found = self._platform_name(name)
        return {"revision": found} if found else {}

    def _append(
        self,
        kind: str,
        body: dict[str, object],
        along: Callable[[Connection], None] = alone,
    ) -> None:
        self._ledger.append(
            kind,
            project=self._project.name,
            subject=f"v{body['version']}",
            body=body,
            now=self._clock.now(),
            along=along,
        )

    def _look(self, state: RolloutState) -> Evidence:
        names = plan.name(state), plan.name(self._stable())
        return self._evidence.look(_key(state), *names)

    def _save(self, state: RolloutState) -> RolloutState:
        rollouts.save(self._engine, state, self._guard)
        return state

    def _limits(self, state: RolloutState) -> Rollout:
        """The limits that were pinned with the wish, else the project's of today."""
        pinned = state.limits not in ("", "{}")
        return Rollout.model_validate_json(state.limits) if pinned else self._project.rollout

    def _serving(self) -> RolloutState | None:
        return rollouts.serving(self._engine, self._project.name)

    def _stable(self) -> RolloutState:
        serving = self._serving()
        assert serving, "a canary needs a serving model beside it"
        return serving

    def _shares(self) -> dict[str, int]:
        return _shares(self._traffic.weights())

    def _names(self, *states: RolloutState | None) -> set[str]:
        return {plan.name(s) for s in states if s}

    def _elapsed(self, what: str) -> float:
        """Seconds since ``what`` was first asked for, by the monotonic clock."""
        if self._stopwatch[0] != what:
            self._stopwatch = (what, self._clock.monotonic())
        return self._clock.monotonic() - self._stopwatch[1]


def roll_back(engine: Engine, ledger: Ledger, project: str, now: datetime) -> RolloutState:
    """Ask that the previous version serves again; the running controller does it at its next tick.

    Asking twice before it is done means one rollback. Raises BadInput when nothing served before.
    """
    target = rollouts.previous(engine, project)
    if target is None:
        raise BadInput(
            f"{project} has no version before the one that serves; nothing to go back to"
        )
    ended = [r for r in rollouts.history(engine, project) if r.phase.over]
    run_id = f"{BY_HAND}{ended[-1].id}"
    wish = rollouts.wish(
        engine,
        project=project,
        version=target.version,
        digest=target.digest,
        bundle_uri=target.bundle_uri,
        run_id=run_id,
        limits=target.limits,
    )
    subject = plan.name(wish)
    asked = ledger.entries(project, "rollout.wished", subject)
    if not any(e.body.get("rollout") == wish.id for e in asked):
        body = {**_subject(wish, wish), "run": run_id}
        ledger.append("rollout.wished", project=project, subject=subject, body=body, now=now)
    return wish


def is_told(ledger: Ledger, kind: str, state: RolloutState) -> bool:
    """Does the ledger tell of a rollout's end? It does when traffic has moved, not before."""
    entries = ledger.entries(state.project, kind)
    return any(e.body.get("rollout") == state.id for e in entries)


def is_end_told(ledger: Ledger, last: RolloutState, history: list[RolloutState]) -> bool:
    """Does the ledger tell of this end, by whichever kind it is called?"""
    return is_told(ledger, _kind(last, plan.before(last, history)), last)


def _kind(last: RolloutState, before: RolloutState | None) -> str:
    """How the ledger calls the end of a rollout."""
    if last.phase is Phase.ROLLED_BACK or (before and plan.is_by_hand(last)):
        return ROLLED_BACK
    return "promoted" if before else "served"


def _subject(rollout: RolloutState, about: RolloutState) -> dict[str, object]:
    return {"rollout": rollout.id, "version": about.version, "digest": about.digest}


def _shares(weights: Mapping[str, int]) -> dict[str, int]:
    return {name: percent for name, percent in weights.items() if percent}


def _key(state: RolloutState) -> str:
    return f"{state.id}.{state.step}"
