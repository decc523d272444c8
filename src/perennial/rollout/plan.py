"""What comes next for a rollout: pure moves between its phases, steps and weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from perennial.records import BY_HAND, Judgement, Phase, RolloutState, Verdict


def name(state: RolloutState) -> str:
    """What the revision of a rollout is called: ``v7``."""
    return f"v{state.version}"


def is_by_hand(state: RolloutState) -> bool:
    """Was this asked for by ``perennial rollback``? Its version has earned its traffic before."""
    return state.run_id.startswith(BY_HAND)


def start(state: RolloutState) -> RolloutState:
    """Bring the revision up without traffic."""
    return replace(state, phase=Phase.STARTING, step=-1, weight=0, reason="comes up at 0 %")


def first_step(state: RolloutState, steps: Sequence[int]) -> RolloutState:
    """The revision is ready: the smallest share."""
    return _at(state, 0, steps)


def after(state: RolloutState, judgement: Judgement, steps: Sequence[int]) -> RolloutState:
    """Where a judged step leads: further, nowhere, or back."""
    if judgement.verdict is Verdict.HOLD:
        return replace(state, reason=judgement.reason)
    if judgement.verdict is Verdict.ROLL_BACK:
        return end(state, Phase.ROLLED_BACK, judgement.reason)
    if state.step + 1 < len(steps):
        return _at(state, state.step + 1, steps)
    return end(state, Phase.PROMOTED, f"{len(steps)} steps judged good; last: {judgement.reason}")


def end(state: RolloutState, phase: Phase, reason: str) -> RolloutState:
    """The rollout is over."""
    return replace(state, phase=phase, weight=100 if phase is Phase.PROMOTED else 0, reason=reason)


def weights(state: RolloutState, stable: RolloutState) -> Mapping[str, int]:
    """Percent of traffic for each revision while a canary is judged."""
    return {name(stable): 100 - state.weight, name(state): state.weight}


def overruled_by(state: RolloutState, history: Sequence[RolloutState]) -> RolloutState | None:
    """A rollback by hand that was asked for after this rollout, and waits for it to end."""
    waiting = [r for r in history if r.id > state.id and r.phase is Phase.WISHED and is_by_hand(r)]
    return waiting[0] if waiting and not is_by_hand(state) else None


def going_by_hand(history: Sequence[RolloutState]) -> RolloutState | None:
    """A rollback by hand that is not over."""
    return next((r for r in history if is_by_hand(r) and not r.phase.over), None)


def newest_over(history: Sequence[RolloutState]) -> RolloutState | None:
    """The rollout that ended last, if any moved traffic or tried to."""
    ended = [r for r in history if r.phase in (Phase.PROMOTED, Phase.ROLLED_BACK)]
    return ended[-1] if ended else None


def before(state: RolloutState, history: Sequence[RolloutState]) -> RolloutState | None:
    """What served until this rollout was promoted; None for the first model."""
    earlier = [r for r in history if r.phase is Phase.PROMOTED and r.id < state.id]
    return earlier[-1] if earlier else None


def origin(state: RolloutState, history: Sequence[RolloutState]) -> RolloutState:
    """The rollout by which a version first came to serve: a rollback restores that one."""
    if not is_by_hand(state):
        return state
    promoted = [r for r in history if r.phase is Phase.PROMOTED and r.digest == state.digest]
    return next((r for r in reversed(promoted) if not is_by_hand(r)), state)


def _at(state: RolloutState, step: int, steps: Sequence[int]) -> RolloutState:
    reason = f"step {step + 1} of {len(steps)}: {steps[step]} % of traffic"
    return replace(state, phase=Phase.CANARY, step=step, weight=steps[step], reason=reason)


def percents(going: RolloutState | None, steps: Sequence[int]) -> set[int | None]:
    """Which canary percents may stand on a cluster while a rollout is where it is; None: no field.

    A controller that was killed leaves those of the steps before.
    """
    if going is None:
        return {None}
    if going.phase is not Phase.CANARY:
        return {None, 0}
    earlier = {0, *steps[: going.step + 1]}
    return {*earlier, None} if going.weight == 100 else set(earlier)
