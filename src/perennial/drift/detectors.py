"""Do a window's rows come from another distribution than the reference rows?"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol

import numpy as np
from scipy.stats import chi2_contingency, ks_2samp

from perennial.bundle import Parts
from perennial.drift import light
from perennial.drift.windows import Matrix
from perennial.errors import BadInput
from perennial.records import DriftReport, FeatureDrift

Kind = Literal["number", "category"]
Backend = Literal["alibi-detect", "scipy"]

# A column that goes missing has no rows to compare, so a jump of its missing share is drift itself.
MISSING_JUMP = 0.2


class Detector(Protocol):
    """Compares windows with the reference rows it was made with."""

    def test(self, window: Matrix) -> tuple[float, tuple[FeatureDrift, ...]]:
        """The threshold of a p-value, and what was found for each feature."""
        ...


class Compare(Protocol):
    """One feature's reference values, ready to be compared: statistic and p-value."""

    def __call__(self, values: Matrix) -> tuple[float, float]: ...


@dataclass(frozen=True)
class _Column:
    feature: str
    kind: Kind
    reference: Matrix  # NaN where missing
    compare: Compare | None  # None: no reference value to compare with

    def test(self, values: Matrix, threshold: float) -> FeatureDrift:
        gone = float(np.isnan(values).mean())
        jump = abs(gone - float(np.isnan(self.reference).mean()))
        present = values[~np.isnan(values)]
        if jump > MISSING_JUMP or self.compare is None or not len(present):
            return self._missing(values, gone, jump)
        statistic, p_value = self.compare(present)
        test = "chi2" if self.kind == "category" else "ks"
        found = p_value < threshold
        return FeatureDrift(self.feature, test, statistic, p_value, found, gone)

    def _missing(self, values: Matrix, gone: float, jump: float) -> FeatureDrift:
        counts = [_presence(self.reference), _presence(values)]
        # A share that both sides have at 0 or 1 makes an empty column in the table.
        p_value = float(chi2_contingency(counts).pvalue) if np.all(np.sum(counts, axis=0)) else 1.0
        return FeatureDrift(self.feature, "missing", jump, p_value, jump > MISSING_JUMP, gone)


@dataclass(frozen=True)
class _Columns:
    columns: tuple[_Column, ...]
    threshold: float

    def test(self, window: Matrix) -> tuple[float, tuple[FeatureDrift, ...]]:
        if window.ndim != 2 or window.shape[1] != len(self.columns):
            raise BadInput(
                f"a window of shape {window.shape} does not fit {len(self.columns)} features"
            )
        pairs = zip(self.columns, window.T, strict=True)
        return self.threshold, tuple(c.test(values, self.threshold) for c, values in pairs)


def make(
    backend: Backend,
    reference: Matrix,
    features: Sequence[str],
    kinds: Sequence[Kind],
    p_value: float,
) -> Detector:
    """Make a detector: KS for numbers, chi2 for categories, Bonferroni over the features.

    NaN means missing and is left out feature by feature: one NaN would hide a whole column.
    """
    prepare = _alibi if backend == "alibi-detect" else _scipy
    columns = []
    for name, kind, values in zip(features, kinds, reference.T, strict=True):
        present = values[~np.isnan(values)]
        compare = prepare(kind, present, p_value) if len(present) else None
        columns.append(_Column(name, kind, values, compare))
    return _Columns(tuple(columns), p_value / max(len(columns), 1))


@dataclass(frozen=True)
class Watch:
    """The detector of one model: which columns it looks at, and how many rows it needs."""

    digest: str
    columns: tuple[int, ...]
    detector: Detector
    min_rows: int
    max_rows: int

    def report(self, matrix: Matrix, start: datetime, end: datetime) -> DriftReport:
        """Say of one window's rows (all features, encoded by the contract) what drifted."""
        rows = len(matrix)
        if rows < self.min_rows:
            return DriftReport(start, end, self.digest, rows, True, 0.0, ())
        tested = sample(matrix, self.max_rows)[:, list(self.columns)]
        threshold, found = self.detector.test(tested)
        return DriftReport(start, end, self.digest, rows, False, threshold, found)


def watch(parts: Parts, backend: Backend | None = None) -> Watch:
    """Make the detector of a bundle's model, over the features that its project watches."""
    project, kinds = parts.project, {f.name: f.type for f in parts.project.features}
    names = [f["name"] for f in parts.contract["features"]]
    watched = [n for n in names if n in project.watched]
    columns = tuple(names.index(n) for n in watched)
    detector = make(
        backend or project.drift.backend,
        parts.reference[:, list(columns)],
        watched,
        [kinds[n] for n in watched],
        project.drift.p_value,
    )
    return Watch(
        parts.digest, columns, detector, project.window.min_rows, project.drift.window_rows
    )


def sample(matrix: Matrix, rows: int, seed: int = 0) -> Matrix:
    """At most ``rows`` rows, drawn without replacement; the same rows give the same draw."""
    if len(matrix) <= rows:
        return matrix
    drawn = np.random.default_rng(seed).choice(len(matrix), rows, replace=False)
    return matrix[np.sort(drawn)]


def _presence(values: Matrix) -> list[int]:
    missing = int(np.isnan(values).sum())
    return [missing, len(values) - missing]


def _scipy(kind: Kind, reference: Matrix, p_value: float) -> Compare:
    return _chi2(reference) if kind == "category" else _ks(reference)


def _ks(reference: Matrix) -> Compare:
    def compare(values: Matrix) -> tuple[float, float]:
        found = ks_2samp(reference, values, alternative="two-sided", method="asymp")
        return _single(found.statistic), _single(found.pvalue)

    return compare


def _chi2(reference: Matrix) -> Compare:
    def compare(values: Matrix) -> tuple[float, float]:
        every = np.union1d(reference, values)
        found = chi2_contingency(
            [[(side == v).sum() for v in every] for side in (reference, values)]
        )
        return _single(found.statistic), _single(found.pvalue)

    return compare


def _single(value: float) -> float:
    # alibi-detect answers in 32 bits; a verdict at the very threshold must not hang on the backend.
    return float(np.float32(value))


def _alibi(kind: Kind, reference: Matrix, p_value: float) -> Compare:
    categories = {0: None} if kind == "category" else {}
    detector = _tabular_drift()(
        reference[:, None], p_val=p_value, categories_per_feature=categories
    )

    def compare(values: Matrix) -> tuple[float, float]:
        found = detector.predict(values[:, None])["data"]
        return float(found["distance"][0]), float(found["p_val"][0])

    return compare


def _tabular_drift() -> Callable[..., Any]:
    """alibi-detect's TabularDrift, without the six seconds that its package spends on others."""
    try:
        for name in ("alibi_detect", "alibi_detect.cd", "alibi_detect.utils"):
            light.package(name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from alibi_detect.cd.tabular import TabularDrift
    except ImportError as exc:
        raise BadInput(
            "alibi-detect is not installed here; set drift.backend to scipy in project.yaml"
        ) from exc
    found: Callable[..., Any] = TabularDrift
    return found
