"""What was known of each row at its own time? The feature table, joined point in time by Feast."""

import importlib.util
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from perennial.data import history
from perennial.errors import BadInput, RunFailed
from perennial.project import Project
from perennial.settings import Settings
from perennial.store import files

if TYPE_CHECKING:
    from feast import Entity, FeatureStore, FeatureView

SOURCE = "examples.parquet"
DEFINITIONS = Path("feature_repo") / "retail.py"
CONFIG = """\
project: {name}
provider: local
registry: registry.db
offline_store:
  type: duckdb
online_store:
  type: sqlite
  path: online.db
entity_key_serialization_version: 3
"""


@dataclass(frozen=True)
class FeatureTable:
    """How many rows the table has, and how many of them have a known label."""

    rows: int
    labelled: int


def build(
    settings: Settings, project: Project, snapshot: Path, as_of: datetime | None, out: Path
) -> FeatureTable:
    """Write the feature table: row_id, event_time, label (NaN: unknown), label_known_at, features.

    Feast joins the features to the rows as of each row's own time and materializes the newest
    window online. Raises RunFailed when labels are used before anybody could know them.
    """
    if as_of is None:
        raise BadInput("as_of is empty, wanted the moment that the snapshot was taken for")
    frame = _examples(project, pd.read_parquet(snapshot), as_of)
    check_label_times(project, frame, as_of)
    store = _store(settings, project, frame)
    entity, view = _definitions(settings, project)
    with warnings.catch_warnings():
        # Feast and ibis announce changes of their own; nothing of it is ours to mend.
        warnings.simplefilter("ignore")
        store.apply([entity, view])
        joined = _join(store, project, view, frame)
        _materialize(store, view, project, frame)
    files.write_atomic(out, joined.to_parquet(index=False, coerce_timestamps="us"))
    return FeatureTable(len(joined), int(joined["label"].notna().sum()))


def check_label_times(project: Project, frame: pd.DataFrame, as_of: datetime) -> None:
    """The label-time check: no label may be used before it can be known. Raises RunFailed."""
    least = max(project.label.known_after, _horizon(project))
    early = frame["label"].notna() & (frame["event_time"] + least > as_of)
    if early.any():
        raise RunFailed(
            f"label-time check: {int(early.sum()):,} of {len(frame):,} rows use labels before they"
            f" can be known on {as_of:%Y-%m-%d}: a label takes {least.days} days, but"
            f" label.known_after is {project.label.known_after.days} days; mend it in project.yaml"
        )


def _horizon(project: Project) -> timedelta:
    return project.label.horizon if project.kind == "transactions" else timedelta(0)


def _examples(project: Project, snapshot: pd.DataFrame, as_of: datetime) -> pd.DataFrame:
    """The rows of the table with labels blanked where they are not known yet."""
    if project.kind == "table":
        return snapshot
    frame = history.examples(project, snapshot, datetime.min.replace(tzinfo=UTC), as_of)
    if frame.empty:
        raise RunFailed(
            f"the snapshot as of {as_of:%Y-%m-%d} gives no example yet: features look back"
            " some weeks before the first cut-off; give a longer history"
        )
    known = frame["label_known_at"] <= as_of
    return frame.assign(label=frame["label"].where(known)).reset_index(drop=True)


def _store(settings: Settings, project: Project, frame: pd.DataFrame) -> "FeatureStore":
    from feast import FeatureStore

    folder = settings.state(project.name).feast
    files.write_atomic(folder / "feature_store.yaml", CONFIG.format(name=_identifier(project)))
    columns = [_key(project), "event_time", *project.feature_names]
    source = frame[columns].drop_duplicates([_key(project), "event_time"], keep="last")
    data = source.to_parquet(index=False, coerce_timestamps="us")
    files.write_atomic(folder / SOURCE, data)
    return FeatureStore(repo_path=str(folder))


def _identifier(project: Project) -> str:
    return project.name.replace("-", "_")


def _key(project: Project) -> str:
    return "customer_id" if project.kind == "transactions" else "row_id"


def _definitions(settings: Settings, project: Project) -> "tuple[Entity, FeatureView]":
    """Feast's entity and view: written by hand for retail, made from the project for a table."""
    from feast import FileSource

    if project.kind == "transactions":
        module = _load(settings.root / DEFINITIONS)
        entity, view = module.customer, module.customer_purchases
    else:
        entity, view = _table_definitions(project)
    # The DuckDB store takes a relative path from the working folder, not from the repository.
    path = str(settings.state(project.name).feast / SOURCE)
    name = view.batch_source.name
    view.batch_source = FileSource(name=name, path=path, timestamp_field="event_time")
    return entity, view


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("feature_repo_retail", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise BadInput(f"no Feast definitions at {path}; set PERENNIAL_ROOT to the project's root")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _table_definitions(project: Project) -> "tuple[Entity, FeatureView]":
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, String

    entity = Entity(name="row", join_keys=["row_id"], value_type=ValueType.INT64)
    source = FileSource(name="rows", path=SOURCE, timestamp_field="event_time")
    schema = [
        Field(name=feature.name, dtype=Float64 if feature.type == "number" else String)
        for feature in project.features
    ]
    view = FeatureView(
        name="rows", entities=[entity], ttl=timedelta(0), schema=schema, source=source, online=True
    )
    return entity, view


def _join(
    store: "FeatureStore", project: Project, view: "FeatureView", frame: pd.DataFrame
) -> pd.DataFrame:
    """Features as of each row's time, in the order of ``frame`` (Feast keeps none)."""
    about = [name for name in frame.columns if name not in project.feature_names]
    rows = frame[about].assign(_order=range(len(frame)))
    wanted = [f"{view.name}:{name}" for name in project.feature_names]
    entities = rows.rename(columns={"event_time": "event_timestamp"})
    joined = store.get_historical_features(entity_df=entities, features=wanted).to_df()
    if len(joined) != len(frame):
        raise RunFailed(f"Feast returned {len(joined):,} rows for {len(frame):,}; nothing is kept")
    joined = joined.sort_values("_order", kind="stable").reset_index(drop=True)
    for name in about:
        joined[name] = rows[name].to_numpy() if name != "event_time" else frame["event_time"].array
    return joined[[*about, *project.feature_names]]


def _materialize(
    store: "FeatureStore", view: "FeatureView", project: Project, frame: pd.DataFrame
) -> None:
    """Bring the newest window online: what a look-up by entity key would ask for."""
    newest = frame["event_time"].max().to_pydatetime()
    store.materialize(
        start_date=project.window_start(newest) - timedelta(seconds=1),
        end_date=newest + timedelta(seconds=1),
        feature_views=[view.name],
    )
