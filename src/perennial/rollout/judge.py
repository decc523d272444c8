"""Say whether a canary may take more traffic, by what it did since it got its present share."""

import math

from perennial.project import Rollout
from perennial.records import ArmTraffic, Evidence, Judgement, Verdict

STALE_INTERVALS = 3
# One fault among few requests is an accident; this many above the limit are a pattern.
CERTAIN_FAULTS = 3
# Differences below this are the machine's noise, whatever their ratio.
NOISE_MS = 20.0


def judge(evidence: Evidence, limits: Rollout, elapsed_s: float) -> Judgement:
    """One step's verdict with its sentence; what is not known holds, and at the deadline ends."""
    canary = evidence.canary
    if canary is None or not _is_fresh(evidence, limits):
        return _wait("no fresh numbers of the canary", limits, elapsed_s)
    if fault := _fault(canary, limits):
        return Judgement(Verdict.ROLL_BACK, fault)
    if gap := _gap(canary, evidence.stable, limits):
        return _wait(gap, limits, elapsed_s)
    if slow := _slowness(canary, evidence.stable, limits):
        return Judgement(Verdict.ROLL_BACK, slow)
    good = f"{canary.requests} requests, {_count(canary.server_errors, 'server error')}"
    return Judgement(Verdict.ADVANCE, f"{good}, p95 {canary.p95_ms:.0f} ms")


def _is_fresh(evidence: Evidence, limits: Rollout) -> bool:
    # Written so that an age of NaN is stale.
    return 0 <= evidence.age_s <= STALE_INTERVALS * limits.interval_s


def _wait(reason: str, limits: Rollout, elapsed_s: float) -> Judgement:
    if elapsed_s < limits.deadline_s:
        return Judgement(Verdict.HOLD, reason)
    return Judgement(Verdict.ROLL_BACK, f"{reason} within {limits.deadline_s:g} s")


def _fault(canary: ArmTraffic, limits: Rollout) -> str:
    if _is_certain(canary.server_errors, canary.requests, limits.max_error_rate):
        return _rate("server error", canary.server_errors, canary.requests, limits.max_error_rate)
    if _is_certain(canary.invalid_outputs, canary.requests, limits.max_invalid_rate):
        counted = canary.invalid_outputs, canary.requests
        return _rate("invalid output", *counted, limits.max_invalid_rate)
    return ""


def _is_certain(faults: int, requests: int, limit: float) -> bool:
    return faults > limit * max(requests, 1) and (limit == 0 or faults >= CERTAIN_FAULTS)


def _gap(canary: ArmTraffic, stable: ArmTraffic | None, limits: Rollout) -> str:
    """What is still missing for a verdict."""
    if stable is None:
        return "no fresh numbers of the serving model to compare with"
    if min(canary.server_errors, canary.invalid_outputs) < 0:
        return "counters of the canary ran backwards"
    if canary.requests < limits.min_requests:
        return f"{canary.requests} of {limits.min_requests} requests seen"
    if canary.server_errors > limits.max_error_rate * canary.requests:
        counted = canary.server_errors, canary.requests
        return "undecided: " + _rate("server error", *counted, limits.max_error_rate)
    if canary.invalid_outputs > limits.max_invalid_rate * canary.requests:
        counted = canary.invalid_outputs, canary.requests
        return "undecided: " + _rate("invalid output", *counted, limits.max_invalid_rate)
    if canary.p95_ms is None or not math.isfinite(canary.p95_ms):
        return "no latency of the canary measured"
    return ""


def _slowness(canary: ArmTraffic, stable: ArmTraffic | None, limits: Rollout) -> str:
    p95_ms = canary.p95_ms or 0.0
    if p95_ms > limits.max_p95_ms:
        return f"p95 is {p95_ms:.0f} ms, wanted at most {limits.max_p95_ms:g} ms"
    if stable is None or stable.requests < limits.min_requests or not stable.p95_ms:
        return ""
    allowed_ms = max(stable.p95_ms * limits.max_p95_ratio, stable.p95_ms + NOISE_MS)
    if p95_ms > allowed_ms:
        seen = f"p95 is {p95_ms:.0f} ms beside {stable.p95_ms:.0f} ms of the serving model"
        return f"{seen}, wanted at most {allowed_ms:.0f} ms"
    return ""


def _rate(what: str, faults: int, requests: int, limit: float) -> str:
    return f"{_count(faults, what)} in {requests} requests, wanted at most {limit:.1%}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
