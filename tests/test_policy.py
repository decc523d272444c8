"""The policy trains when drift lasts, its labels are known and the last training is long ago."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perennial.project import Retraining
from perennial.records import Action, DriftReport, FeatureDrift
from perennial.retrain import policy

WEEK = timedelta(days=7)
START = datetime(2011, 5, 2, tzinfo=UTC)
RULES = Retraining(persistence=2, min_labelled_windows=1, cooldown=timedelta(days=28))


def window(number: int, kind: str) -> DriftReport:
    """A window that is ``d``rifted, ``s``table or ``t``hin."""
    found = FeatureDrift("recency", "ks", 0.4, 1e-6 if kind == "d" else 0.5, kind == "d", 0.0)
    return DriftReport(
        window_start=START + number * WEEK,
        window_end=START + (number + 1) * WEEK,
        model_digest="sha256:aa",
        rows=10 if kind == "t" else 500,
        thin=kind == "t",
        threshold=0.01,
        features=() if kind == "t" else (found,),
    )


def facts(kinds: str, **changes: object) -> policy.Facts:
    windows = tuple(window(n, kind) for n, kind in enumerate(kinds))
    made = policy.Facts(
        now=START + len(kinds) * WEEK,
        windows=windows,
        last_retraining=None,
        running=False,
        window_is_thin=kinds.endswith("t"),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


NO_DELAY = timedelta(0)
LONG_AGO = START - timedelta(days=365)

TABLE: dict[str, tuple[policy.Facts, timedelta, Action, str]] = {
    "two drifted windows in a row": (
        facts("sdd"),
        NO_DELAY,
        Action.RETRAIN,
        "2 window(s) in a row drifted, the newest in recency",
    ),
    "a thin window between two drifted ones": (
        facts("dtd"),
        NO_DELAY,
        Action.RETRAIN,
        "2 window(s) in a row",
    ),
    "a stable window between two drifted ones": (
        facts("dsd"),
        NO_DELAY,
        Action.DECLINE,
        "1 of 2 drifted windows in a row",
    ),
    "the first drifted window": (
        facts("sd"),
        NO_DELAY,
        Action.DECLINE,
        "1 of 2 drifted windows in a row",
    ),
    "drift that the served rows do not show": (
        facts("dds"),
        NO_DELAY,
        Action.DECLINE,
        "the served rows do not confirm the drift",
    ),
    "no served rows at all": (facts(""), NO_DELAY, Action.DECLINE, "do not confirm"),
    "a thin newest window": (facts("ddt"), NO_DELAY, Action.DECLINE, "too few rows"),
    "labels that are not known yet": (
        facts("dd"),
        timedelta(days=60),
        Action.WAIT,
        "the labels of 0 of 1 drifted window(s) are known; all of them from 2011-07-08",
    ),
    "labels that have just become known": (facts("dd"), WEEK, Action.RETRAIN, "2 window(s)"),
    "a run that goes on": (
        facts("dd", running=True),
        NO_DELAY,
        Action.WAIT,
        "a retraining or its rollout is still under way",
    ),
    "a retraining a week ago": (
        facts("dd", last_retraining=START + WEEK),
        NO_DELAY,
        Action.WAIT,
        "the last retraining is too recent; next from 2011-06-06",
    ),
    "a retraining exactly as long ago as the cooldown": (
        facts("dddd", last_retraining=START),
        NO_DELAY,
        Action.RETRAIN,
        "4 window(s)",
    ),
    "a retraining on later data than this window": (
        facts("dd", last_retraining=START + 9 * WEEK),
        NO_DELAY,
        Action.WAIT,
        "too recent",
    ),
}


@pytest.mark.parametrize(("given_", "delay", "action", "told"), TABLE.values(), ids=TABLE.keys())
def test_the_policy_answers(given_: policy.Facts, delay: timedelta, action: Action, told: str):
    decision = policy.decide(given_, RULES, delay)

    assert decision.action is action
    assert told in decision.reason


def test_more_labelled_windows_can_be_asked_for_than_have_drifted():
    rules = RULES.model_copy(update={"persistence": 1, "min_labelled_windows": 2})

    decision = policy.decide(facts("d"), rules, NO_DELAY)

    assert decision.action is Action.WAIT
    assert decision.reason.endswith("more drifted windows must come first")


kinds = st.text("dst", max_size=12)
any_rules = st.builds(
    Retraining,
    persistence=st.integers(1, 4),
    min_labelled_windows=st.integers(0, 3),
    cooldown=st.integers(0, 60).map(lambda days: timedelta(days=days)),
)
moments = st.none() | st.integers(-100, 100).map(lambda days: START + timedelta(days=days))


@given(kinds, any_rules, moments, st.booleans(), st.integers(0, 90))
def test_training_is_only_spent_on_lasting_known_and_cooled_drift(
    given_: str, rules: Retraining, last: datetime | None, running: bool, delay_days: int
):
    given_facts = facts(given_, last_retraining=last, running=running)
    delay = timedelta(days=delay_days)

    decision = policy.decide(given_facts, rules, delay)

    assert decision.reason
    if decision.action is not Action.RETRAIN:
        return
    judged = given_.replace("t", "")
    streak = len(judged) - len(judged.rstrip("d"))
    ends = [w.window_end for w in given_facts.windows if not w.thin][len(judged) - streak :]
    assert not running
    assert not given_.endswith("t")
    assert streak >= rules.persistence
    assert sum(end + delay <= given_facts.now for end in ends) >= rules.min_labelled_windows
    assert last is None or given_facts.now - last >= rules.cooldown


@given(kinds, any_rules, moments, st.booleans(), st.integers(0, 90))
def test_the_same_facts_give_the_same_decision(
    given_: str, rules: Retraining, last: datetime | None, running: bool, delay_days: int
):
    made = facts(given_, last_retraining=last, running=running)
    delay = timedelta(days=delay_days)

    assert policy.decide(made, rules, delay) == policy.decide(made, rules, delay)
