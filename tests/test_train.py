"""Training is made again from its pins: same rows, code, seed and trials, same digest."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest
from tiny import project, rows

from perennial import bundle, registry
from perennial.contract import Contract
from perennial.project import Project
from perennial.settings import Settings
from perennial.steps import train as step

AS_OF = datetime(2021, 1, 1, tzinfo=UTC)


def table(folder: Path, seed: int = 0) -> Path:
    frame = rows(1200, seed)
    frame["label_known_at"] = frame["event_time"]
    frame.loc[1150:, "label"] = np.nan
    path = folder / f"table-{seed}.parquet"
    frame.to_parquet(path)
    return path


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """What MLflow would have been told."""
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(registry, "track_training", lambda *args, **kw: calls.append(kw))
    return calls


def fit(
    settings: Settings,
    out: Path,
    source: Path,
    *,
    run: str = "1",
    seed: int = -1,
    trials: int = 4,
    wanted: Project | None = None,
) -> step.Fit:
    pinned = settings.model_copy(update={"code_commit": "abc"})
    return step.train(
        pinned,
        wanted or project(),
        source,
        out,
        as_of=AS_OF,
        data_digest="sha256:1",
        seed=seed,
        trials=trials,
        run=run,
    )


def test_training_twice_with_the_same_pins_gives_the_same_digest(settings, tmp_path, tracked):
    source = table(tmp_path)

    first = fit(settings, tmp_path / "a", source, run="1")
    second = fit(settings, tmp_path / "b", source, run="2")

    assert first.digest == second.digest
    assert bundle.verify(tmp_path / "a") == first.digest


@pytest.mark.parametrize("change", [{"seed": 8}, {"trials": 5}], ids=["seed", "trials"])
def test_another_pin_gives_another_digest(settings, tmp_path, tracked, change):
    source = table(tmp_path)

    first = fit(settings, tmp_path / "a", source, run="1")
    second = fit(settings, tmp_path / "b", source, run="2", **change)

    assert first.digest != second.digest


@pytest.mark.parametrize("where", ["here", pytest.param("cluster", marks=pytest.mark.stores)])
def test_a_search_that_was_cut_off_ends_where_another_would(
    settings, tmp_path, tracked, monkeypatch, request, where
):
    if where == "cluster":
        url = request.getfixturevalue("tenant_url")
        settings = settings.model_copy(update={"state_url": url, "home": tmp_path / "pod"})
    source = table(tmp_path)
    whole = fit(settings, tmp_path / "a", source, run="whole")
    tell = step._tell
    monkeypatch.setattr(step, "_tell", lambda done, *rest: 1 / 0 if done == 2 else None)
    with pytest.raises(ZeroDivisionError):
        fit(settings, tmp_path / "b", source, run="cut")
    monkeypatch.setattr(step, "_tell", tell)

    resumed = fit(settings, tmp_path / "b", source, run="cut")

    assert len(resumed.trials) == 4
    assert resumed.digest == whole.digest
    assert (settings.state("tiny").root / "studies.db").exists() == (where == "here")


def test_the_bundle_carries_all_five_pins(settings, tmp_path, tracked):
    fit(settings, tmp_path / "a", table(tmp_path))

    lineage = bundle.load(tmp_path / "a").lineage

    assert (lineage.data_digest, lineage.code_commit, lineage.code_dirty) == (
        "sha256:1",
        "abc",
        False,
    )
    assert lineage.seed == project().training.seed
    assert lineage.as_of == AS_OF
    assert lineage.lock_digest.startswith("sha256:")
    assert {"max_depth", "eta", "rounds", "trials"} <= lineage.parameters.keys()


def test_neither_run_nor_wall_time_stands_in_the_closed_part(settings, tmp_path, tracked):
    fit(settings, tmp_path / "a", table(tmp_path), run="run-4711")

    texts = [p.read_text() for p in (tmp_path / "a" / "model").glob("*.json")]

    assert not [t for t in texts if "run-4711" in t or str(datetime.now(UTC).date()) in t]


def test_the_model_knows_nothing_of_the_rows_that_judge(settings, tmp_path, tracked):
    source = table(tmp_path)
    frame = pd.read_parquet(source)
    judging = (frame["row_id"] >= 1100) & frame["label"].notna()
    frame.loc[judging, "label"] = 1 - frame.loc[judging, "label"]
    frame.to_parquet(tmp_path / "turned.parquet")

    plain = fit(settings, tmp_path / "a", source, run="1")
    turned = fit(settings, tmp_path / "b", tmp_path / "turned.parquet", run="2")

    assert plain.digest == turned.digest


def test_reference_rows_are_the_newest_windows_labelled_or_not(settings, tmp_path, tracked):
    source = table(tmp_path)
    fit(settings, tmp_path / "a", source)
    made = bundle.load(tmp_path / "a")
    learned = Contract.from_plain(made.contract)

    newest = learned.encode(pd.read_parquet(source).tail(200))

    np.testing.assert_array_equal(made.reference, newest)


def test_golden_rows_come_from_training(settings, tmp_path, tracked):
    source = table(tmp_path)
    fit(settings, tmp_path / "a", source)
    made = bundle.load(tmp_path / "a")
    learned = Contract.from_plain(made.contract)

    known = learned.encode(pd.read_parquet(source).head(1100))

    assert len(made.golden) == step.GOLDEN_ROWS
    assert all((known == row).all(axis=1).any() for row in made.golden)


def test_the_best_trial_is_the_one_with_the_best_mean_over_folds(settings, tmp_path, tracked):
    found = fit(settings, tmp_path / "a", table(tmp_path), trials=6)

    assert found.best.score == max(t.score for t in found.trials)
    assert len(found.best.scores) == project().training.folds
    assert found.scores["cv_auc"] == pytest.approx(np.mean(found.best.scores))


def test_log_loss_is_made_small_not_large(settings, tmp_path, tracked):
    training = project().training.model_copy(update={"metric": "logloss"})
    wanted = project().model_copy(update={"training": training})

    found = fit(settings, tmp_path / "a", table(tmp_path), trials=6, wanted=wanted)

    assert found.best.score == min(t.score for t in found.trials)


def test_parameters_stay_in_the_search_space(settings, tmp_path, tracked):
    found = fit(settings, tmp_path / "a", table(tmp_path), trials=8)
    space = project().training.search

    for trial in found.trials:
        for name, value in trial.parameters.items():
            low, high = getattr(space, name)
            assert low <= value <= high


def test_the_study_is_kept_under_the_run(settings, tmp_path, tracked):
    fit(settings, tmp_path / "a", table(tmp_path), run="7")

    database = settings.state("tiny").root / "studies.db"

    assert optuna.load_study(study_name="7", storage=f"sqlite:///{database}").best_value > 0.6


def test_every_trial_is_told_to_the_tracker(settings, tmp_path, tracked):
    found = fit(settings, tmp_path / "a", table(tmp_path))

    told = tracked[0]

    assert told["digest"] == found.digest
    assert [t["trial"] for t in told["trials"]] == [0, 1, 2, 3]
