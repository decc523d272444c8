"""How do the candidate and the champion do on the same later rows, in six dimensions?"""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from perennial import bundle
from perennial.bundle import Bundle
from perennial.contract import Contract
from perennial.data import split as splits
from perennial.errors import BadInput, RunFailed
from perennial.evaluation import (
    Evaluation,
    Judged,
    calibration,
    explanation,
    fairness,
    latency,
    performance,
)
from perennial.project import Project, parse_moment
from perennial.report import page
from perennial.steps.context import Context
from perennial.store import files, rollouts

Array = np.ndarray[Any, np.dtype[np.float64]]


class Curves(Protocol):
    """What the steps use of KFP's ClassificationMetrics."""

    def log_roc_curve(self, fpr: list[float], tpr: list[float], threshold: list[float]) -> None: ...

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None: ...


@dataclass(frozen=True)
class _Scored:
    """A model with what it says of the judging rows."""

    bundle: Bundle
    matrix: Array
    scores: Array


@dataclass(frozen=True)
class Measured:
    """An evaluation with the scores that its pictures are drawn from."""

    evaluation: Evaluation
    labels: Array
    scores: Array
    champion_scores: Array | None

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests of the models that were measured."""
        champion = self.evaluation.champion
        return (self.evaluation.candidate.digest, *([champion.digest] if champion else []))

    @property
    def auc(self) -> float:
        """AUC of the candidate; 0 when the rows hold one label only, as KFP knows no None."""
        return self.evaluation.candidate.performance.auc or 0.0

    @property
    def scores_by_name(self) -> dict[str, float]:
        """Numbers for a dashboard; what could not be measured is left out."""
        found = self.evaluation
        own = _numbers(found.candidate)
        other = _numbers(found.champion) if found.champion else {}
        named = {**own, **{f"champion_{key}": value for key, value in other.items()}}
        named["latency_p95_ms"] = found.latency.p95_ms
        named["parity_ratio"] = found.parity_ratio
        return {key: float(value) for key, value in named.items() if value is not None}

    @property
    def roc(self) -> tuple[list[float], list[float], list[float]]:
        """False and true positive rates with their thresholds."""
        fpr, tpr, cuts = performance.roc(self.labels, self.scores)
        return fpr.tolist(), tpr.tolist(), cuts.tolist()

    @property
    def confusion(self) -> list[list[int]]:
        return [list(row) for row in self.evaluation.candidate.performance.confusion]

    def draw(self, curves: "Curves") -> None:
        """Hand ROC curve and confusion matrix to a dashboard."""
        curves.log_roc_curve(*self.roc)
        curves.log_confusion_matrix(["0", "1"], self.confusion)


def run(ctx: Context, table: Path, candidate: Path, out: Path, html: Path) -> Measured:
    """Evaluate against what serves now; write the evaluation as JSON and as a page."""
    serving = rollouts.serving(ctx.engine, ctx.project.name)
    champion = bundle.near(ctx.state, serving.digest) if serving else None
    measured = evaluate(ctx.project, table, candidate, champion)
    files.write_atomic(out, measured.evaluation.to_json())
    files.write_atomic(html, render(ctx.project, measured))
    return measured


def evaluate(project: Project, table: Path, candidate: Path, champion: Path | None) -> Measured:
    """Measure both models on the rows that were kept from training."""
    frame = pd.read_parquet(table)
    kept = splits.split(project, frame)
    mine = _score(bundle.load(candidate), kept.holdout)
    theirs = _score(bundle.load(champion), kept.holdout) if champion else None
    return Measured(
        _evaluation(project, frame, kept, mine, theirs),
        _labels(kept),
        mine.scores,
        theirs.scores if theirs else None,
    )


def _evaluation(
    project: Project, frame: pd.DataFrame, kept: splits.Split, mine: _Scored, theirs: _Scored | None
) -> Evaluation:
    labels, lineage = _labels(kept), mine.bundle.lineage
    sensitive = kept.holdout[[name for name in project.sensitive if name in kept.holdout]]
    selected = (mine.scores >= performance.THRESHOLD).astype(int)
    names = [feature["name"] for feature in mine.bundle.contract["features"]]
    return Evaluation(
        as_of=lineage.as_of,
        window_start=kept.window_start,
        window_end=kept.window_end,
        table_rows=len(frame),
        early_labels=splits.early_labels(frame, lineage.as_of),
        candidate=_judged(mine, labels),
        champion=_judged(theirs, labels) if theirs else None,
        champion_may_have_seen=theirs is not None and _may_have_seen(theirs, kept.window_start),
        gain=_gain(project, labels, mine, theirs),
        fairness=fairness.measure(sensitive, labels, selected),
        importance=explanation.rank(mine.bundle.booster, mine.matrix, names, lineage.seed),
        latency=latency.measure(mine.bundle.score, mine.matrix),
    )


def _score(found: Bundle, rows: pd.DataFrame) -> _Scored:
    contract = Contract.from_plain(found.contract)
    lacking = [name for name in contract.names if name not in rows]
    if lacking:
        raise BadInput(
            f"model {found.short} wants {', '.join(lacking)}, which the feature table lacks;"
            " keep these features in project.yaml until another model serves"
        )
    matrix = contract.for_model(contract.encode(rows))
    scores = found.score(matrix)
    wrong = int((~((scores >= 0) & (scores <= 1))).sum())
    if wrong:
        raise RunFailed(f"model {found.short} gives {wrong:,} scores that are no probabilities")
    return _Scored(found, matrix, scores)


def _labels(kept: splits.Split) -> Array:
    labels: Array = kept.holdout["label"].to_numpy(dtype=np.float64)
    return labels


def _judged(scored: _Scored, labels: Array) -> Judged:
    return Judged(
        digest=scored.bundle.digest,
        as_of=scored.bundle.lineage.as_of,
        performance=performance.measure(labels, scored.scores),
        calibration=calibration.measure(labels, scored.scores),
    )


def _gain(
    project: Project, labels: Array, mine: _Scored, theirs: _Scored | None
) -> performance.Gain | None:
    if theirs is None:
        return None
    return performance.gain(
        labels,
        mine.scores,
        theirs.scores,
        confidence=project.gates.confidence,
        seed=mine.bundle.lineage.seed,
    )


def _may_have_seen(champion: _Scored, start: datetime) -> bool:
    """Did the champion train on rows as late as ``start``? Its own judging rows came after them."""
    record = champion.bundle.folder / bundle.EVIDENCE / "gate.json"
    if not record.is_file():
        return champion.bundle.lineage.as_of > start
    return parse_moment(json.loads(record.read_bytes())["window_start"]) > start


def _numbers(judged: Judged) -> dict[str, float | None]:
    found = judged.performance
    return {
        "auc": found.auc,
        "accuracy": found.accuracy,
        "precision": found.precision,
        "recall": found.recall,
        "f1": found.f1,
        "log_loss": found.log_loss,
        "brier": judged.calibration.brier,
        "calibration_error": judged.calibration.error,
        "rows": float(found.rows),
    }


def render(project: Project, measured: Measured) -> str:
    """The evaluation as one page: the answer, then each dimension with its picture."""
    found = measured.evaluation
    sections = [
        page.Section("Performance", _performance(found) + _roc_chart(measured)),
        page.Section("Confusion", _confusion(found)),
        page.Section("Calibration", _calibration(found)),
        page.Section("Fairness", _fairness(found)),
        page.Section("Explanation", _importance(found)),
        page.Section("Latency", _latency(found)),
    ]
    return page.page(f"Evaluation of a model of {project.name}", sections, lead=_lead(found))


def _lead(found: Evaluation) -> str:
    own = found.candidate.performance
    window = f"{found.window_start:%Y-%m-%d} to {found.window_end:%Y-%m-%d}"
    said = f"AUC {_number(own.auc)} on {own.rows:,} later rows, {window}"
    if found.champion is None:
        return f"{said}; nothing serves yet"
    lower = f", gain at least {found.gain.lower:+.3f}" if found.gain else ""
    return f"{said}; the champion has {_number(found.champion.performance.auc)}{lower}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _performance(found: Evaluation) -> str:
    own = _numbers(found.candidate)
    other = _numbers(found.champion) if found.champion else {}
    rows = [[name.replace("_", " "), value, other.get(name)] for name, value in own.items()]
    return page.table(rows, ["measure", "candidate", "champion"])


def _roc_chart(measured: Measured) -> str:
    grid = np.linspace(0, 1, 51)
    fpr, tpr, _ = performance.roc(measured.labels, measured.scores)
    lines = {"candidate": np.interp(grid, fpr, tpr).tolist()}
    if measured.champion_scores is not None:
        fpr, tpr, _ = performance.roc(measured.labels, measured.champion_scores)
        lines["champion"] = np.interp(grid, fpr, tpr).tolist()
    title = "ROC: share of positives found against share of false alarms"
    return page.line_chart({**lines, "chance": grid.tolist()}, grid.tolist(), title, "found")


def _confusion(found: Evaluation) -> str:
    (rest, alarms), (misses, hits) = found.candidate.performance.confusion
    rows = [["actual 0", rest, alarms], ["actual 1", misses, hits]]
    return page.table(rows, ["", "predicted 0", "predicted 1"])


def _calibration(found: Evaluation) -> str:
    bins = found.candidate.calibration.bins
    said = [b.said for b in bins]
    lines = {"what came": [b.came for b in bins], "what was said": said}
    title = f"Calibration error {found.candidate.calibration.error:.3f} over {len(bins)} bins"
    return page.line_chart(lines, said, title, "share of positives")


def _fairness(found: Evaluation) -> str:
    if not found.fairness:
        return page.paragraph("The project names no sensitive columns.")
    rows = [
        [
            f.column,
            g.value,
            g.rows,
            g.selection_rate,
            g.accuracy,
            "too small" if g.too_small else "",
        ]
        for f in found.fairness
        for g in f.groups
    ]
    told = [
        page.paragraph(f"{f.column}: parity ratio {_number(f.parity_ratio)}")
        for f in found.fairness
    ]
    heads = ["column", "group", "rows", "predicted positive", "accuracy", "note"]
    return "".join(told) + page.table(rows, heads)


def _importance(found: Evaluation) -> str:
    from matplotlib.figure import Figure

    ranked = found.importance[::-1]
    figure = Figure(figsize=(7, 0.3 * len(ranked) + 0.6))
    axes = figure.add_subplot()
    axes.barh([i.feature for i in ranked], [i.mean_abs for i in ranked])
    axes.set_xlabel("mean absolute SHAP value (log-odds)")
    strongest = ", ".join(i.feature for i in found.importance[:3])
    return page.figure(figure, alt=f"SHAP ranking; the strongest features are {strongest}")


def _latency(found: Evaluation) -> str:
    took = found.latency
    numbers = {"p50": f"{took.p50_ms:.2f} ms", "p95": f"{took.p95_ms:.2f} ms"}
    told = f"{took.requests} single rows were scored in this process, without any server."
    return page.tiles(numbers) + page.paragraph(told)
