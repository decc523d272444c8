"""What did a replay show: one JSON-ready summary from the ledger and the answers that came back."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from perennial.ledger import Entry
from perennial.records import DriftReport

RESAMPLES = 200
RESAMPLE_SEED = 7


@dataclass(frozen=True)
class WindowResult:
    """Rows of one window as they were answered, beside what the frozen first model says."""

    start: datetime
    end: datetime
    labels: np.ndarray  # [n] 0, 1 or NaN where no label was known at the end
    fresh: np.ndarray  # [n] probabilities that clients got
    frozen: np.ndarray  # [n] probabilities of the first model
    versions: tuple[str, ...]
    report: DriftReport | None


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks (Mann-Whitney); None without both classes."""
    from scipy.stats import rankdata

    known = ~np.isnan(labels)
    positive = labels[known] == 1
    ups, downs = int(positive.sum()), int((~positive).sum())
    if not ups or not downs:
        return None
    ranks = rankdata(scores[known])
    return float((ranks[positive].sum() - ups * (ups + 1) / 2) / (ups * downs))


def window_row(window: WindowResult, event: bool) -> dict[str, Any]:
    """One line of the report's window table."""
    report = window.report
    tested = sorted(report.features, key=lambda f: f.p_value) if report else []
    return {
        "start": window.start.isoformat(),
        "end": window.end.isoformat(),
        "rows": len(window.fresh),
        "thin": bool(report and report.thin),
        "drifted": list(report.drifted) if report else [],
        "auc_frozen": auc(window.labels, window.frozen),
        "auc_fresh": auc(window.labels, window.fresh),
        "versions": list(window.versions),
        "event": event,
        "top": [[f.feature, f.statistic, f.p_value] for f in tested],
    }


def pooled(windows: Sequence[WindowResult]) -> dict[str, Any]:
    """AUC over all labelled rows of the replay, frozen and kept fresh, and the interval of gain."""
    labels, frozen, fresh = (
        np.concatenate([getattr(w, name) for w in windows])
        for name in ("labels", "frozen", "fresh")
    )
    known = ~np.isnan(labels) & ~np.isnan(fresh)
    return {
        "auc_frozen": auc(labels[known], frozen[known]),
        "auc_fresh": auc(labels[known], fresh[known]),
        "rows": int(known.sum()),
        "gain_interval": gain_interval(labels[known], frozen[known], fresh[known]),
    }


def gain_interval(
    labels: np.ndarray, frozen: np.ndarray, fresh: np.ndarray
) -> tuple[float, float] | None:
    """95 % interval of AUC gained, by a paired bootstrap of rows (Efron, percentile)."""
    if auc(labels, fresh) is None:
        return None
    rng = np.random.default_rng(RESAMPLE_SEED)
    gains = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        ours, theirs = auc(labels[rows], fresh[rows]), auc(labels[rows], frozen[rows])
        if ours is not None and theirs is not None:
            gains.append(ours - theirs)
    low, high = np.quantile(gains, [0.025, 0.975])
    return float(low), float(high)


def decisions(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Each decision of the policy, oldest first; ``at`` is the end of its window."""
    return [
        {"at": e.body["window_end"], "action": e.body["action"], "reason": e.body["reason"]}
        for e in entries
        if e.kind == "decision"
    ]


def runs(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Each pipeline run with its gates and how it ended, oldest first."""
    started = [e for e in entries if e.kind == "run.started"]
    return [_run(e.body, entries) for e in started]


def _run(start: dict[str, Any], entries: Sequence[Entry]) -> dict[str, Any]:
    def of_run(kind: str) -> dict[str, Any]:
        found = [e.body for e in entries if e.kind == kind and e.body.get("run") == start["run"]]
        return found[-1] if found else {}

    gate, finished = of_run("gate"), of_run("run.finished")
    record = gate.get("record", {})
    results = record.get("results", [])
    passed = bool(results) and all(r["passed"] for r in results) if gate else None
    broken = [r["reason"] for r in results if not r["passed"]]
    fine = f"all {len(results)} limits kept" if passed else finished.get("reason", "")
    return {
        "run": start["run"],
        "trigger": start["trigger"],
        "as_of": start["as_of"],
        "state": finished.get("state", "unfinished"),
        "version": version_name(of_run("registered")),
        "candidate": record.get("candidate", "").removeprefix("sha256:")[:8] or None,
        "passed": passed,
        "reason": "; ".join(broken) or fine,
        "judged_from": record.get("window_start"),
        "gates": results,
    }


def version_name(body: dict[str, Any]) -> str | None:
    """``v2 (1f0c92aa)`` from a ledger body that names a version and a digest."""
    if not body:
        return None
    label = body["version"] if str(body["version"]).startswith("v") else f"v{body['version']}"
    return f"{label} ({body['digest'].removeprefix('sha256:')[:8]})"


def rollouts(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Each rollout with its steps and end, oldest first."""
    ends = {"promoted": "promoted", "rolled_back": "rolled back", "served": "first model"}
    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        if entry.kind not in ("rollout.step", *ends):
            continue
        body = entry.body
        row = found.setdefault(
            body["rollout"],
            {"version": version_name(body), "phase": "in flight", "reason": "", "steps": []},
        )
        if entry.kind == "rollout.step":
            wanted = ("weight", "verdict", "reason", "canary_requests")
            row["steps"].append({key: body.get(key) for key in wanted})
        else:
            row.update(phase=ends[entry.kind], reason=body.get("reason", ""))
    return list(found.values())


def answer(summary: dict[str, Any]) -> str:
    """Would retraining have paid on this data, in one sentence."""
    fresh, frozen = summary["pooled"]["auc_fresh"], summary["pooled"]["auc_frozen"]
    promoted = [r for r in summary["rollouts"] if r["phase"] == "promoted"]
    tried = max(len(summary["runs"]) - 1, 0)
    rows = summary["pooled"]["rows"]
    if not tried:
        drifted = sum(w["event"] for w in summary["windows"])
        seen = f"{drifted} of {len(summary['windows'])} windows drifted"
        return f"No retraining was needed: {seen}, and none asked for a new model."
    if fresh is None or frozen is None:
        return f"Nobody can say yet: {tried} retraining(s), but too few labels are known."
    gain = f"AUC {fresh:.3f} kept fresh against {frozen:.3f} frozen over {rows:,} labelled rows"
    if not promoted:
        return f"No: {tried} candidate(s) were tried and none earned its place ({gain})."
    low, high = summary["pooled"]["gain_interval"]
    verdict = "Yes" if low > 0 else "No" if high < 0 else "Not clearly"
    spread = f"gain {low:+.3f} to {high:+.3f}"
    return f"{verdict}: {gain} ({spread}), with {len(promoted)} of {tried} candidate(s) promoted."
