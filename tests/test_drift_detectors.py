import json
import subprocess

import numpy as np
import pytest
import tiny

from perennial import bundle
from perennial.drift import detectors
from perennial.errors import BadInput
from perennial.settings import Settings

KINDS = ("number", "category")

ALIBI = """
import json, sys
import numpy as np
from perennial.drift import detectors
cases = np.load(sys.argv[1])
found = {}
for name in sorted({key.split(":")[0] for key in cases.files}):
    detector = detectors.make(
        "alibi-detect", cases[name + ":reference"], ["n", "c"], ["number", "category"], 0.05)
    threshold, features = detector.test(cases[name + ":window"])
    found[name] = [[f.test, f.statistic, f.p_value, f.drifted, f.missing_share] for f in features]
print(json.dumps(found))
"""


def rows(count: int, seed: int, shift: float = 0.0, categories: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.normal(shift, 1, count), rng.integers(0, categories, count)])


def with_missing(matrix: np.ndarray, share: float) -> np.ndarray:
    gone = matrix.copy()
    gone[: int(share * len(gone))] = np.nan
    return gone


def rounded(matrix: np.ndarray) -> np.ndarray:
    return np.round(matrix)


def constant(count: int, value: float = 1.0) -> np.ndarray:
    return np.full((count, 2), value)


CASES = {
    "the same distribution": (rows(1000, 0), rows(500, 1)),
    "a small shift": (rows(1000, 0), rows(500, 2, shift=0.1)),
    "a shift near the threshold": (rows(400, 3), rows(200, 4, shift=0.17)),
    "a large shift": (rows(1000, 0), rows(500, 5, shift=3.0)),
    "an unseen category": (rows(1000, 0), rows(500, 6, categories=5)),
    "a category that is gone": (rows(1000, 0), rows(500, 7, categories=2)),
    "two categories": (rows(300, 8, categories=2), rows(100, 9, categories=2)),
    "ties": (rounded(rows(1000, 0)), rounded(rows(500, 10, shift=0.2))),
    "constants": (constant(200), constant(100)),
    "another constant": (constant(200), constant(100, 2.0)),
    "missing values on both sides": (
        with_missing(rows(500, 11), 0.1),
        with_missing(rows(200, 12), 0.2),
    ),
    "a small window": (rows(100, 13), rows(20, 14, shift=0.5)),
}


def found(case: str) -> list[list[object]]:
    reference, window = CASES[case]
    _, features = detectors.make("scipy", reference, ["n", "c"], KINDS, 0.05).test(window)
    return [[f.test, f.statistic, f.p_value, f.drifted, f.missing_share] for f in features]


@pytest.fixture(scope="module")
def of_alibi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[object]]]:
    """What alibi-detect says of every case, asked in the environment that has it."""
    python = Settings().runtime_python
    if not python.exists():
        pytest.skip(f"no runtime environment at {python}; run 'make env'")
    path = tmp_path_factory.mktemp("cases") / "cases.npz"
    sides = {
        f"{n}:{s}": m
        for n, c in CASES.items()
        for s, m in zip(("reference", "window"), c, strict=True)
    }
    np.savez(path, **sides)
    done = subprocess.run(
        [python, "-c", ALIBI, str(path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "the import must not talk"
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_both_backends_find_the_same_in(case, of_alibi):
    for ours, theirs in zip(found(case), of_alibi[case], strict=True):
        assert ours[0] == theirs[0]
        assert ours[1:3] == pytest.approx(theirs[1:3], abs=1e-6)
        assert ours[3:] == theirs[3:]


@pytest.mark.parametrize(
    ("case", "drifted"),
    [
        ("the same distribution", [False, False]),
        ("a large shift", [True, False]),
        ("an unseen category", [False, True]),
        ("a category that is gone", [False, True]),
        ("constants", [False, False]),
        ("another constant", [True, True]),
    ],
)
def test_drift_is_found_where_it_is_in(case, drifted):
    assert [features[3] for features in found(case)] == drifted


def test_the_threshold_is_shared_between_the_features():
    detector = detectors.make("scipy", rows(100, 0), ["n", "c"], KINDS, 0.05)

    assert detector.test(rows(100, 1))[0] == 0.025


def test_one_missing_value_does_not_hide_a_shift():
    window = rows(500, 1, shift=3.0)
    window[0, 0] = np.nan

    _, (number, _) = detectors.make("scipy", rows(500, 0), ["n", "c"], KINDS, 0.05).test(window)

    assert number.drifted
    assert number.missing_share == 0.002


def test_a_column_that_goes_missing_is_drift():
    window = rows(500, 1)
    window[:200, 0] = np.nan

    _, (number, category) = detectors.make("scipy", rows(500, 0), ["n", "c"], KINDS, 0.05).test(
        window
    )

    assert (number.test, number.statistic, number.drifted) == ("missing", 0.4, True)
    assert number.p_value < 1e-6
    assert not category.drifted


def test_a_column_that_was_always_missing_is_none():
    empty = np.full((100, 2), np.nan)

    _, features = detectors.make("scipy", empty, ["n", "c"], KINDS, 0.05).test(empty)

    assert [(f.test, f.p_value, f.drifted) for f in features] == [("missing", 1.0, False)] * 2


def test_a_window_with_another_number_of_features_is_refused():
    detector = detectors.make("scipy", rows(100, 0), ["n", "c"], KINDS, 0.05)

    with pytest.raises(BadInput, match="does not fit 2 features"):
        detector.test(rows(100, 1)[:, :1])


def test_a_large_window_is_sampled_and_always_in_the_same_way():
    window = rows(5000, 1)

    drawn = detectors.sample(window, 1000)

    assert len(drawn) == 1000
    assert np.array_equal(drawn, detectors.sample(window, 1000))
    assert detectors.sample(window, 5000) is window


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> bundle.Parts:
    folder = tmp_path_factory.mktemp("watched") / "tiny"
    tiny.bundle(folder)
    return bundle.parts(folder)


def encoded(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    from perennial.contract import learn

    return learn(tiny.project().features, tiny.rows(400)).encode(tiny.rows(count, seed, shift))


def reported(parts: bundle.Parts, matrix: np.ndarray):
    return detectors.watch(parts, "scipy").report(matrix, tiny.START, tiny.START + tiny.STEP)


def test_a_report_names_what_drifted_in_a_window_of_a_model(parts):
    report = reported(parts, encoded(100, 5, shift=2.0))

    assert report.drifted == ("a",)
    assert report.model_digest == parts.digest
    assert (report.rows, report.thin) == (100, False)


def test_a_thin_window_is_not_tested(parts):
    report = reported(parts, encoded(19, 5, shift=2.0))

    assert (report.thin, report.is_drift, report.features) == (True, False, ())


def test_a_feature_that_changes_by_nature_is_not_watched(parts):
    drift = parts.project.drift.model_copy(update={"ignore": ("a",)})
    project = parts.project.model_copy(update={"drift": drift})
    without = bundle.Parts(**{**vars(parts), "project": project})

    report = reported(without, encoded(100, 5, shift=2.0))

    assert [f.feature for f in report.features] == ["b", "c", "colour"]
    assert not report.is_drift
