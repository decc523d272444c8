"""A real bundle in under a second, for tests that need a model but do not care which."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import xgboost

from perennial import bundle as bundles
from perennial import contract
from perennial.project import Project
from perennial.records import Lineage

START = datetime(2020, 1, 1, tzinfo=UTC)
STEP = timedelta(hours=1)
WINDOW_ROWS = 50
COLOURS = ("blue", "green", "red")


def project(name: str = "tiny") -> Project:
    """Three numbers and a category, in windows of 50 rows, one row an hour."""
    return Project.model_validate(
        {
            "name": name,
            "kind": "table",
            "time": {"row_order": {"start": START.isoformat(), "step": "1h"}},
            "label": {"column": "label"},
            "features": [
                {"name": "a", "type": "number"},
                {"name": "b", "type": "number"},
                {"name": "c", "type": "number"},
                {"name": "colour", "type": "category"},
            ],
            "window": {"every": f"{WINDOW_ROWS} rows", "min_rows": 20},
            "drift": {"reference_rows": 200, "window_rows": 200},
        }
    )


def rows(count: int, seed: int = 0, shift: float = 0.0) -> pd.DataFrame:
    """Invented rows with a label; ``shift`` moves column ``a`` by that many deviations."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "row_id": np.arange(count),
            "event_time": [START + i * STEP for i in range(count)],
            "a": rng.normal(size=count) + shift,
            "b": rng.normal(size=count),
            "c": rng.integers(0, 20, count).astype(float),
            "colour": rng.choice(COLOURS, count),
        }
    )
    odds = frame["a"] + (frame["colour"] == "red") - 0.5
    frame["label"] = (rng.random(count) < 1 / (1 + np.exp(-2 * odds))).astype(float)
    return frame


def bundle_files(name: str = "tiny", seed: int = 0, shift: float = 0.0) -> dict[str, bytes]:
    """The files of a small trained model."""
    wanted, frame = project(name), rows(400, seed, shift)
    learned = contract.learn(wanted.features, frame)
    matrix = learned.encode(frame)
    reference, known = matrix[-200:], learned.for_model(matrix)
    data = xgboost.DMatrix(
        known,
        label=frame["label"],
        feature_names=list(learned.names),
        feature_types=["c" if k == "category" else "q" for k in learned.kinds],
        enable_categorical=True,
        nthread=1,
    )
    params = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1, "seed": seed}
    booster = xgboost.train(params, data, num_boost_round=20)
    pins = lineage(params, seed)
    return bundles.files(booster, learned.to_json(), wanted, pins, known[:20], reference)


def lineage(params: dict[str, object], seed: int = 0) -> Lineage:
    """Pins of a model whose data nobody kept."""
    return Lineage("sha256:" + "0" * 64, "", False, params, "", seed, START + 400 * STEP)


def bundle(folder: Path, name: str = "tiny", seed: int = 0, shift: float = 0.0) -> str:
    """Write a small real bundle to ``folder`` and give its digest."""
    return bundles.close(folder, bundle_files(name, seed, shift))


def project_file(folder: Path) -> Path:
    """The project as a cluster mounts it: one YAML file, named as the project."""
    file = folder / "projects" / "tiny.yaml"
    file.parent.mkdir()
    file.write_bytes(bundles.project_json(project()))
    return file
