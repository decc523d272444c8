import io
import json
import shutil
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
import tiny
import xgboost

from perennial import bundle, project
from perennial.data import rules
from perennial.errors import BadInput
from perennial.store.files import digest_bytes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    tiny.bundle(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def sealed_again(folder: Path, name: str, data: bytes) -> None:
    """Replace a file as its maker could: manifest and digest fit."""
    (folder / "model" / name).write_bytes(data)
    path = folder / "model" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"sha256": digest_bytes(data), "size": len(data)}
    path.write_text(json.dumps(manifest))


def test_a_bundle_loads_as_it_was_made(made):
    loaded = bundle.load(made, bundle.verify(made))

    assert loaded.project == tiny.project()
    assert loaded.reference.shape == (200, 4)
    assert np.array_equal(loaded.score(loaded.golden), loaded.golden_scores)


def test_the_same_training_gives_the_same_digest_and_another_seed_another(tmp_path):
    first = tiny.bundle(tmp_path / "a")

    assert tiny.bundle(tmp_path / "b") == first
    assert tiny.bundle(tmp_path / "c", seed=1) != first


def test_a_project_with_every_length_and_moment_survives_the_bundle(root):
    shipped = [project.load(path) for path in (root / "examples").glob("*/project.yaml")]

    for each in [tiny.project(), *shipped]:
        assert project.Project.model_validate_json(bundle.project_json(each)) == each


@pytest.mark.parametrize("begin", [date(2011, 2, 15), datetime(2011, 2, 15, 12, tzinfo=UTC)])
def test_a_date_in_a_rule_survives_the_bundle_as_one(begin: date):
    args = {"column": "event_time", "min_value": begin}
    rule = project.Expectation(expect="ExpectColumnValuesToBeBetween", args=args)
    ruled = tiny.project().model_copy(update={"expectations": (rule,)})

    read = project.Project.model_validate_json(bundle.project_json(ruled)).expectations[0]

    times = {"event_time": rules.TIME}
    now, before = rules.translate(read, times), rules.translate(rule, times)
    assert now and before and begin.isoformat() in now.broken and begin.isoformat() in before.broken


def test_another_digest_than_the_expected_one_is_refused(made):
    with pytest.raises(BadInput, match="wanted sha256:00"):
        bundle.load(made, "sha256:00")


@pytest.mark.parametrize("name", [*bundle.FILES, "manifest.json"])
def test_one_changed_byte_is_refused_by_the_name_of_its_file(folder, name):
    digest = bundle.verify(folder)
    path = folder / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))

    with pytest.raises(BadInput, match=f"{name}|holds the model sha256"):
        bundle.load(folder, digest)


@pytest.mark.parametrize("name", bundle.FILES)
def test_a_missing_file_is_refused_by_its_name(folder, name):
    (folder / "model" / name).unlink()

    with pytest.raises(BadInput, match=f"{name} is missing"):
        bundle.verify(folder)


def test_a_half_written_bundle_is_none(folder):
    (folder / "model" / "manifest.json").unlink()

    with pytest.raises(BadInput, match="no bundle at"):
        bundle.verify(folder)


def test_a_file_that_the_manifest_does_not_name_is_refused(folder):
    (folder / "model" / "hook.py").write_text("print('loaded')")

    with pytest.raises(BadInput, match=r"hook.py is not in the manifest"):
        bundle.verify(folder)


def test_links_are_refused_even_to_the_right_bytes(folder, tmp_path):
    path = folder / "model" / "model.json"
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(BadInput, match=r"model.json is not a plain file"):
        bundle.verify(folder)


def test_a_closed_bundle_is_not_written_again(folder):
    with pytest.raises(BadInput, match="closed already"):
        tiny.bundle(folder)


def test_evidence_does_not_change_the_digest(folder):
    before = bundle.verify(folder)

    bundle.add_evidence(folder, "gate.json", "{}")

    assert bundle.verify(folder) == before
    assert (folder / "evidence" / "gate.json").read_text() == "{}"


def test_a_model_that_scores_its_golden_rows_differently_is_refused(folder):
    scores = np.load(folder / "model" / "golden_scores.npy")
    sealed_again(folder, "golden_scores.npy", bundle.npy(scores + 1e-5))

    with pytest.raises(BadInput, match="golden rows differently"):
        bundle.load(folder)


def test_an_array_that_would_run_code_on_loading_is_refused(folder):
    buffer = io.BytesIO()
    np.save(buffer, np.array([[print]], dtype=object), allow_pickle=True)
    sealed_again(folder, "reference.npy", buffer.getvalue())

    with pytest.raises(BadInput, match="not its format"):
        bundle.load(folder)


def test_what_is_no_model_is_refused_in_one_line(folder):
    sealed_again(folder, "model.json", b'{"learner": {}}')

    with pytest.raises(BadInput, match="not a model of xgboost") as refused:
        bundle.load(folder)
    assert "\n" not in str(refused.value)


def test_a_bundle_without_a_file_is_not_closed(tmp_path):
    files = tiny.bundle_files()
    del files["reference.npy"]

    with pytest.raises(BadInput, match=r"lacks reference.npy"):
        bundle.close(tmp_path / "b", files)
    assert not (tmp_path / "b").exists()


def test_preflight_tells_what_the_child_found(folder):
    with bundle.preflight(folder):
        pass
    sealed_again(folder, "model.json", b"{}")

    with pytest.raises(BadInput, match="not a model of xgboost"), bundle.preflight(folder):
        pass


def test_scores_are_those_of_a_plain_prediction(made):
    loaded = bundle.load(made)
    rows = loaded.golden.copy()
    rows[::3, 3] = np.nan
    plain = xgboost.DMatrix(
        rows,
        feature_names=loaded.booster.feature_names,
        feature_types=loaded.booster.feature_types,
        enable_categorical=True,
    )

    np.testing.assert_allclose(loaded.score(rows), loaded.booster.predict(plain), atol=1e-7)
