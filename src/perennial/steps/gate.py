"""Does a candidate earn its place: each limit kept or broken, with its reason?"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from perennial import bundle
from perennial.bundle import Parts
from perennial.evaluation import Evaluation
from perennial.project import Gates
from perennial.records import GateRecord, GateResult, plain
from perennial.steps.context import Context
from perennial.store import files


def gate(ctx: Context, evaluation: Path, model: Path, judged: Path, card: Path) -> GateRecord:
    """Judge, write record and reasons into the bundle's ``evidence/`` and into the ledger.

    The bundle is copied to ``judged`` first: what a step was given is never changed.
    """
    found = Evaluation.from_json(evaluation.read_bytes())
    record = judge(found, ctx.project.gates)
    _copy(model, judged)
    parts = bundle.parts(judged, record.candidate)
    text = render(record, found)
    bundle.add_evidence(judged, "metrics.json", found.to_json())
    bundle.add_evidence(judged, "card.md", text)
    bundle.add_evidence(judged, "gate.json", json.dumps(plain(record), indent=1))
    files.write_atomic(card, text)
    ctx.ledger.append(
        "gate",
        project=ctx.project.name,
        subject=ctx.run,
        body=_body(ctx.run, record, parts, found),
        now=ctx.now,
        event_time=record.as_of,
    )
    print(f"gate: {'passed' if record.passed else 'refused'}: {record.reason}", flush=True)
    return record


def judge(found: Evaluation, gates: Gates) -> GateRecord:
    """Hold an evaluation against the limits; what could not be measured breaks its limit."""
    results = [
        _label_times(found),
        _rows(found, gates),
        _auc(found, gates),
        _gain(found, gates),
        _calibration(found, gates),
        *_parity(found, gates),
        _latency(found, gates),
    ]
    return GateRecord(
        candidate=found.candidate.digest,
        champion=found.champion.digest if found.champion else "",
        as_of=found.as_of,
        window_start=found.window_start,
        window_end=found.window_end,
        results=tuple(results),
    )


def _label_times(found: Evaluation) -> GateResult:
    early = found.early_labels
    seen = f"{early:,} of {found.table_rows:,} rows use"
    reason = f"{seen if early else 'no row uses'} a label before it can be known"
    return GateResult("label times", float(early), 0.0, found.table_rows, early == 0, reason)


def _rows(found: Evaluation, gates: Gates) -> GateResult:
    rows = found.candidate.performance.rows
    kept = rows >= gates.min_rows
    reason = f"{rows:,} rows judge, {'at least' if kept else 'wanted at least'} {gates.min_rows:,}"
    return GateResult("rows", float(rows), float(gates.min_rows), rows, kept, reason)


def _auc(found: Evaluation, gates: Gates) -> GateResult:
    return _least("AUC", found.candidate.performance.auc, gates.min_auc, _count(found))


def _gain(found: Evaluation, gates: Gates) -> GateResult:
    rows = _count(found)
    if found.champion is None:
        return GateResult("gain", None, gates.min_gain, rows, True, "nothing serves yet")
    if found.gain is None or not math.isfinite(found.gain.lower):
        reason = f"the gain over the champion could not be measured on {rows:,} rows"
        return GateResult("gain", None, gates.min_gain, rows, False, reason)
    kept = found.gain.lower > gates.min_gain
    seen = " (which may have seen these rows)" if found.champion_may_have_seen else ""
    reason = (
        f"AUC {found.gain.auc:+.3f} against the champion{seen} on {rows:,} rows; the"
        f" {found.gain.confidence:.0%} lower bound {found.gain.lower:+.3f} is"
        f" {'above' if kept else 'not above'} {gates.min_gain:.3f}"
    )
    return GateResult("gain", found.gain.lower, gates.min_gain, rows, kept, reason)


def _calibration(found: Evaluation, gates: Gates) -> GateResult:
    """A candidate may miss the limit where it still tells probabilities better than what serves."""
    error, limit = found.candidate.calibration.error, gates.max_calibration_error
    other = found.champion.calibration.error if found.champion else None
    if error > limit and other is not None and error < other:
        reason = (
            f"calibration error {error:.3f} on {_count(found):,} rows is above {limit:.3f}, but"
            f" below the champion's {other:.3f}"
        )
        return GateResult("calibration", error, limit, _count(found), True, reason)
    return _most("calibration", "calibration error", error, limit, "", _count(found))


def _parity(found: Evaluation, gates: Gates) -> list[GateResult]:
    if gates.min_parity_ratio is None:
        return []
    ratio = found.parity_ratio
    return [_least("parity ratio", ratio, gates.min_parity_ratio, _count(found))]


def _latency(found: Evaluation, gates: Gates) -> GateResult:
    took = found.latency
    return _most("latency", "p95", took.p95_ms, gates.max_p95_ms, " ms", took.requests)


def _least(name: str, measured: float | None, limit: float, rows: int) -> GateResult:
    if measured is None or not math.isfinite(measured):
        reason = f"{name} could not be measured on {rows:,} rows"
        return GateResult(name, None, limit, rows, False, reason)
    kept = measured >= limit
    word = "at least" if kept else "below"
    reason = f"{name} {measured:.3f} on {rows:,} rows is {word} {limit:.3f}"
    return GateResult(name, measured, limit, rows, kept, reason)


def _most(
    name: str, said: str, measured: float | None, limit: float, unit: str, rows: int
) -> GateResult:
    if measured is None or not math.isfinite(measured):
        reason = f"{said} could not be measured on {rows:,} rows"
        return GateResult(name, None, limit, rows, False, reason)
    kept = measured <= limit
    word = "at most" if kept else "above"
    reason = f"{said} {measured:.3f}{unit} on {rows:,} rows is {word} {limit:.3f}{unit}"
    return GateResult(name, measured, limit, rows, kept, reason)


def _count(found: Evaluation) -> int:
    return found.candidate.performance.rows


def _copy(model: Path, judged: Path) -> None:
    shutil.rmtree(judged, ignore_errors=True)
    shutil.copytree(model / bundle.MODEL, judged / bundle.MODEL)


def _body(run: str, record: GateRecord, parts: Parts, found: Evaluation) -> dict[str, Any]:
    champion = found.champion
    return {
        "run": run,
        "record": plain(record),
        "lineage": plain(parts.lineage),
        "metrics": plain(found.candidate.performance),
        "champion_metrics": plain(champion.performance) if champion else {},
    }


def render(record: GateRecord, found: Evaluation) -> str:
    """The verdict as Markdown."""
    champion = f"`{_short(record.champion)}`" if record.champion else "nothing yet"
    lines = [
        f"# {'Passed' if record.passed else 'Refused'}: candidate `{_short(record.candidate)}`",
        "",
        f"{record.reason[:1].upper()}{record.reason[1:]}.",
        "",
        f"Data up to {record.as_of:%Y-%m-%d %H:%M}. Judged on {_count(found):,} rows from"
        f" {record.window_start:%Y-%m-%d} to {record.window_end:%Y-%m-%d}, against {champion}.",
        "",
        "| limit | kept | reason |",
        "|---|---|---|",
        *(f"| {r.name} | {'yes' if r.passed else '**no**'} | {r.reason} |" for r in record.results),
    ]
    return "\n".join(lines) + "\n"


def _short(digest: str) -> str:
    return digest.removeprefix("sha256:")[:8]
