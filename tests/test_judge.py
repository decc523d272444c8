"""The judge of a canary step: nothing is promoted without evidence."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from perennial.project import Rollout
from perennial.records import ArmTraffic, Evidence, Judgement, Phase, RolloutState, Verdict
from perennial.rollout import judge, plan

LIMITS = Rollout()  # 30 requests a step, 1 % errors, 250 ms, 3 times stable, 120 s
GOOD = ArmTraffic("v2", requests=100, server_errors=0, p95_ms=20.0, invalid_outputs=0)
STABLE = ArmTraffic("v1", requests=900, server_errors=0, p95_ms=18.0, invalid_outputs=0)
Judge = Callable[[Evidence, Rollout, float], Judgement]


def say(canary: ArmTraffic | None = GOOD, stable: ArmTraffic | None = STABLE, **more) -> Judgement:
    evidence = Evidence(canary, stable, age_s=more.get("age_s", 0.1))
    return judge.judge(evidence, more.get("limits", LIMITS), more.get("elapsed_s", 5.0))


def test_a_good_canary_advances_and_says_on_what():
    judgement = say()

    assert judgement.verdict is Verdict.ADVANCE
    assert judgement.reason == "100 requests, 0 server errors, p95 20 ms"


@pytest.mark.parametrize(
    ("canary", "stable", "age_s"),
    [
        pytest.param(None, STABLE, 0.1, id="the canary's numbers are missing"),
        pytest.param(GOOD, None, 0.1, id="the stable numbers are missing"),
        pytest.param(GOOD, STABLE, 3.1, id="the numbers are older than three intervals"),
        pytest.param(GOOD, STABLE, math.nan, id="the age is not a number"),
        pytest.param(GOOD, STABLE, -1.0, id="the age is negative"),
        pytest.param(replace(GOOD, requests=0), STABLE, 0.1, id="there is no traffic"),
        pytest.param(replace(GOOD, requests=29), STABLE, 0.1, id="there is too little traffic"),
        pytest.param(replace(GOOD, p95_ms=None), STABLE, 0.1, id="latency was not measured"),
        pytest.param(replace(GOOD, p95_ms=math.nan), STABLE, 0.1, id="latency is not a number"),
        pytest.param(replace(GOOD, server_errors=-1), STABLE, 0.1, id="a counter ran backwards"),
        pytest.param(replace(GOOD, server_errors=2), STABLE, 0.1, id="two errors are undecided"),
    ],
)
def test_it_holds_and_rolls_back_at_the_deadline_when(canary, stable, age_s):
    before = say(canary, stable, age_s=age_s, elapsed_s=119.9)
    after = say(canary, stable, age_s=age_s, elapsed_s=120.0)

    assert before.verdict is Verdict.HOLD
    assert after.verdict is Verdict.ROLL_BACK
    assert after.reason == f"{before.reason} within 120 s"


@pytest.mark.parametrize(
    ("canary", "reason"),
    [
        pytest.param(
            replace(GOOD, requests=5, server_errors=3),
            "3 server errors in 5 requests, wanted at most 1.0%",
            id="errors are certain before there are enough requests",
        ),
        pytest.param(
            replace(GOOD, requests=4, invalid_outputs=1),
            "1 invalid output in 4 requests, wanted at most 0.0%",
            id="one output is invalid where none is allowed",
        ),
        pytest.param(
            replace(GOOD, p95_ms=251.0), "p95 is 251 ms, wanted at most 250 ms", id="it is slow"
        ),
        pytest.param(
            replace(GOOD, p95_ms=80.0),
            "p95 is 80 ms beside 18 ms of the serving model, wanted at most 54 ms",
            id="it is much slower than the serving model",
        ),
    ],
)
def test_it_rolls_back_at_once_when(canary, reason):
    assert say(canary) == Judgement(Verdict.ROLL_BACK, reason)


def test_errors_within_the_limit_do_not_stop_a_canary():
    assert say(replace(GOOD, requests=400, server_errors=4)).verdict is Verdict.ADVANCE


def test_some_milliseconds_are_noise_whatever_their_ratio():
    fast = replace(STABLE, p95_ms=2.0)

    assert say(replace(GOOD, p95_ms=21.0), fast).verdict is Verdict.ADVANCE
    assert say(replace(GOOD, p95_ms=23.0), fast).verdict is Verdict.ROLL_BACK


def test_at_full_traffic_there_is_no_stable_arm_to_compare_with():
    idle = replace(STABLE, requests=0, p95_ms=None)

    assert say(replace(GOOD, p95_ms=200.0), idle).verdict is Verdict.ADVANCE
    assert say(replace(GOOD, p95_ms=300.0), idle).verdict is Verdict.ROLL_BACK


REQUESTS = (0, 1, 3, 10, 29, 30, 31, 49, 200, 1000)
FAULTS = (0, 0, 0, 0, 1, 2, 3, 30)
P95 = (None, math.nan, 5.0, 30.0, 90.0, 260.0)
AGES = (0.0, 0.5, 2.9, 3.0, 3.1, 60.0, math.nan, math.inf)


@dataclass(frozen=True)
class Look:
    """What the judge is shown at one moment."""

    evidence: Evidence
    elapsed_s: float


def look(number: int) -> Look:
    """Number -> look: even ones are good, so that many histories do come to promotion."""
    if number % 2 == 0:
        return Look(Evidence(GOOD, STABLE, 0.1), 2.0)
    draw = random.Random(number)
    evidence = Evidence(arm(draw), arm(draw), draw.choice(AGES))
    return Look(evidence, draw.choice((1.0, 1.0, 130.0)))


def arm(draw: random.Random) -> ArmTraffic | None:
    if draw.random() < 0.1:
        return None
    faults = draw.choice(FAULTS), draw.choice(P95), draw.choice(FAULTS)
    return ArmTraffic("v2", draw.choice(REQUESTS), *faults)


def history(numbers: bytes) -> list[Look]:
    """Two bytes make a look."""
    return [look(int.from_bytes(numbers[i : i + 2])) for i in range(0, len(numbers) - 1, 2)]


# One draw a history: ten thousand of them take seconds.
HISTORIES = st.binary(min_size=2, max_size=16).map(history)
WISHED = RolloutState(1, "p", 2, "sha256:2", "b", "run-2", Phase.WISHED, -1, 0, "")


def walk(history: list[Look], verdict_of: Judge) -> tuple[Phase, list[Evidence]]:
    """Where a history leads, and the evidence by which each step was passed."""
    state, passed = plan.first_step(plan.start(WISHED), LIMITS.steps), []
    for seen in history:
        judgement = verdict_of(seen.evidence, LIMITS, seen.elapsed_s)
        if judgement.verdict is Verdict.ADVANCE:
            passed.append(seen.evidence)
        state = plan.after(state, judgement, LIMITS.steps)
        if state.phase.over:
            break
    return state.phase, passed


def is_evidence(evidence: Evidence) -> bool:
    canary = evidence.canary
    return (
        canary is not None
        and evidence.stable is not None
        and evidence.age_s <= 3 * LIMITS.interval_s
        and canary.requests >= LIMITS.min_requests
        and canary.server_errors <= LIMITS.max_error_rate * canary.requests
        and canary.invalid_outputs <= LIMITS.max_invalid_rate * canary.requests
        and canary.p95_ms is not None
        and canary.p95_ms <= LIMITS.max_p95_ms
    )


def check_histories(verdict_of: Judge) -> int:
    """Try 10,000 histories; AssertionError at a promotion without evidence at every step."""
    promotions = 0

    @settings(max_examples=10_000, deadline=None, database=None, phases=[Stage.generate])
    @given(HISTORIES)
    def no_promotion_without_evidence(history: list[Look]) -> None:
        nonlocal promotions
        phase, passed = walk(history, verdict_of)
        if phase is Phase.PROMOTED:
            promotions += 1
            assert len(passed) == len(LIMITS.steps)
            assert all(is_evidence(e) for e in passed)

    no_promotion_without_evidence()
    return promotions


def test_no_history_of_10_000_leads_to_promotion_without_evidence_at_each_step():
    promotions = check_histories(judge.judge)

    assert promotions > 100, "histories that never promote would prove nothing"


def without_least_requests(evidence: Evidence, limits: Rollout, elapsed_s: float) -> Judgement:
    return judge.judge(evidence, limits.model_copy(update={"min_requests": 0}), elapsed_s)


def without_freshness(evidence: Evidence, limits: Rollout, elapsed_s: float) -> Judgement:
    return judge.judge(replace(evidence, age_s=0.0), limits, elapsed_s)


def without_errors(evidence: Evidence, limits: Rollout, elapsed_s: float) -> Judgement:
    return judge.judge(evidence, limits.model_copy(update={"max_error_rate": 1.0}), elapsed_s)


def without_latency(evidence: Evidence, limits: Rollout, elapsed_s: float) -> Judgement:
    return judge.judge(evidence, limits.model_copy(update={"max_p95_ms": 1e9}), elapsed_s)


@pytest.mark.parametrize(
    "naive", [without_least_requests, without_freshness, without_errors, without_latency]
)
def test_the_same_histories_find_a_judge(naive):
    with pytest.raises(AssertionError):
        check_histories(naive)
