"""Is a new model worth its training now? The only place that says so."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from perennial.project import Retraining
from perennial.records import Action, Decision, DriftReport, some


@dataclass(frozen=True)
class Facts:
    """All that a decision rests on; ``now`` and every other moment are event time."""

    now: datetime
    windows: tuple[DriftReport, ...]  # of the serving model, confirmed by ourselves, newest last
    last_retraining: datetime | None
    running: bool  # a run or a rollout is under way
    window_is_thin: bool


def decide(facts: Facts, rules: Retraining, known_after: timedelta) -> Decision:
    """Say whether to train now; ``known_after`` is how late a row's label is known."""
    if facts.window_is_thin:
        return Decision(Action.DECLINE, "the window has too few rows to be judged")
    drifted = drifted_in_a_row(facts.windows)
    if not drifted:
        return Decision(Action.DECLINE, "the served rows do not confirm the drift")
    if len(drifted) < rules.persistence:
        seen = f"{len(drifted)} of {rules.persistence} drifted windows in a row"
        return Decision(Action.DECLINE, seen)
    unknown = _labels_unknown(drifted, rules.min_labelled_windows, facts.now, known_after)
    if unknown:
        return Decision(Action.WAIT, unknown)
    if facts.running:
        return Decision(Action.WAIT, "a retraining or its rollout is still under way")
    cooled = facts.last_retraining + rules.cooldown if facts.last_retraining else facts.now
    if facts.now < cooled:
        return Decision(Action.WAIT, f"the last retraining is too recent; next from {_day(cooled)}")
    return Decision(Action.RETRAIN, _why(drifted))


def drifted_in_a_row(windows: Sequence[DriftReport]) -> list[DriftReport]:
    """The newest windows that drifted one after the other; thin ones are looked through."""
    found: list[DriftReport] = []
    for report in reversed([w for w in windows if not w.thin]):
        if not report.is_drift:
            break
        found.insert(0, report)
    return found


def _labels_unknown(
    drifted: Sequence[DriftReport], wanted: int, now: datetime, known_after: timedelta
) -> str | None:
    """Why there is nothing to learn the change from yet, None when there is."""
    known_at = [report.window_end + known_after for report in drifted]
    known = sum(moment <= now for moment in known_at)
    if known >= wanted:
        return None
    seen = f"the labels of {known} of {wanted} drifted window(s) are known"
    if len(known_at) < wanted:
        return f"{seen}; more drifted windows must come first"
    return f"{seen}; all of them from {_day(sorted(known_at)[wanted - 1])}"


def _why(drifted: Sequence[DriftReport]) -> str:
    return f"{len(drifted)} window(s) in a row drifted, the newest in {some(drifted[-1].drifted)}"


def _day(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M").removesuffix(" 00:00")
