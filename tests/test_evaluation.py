"""Each dimension gives the number that its own library or a hand calculation gives."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from sklearn import metrics as sk

from perennial import bundle
from perennial.errors import BadInput
from perennial.evaluation import (
    Evaluation,
    calibration,
    explanation,
    fairness,
    latency,
    performance,
)
from perennial.project import Project
from perennial.steps import evaluate as step


def scored(rows: int = 500, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores with many ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, rows).astype(float)
    return labels, np.clip((labels * 0.3 + rng.random(rows)) / 1.3, 0, 1).round(2)


def table(folder: Path, seed: int = 5) -> Path:
    """Rows whose newest full window has 50 labels; with a sensitive column beside the features."""
    frame = tiny.rows(1200, seed)
    frame["label_known_at"] = frame["event_time"]
    frame["branch"] = np.where(frame["row_id"] % 3 == 0, "north", "south")
    frame.to_parquet(folder / "table.parquet")
    return folder / "table.parquet"


def project(**more: object) -> Project:
    return tiny.project().model_copy(update={"sensitive": ("branch",), **more})


def test_performance_agrees_with_scikit_learn():
    labels, scores = scored()
    predicted = scores >= 0.5

    found = performance.measure(labels, scores)

    assert found.auc == pytest.approx(sk.roc_auc_score(labels, scores))
    assert found.accuracy == pytest.approx(sk.accuracy_score(labels, predicted))
    assert found.precision == pytest.approx(sk.precision_score(labels, predicted))
    assert found.recall == pytest.approx(sk.recall_score(labels, predicted))
    assert found.f1 == pytest.approx(sk.f1_score(labels, predicted))
    assert found.log_loss == pytest.approx(sk.log_loss(labels, np.clip(scores, 1e-15, 1 - 1e-15)))
    assert np.array_equal(found.confusion, sk.confusion_matrix(labels, predicted))


def test_rows_with_one_label_have_no_auc():
    found = performance.measure(np.ones(20), np.linspace(0, 0.4, 20))

    assert found.auc is None
    assert found.precision is None
    assert found.recall == 0


def test_a_roc_curve_is_finite_and_encloses_the_auc():
    labels, scores = scored()

    fpr, tpr, cuts = performance.roc(labels, scores)

    assert np.isfinite([fpr, tpr, cuts]).all()
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(sk.roc_auc_score(labels, scores), abs=0.01)


def test_a_model_gains_nothing_over_itself():
    labels, scores = scored()

    found = performance.gain(labels, scores, scores, confidence=0.95)

    assert (found.auc, found.lower) == (0, 0)


def test_a_better_model_gains_surely_and_a_worse_one_does_not():
    labels, scores = scored()
    noise = np.random.default_rng(2).random(len(labels))

    better = performance.gain(labels, scores, noise, confidence=0.95)
    worse = performance.gain(labels, noise, scores, confidence=0.95)

    assert better.auc > better.lower > 0
    assert worse.lower < worse.auc < 0


def test_the_bound_of_a_gain_covers_what_an_ordinary_bootstrap_covers():
    labels, scores = scored(200)
    noise = np.clip(scores + np.random.default_rng(3).normal(0, 0.2, 200), 0, 1)
    rng = np.random.default_rng(4)
    draws = [rng.integers(0, 200, 200) for _ in range(1500)]
    plain = [
        sk.roc_auc_score(labels[d], scores[d]) - sk.roc_auc_score(labels[d], noise[d])
        for d in draws
    ]

    found = performance.gain(labels, scores, noise, confidence=0.95)

    assert found.lower == pytest.approx(np.quantile(plain, 0.05), abs=0.005)


def test_calibration_is_perfect_where_probabilities_come_true():
    scores = np.repeat([0.1, 0.5, 0.9], 100)
    labels = np.concatenate([np.arange(100) % 10 < share for share in (1, 5, 9)]).astype(float)

    found = calibration.measure(labels, scores)

    assert found.error < 0.05
    assert calibration.measure(1 - labels, scores).error > 0.4
    assert sum(b.rows for b in found.bins) == 300


def test_parity_is_the_least_selection_rate_over_the_greatest():
    groups = pd.DataFrame({"sex": ["f"] * 100 + ["m"] * 100})
    chosen = np.r_[np.arange(100) < 20, np.arange(100) < 50].astype(int)

    (found,) = fairness.measure(groups, np.zeros(200), chosen)

    assert found.parity_ratio == pytest.approx(0.4)
    assert [(g.value, g.selection_rate) for g in found.groups] == [("f", 0.2), ("m", 0.5)]


def test_a_group_below_fifty_rows_is_named_and_not_judged():
    groups = pd.DataFrame({"sex": ["f"] * 49 + ["m"] * 100 + ["x"] * 100})
    chosen = np.r_[np.zeros(49), np.arange(200) % 2].astype(int)

    (found,) = fairness.measure(groups, np.zeros(249), chosen)

    assert [g.value for g in found.groups if g.too_small] == ["f"]
    assert found.parity_ratio == 1


def test_a_sensitive_number_is_looked_at_by_its_quarters():
    ages = pd.DataFrame({"age": [float("nan"), *range(1, 400)]})

    (found,) = fairness.measure(ages, np.zeros(400), np.zeros(400, dtype=int))

    assert len(found.groups) == 5
    assert "missing" in [g.value for g in found.groups]
    assert found.parity_ratio is None


def test_the_feature_that_makes_the_label_explains_most(tmp_path):
    tiny.bundle(tmp_path / "b")
    made = bundle.load(tmp_path / "b")

    found = explanation.rank(made.booster, made.reference, ["a", "b", "c", "colour"])

    assert {found[0].feature, found[1].feature} == {"a", "colour"}
    assert found[0].mean_abs > 5 * found[-1].mean_abs


def test_latency_is_read_from_the_clock_for_each_row():
    times = iter(np.arange(0, 10, 0.005))

    found = latency.measure(lambda row: row, np.zeros((3, 2)), 50, clock=lambda: next(times))

    assert (found.p50_ms, found.p95_ms) == pytest.approx((5, 5))


def test_candidate_and_champion_are_measured_on_the_same_rows(tmp_path):
    tiny.bundle(tmp_path / "mine")
    tiny.bundle(tmp_path / "theirs", seed=1)

    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", tmp_path / "theirs")

    evaluation = found.evaluation
    assert evaluation.champion.performance.rows == evaluation.candidate.performance.rows == 50
    assert evaluation.gain.auc == pytest.approx(
        evaluation.candidate.performance.auc - evaluation.champion.performance.auc
    )
    assert [f.column for f in evaluation.fairness] == ["branch"]


def test_without_a_champion_there_is_no_gain(tmp_path):
    tiny.bundle(tmp_path / "mine")

    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", None).evaluation

    assert (found.champion, found.gain, found.champion_may_have_seen) == (None, None, False)


@pytest.mark.parametrize(("days", "seen"), [(-1, False), (0, False), (1, True)])
def test_a_champion_that_was_judged_on_later_rows_may_have_seen_these(tmp_path, days, seen):
    tiny.bundle(tmp_path / "mine")
    tiny.bundle(tmp_path / "theirs", seed=1)
    start = tiny.START + 1150 * tiny.STEP + timedelta(days=days)
    record = json.dumps({"window_start": start.isoformat()})
    bundle.add_evidence(tmp_path / "theirs", "gate.json", record)

    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", tmp_path / "theirs")

    assert found.evaluation.champion_may_have_seen is seen


def test_a_champion_that_wants_a_lost_feature_is_named(tmp_path):
    tiny.bundle(tmp_path / "mine")
    frame = pd.read_parquet(table(tmp_path)).drop(columns="b")
    frame.to_parquet(tmp_path / "table.parquet")

    with pytest.raises(BadInput, match="wants b, which the feature table lacks"):
        step.evaluate(project(), tmp_path / "table.parquet", tmp_path / "mine", None)


def test_an_evaluation_comes_back_from_json_as_it_was(tmp_path):
    tiny.bundle(tmp_path / "mine")
    tiny.bundle(tmp_path / "theirs", seed=1)
    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", tmp_path / "theirs")

    again = Evaluation.from_json(found.evaluation.to_json())

    assert again == found.evaluation
    assert again.as_of.tzinfo is not None
    assert again.as_of < datetime.now(UTC)


def test_the_page_shows_every_dimension_with_pictures(tmp_path):
    tiny.bundle(tmp_path / "mine")
    tiny.bundle(tmp_path / "theirs", seed=1)
    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", tmp_path / "theirs")

    html = step.render(project(), found)

    for title in ("Performance", "Confusion", "Calibration", "Fairness", "Explanation", "Latency"):
        assert f">{title}</h2>" in html
    assert html.count("<svg") == 3
    assert "champion has" in html
    assert "http://" not in html and "https://" not in html


def test_numbers_for_a_dashboard_are_all_finite(tmp_path):
    tiny.bundle(tmp_path / "mine")
    found = step.evaluate(project(), table(tmp_path), tmp_path / "mine", None)

    assert np.isfinite(list(found.scores_by_name.values())).all()
    assert np.isfinite(found.roc).all()
    assert sum(map(sum, found.confusion)) == 50
