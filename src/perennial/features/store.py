"""What do Feast's stores hold of a project's features? The one module that asks Feast itself."""

import importlib.util
import sqlite3
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from perennial.data import churn, history
from perennial.errors import BadInput, Unavailable
from perennial.features import config, offline
from perennial.project import Feature, Project, tell_length
from perennial.settings import Settings

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import Entity, FeatureStore, FeatureView, Field

DEFINITIONS = Path("feature_repo") / "retail.py"
ROWS = "rows.parquet"  # each row's features at its own time: what offline and online rows are from
TIME = history.TIME  # in the stores a number, microseconds since 1970
MARK = "materialized"
KEYS = "online_keys"
_CHUNK = 10_000  # rows that are sent to the online store at a time
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICRO = timedelta(microseconds=1)


@dataclass(frozen=True)
class Mark:
    """How far a view is online; ``digest`` is that of the rows, empty while they are written."""

    moment: datetime
    digest: str
    rows: int


@dataclass(frozen=True)
class ViewVersion:
    """One version of a view: when it was registered, and each field as plain values."""

    number: int
    registered_at: datetime
    fields: Mapping[str, Mapping[str, str]]


class Store:
    """The stores of one project, with its one view of features."""

    def __init__(self, settings: Settings, project: Project) -> None:
        """Raises BadInput for wrong settings or definitions; nothing is opened yet but Feast."""
        self._settings = settings
        self._project = project
        self.folder = settings.state(project.name).feast
        self.rows = self.folder / ROWS
        self.key = history.key(project)
        self._told = config.feast(settings, project)
        with _quiet(settings):
            self._entity, self._view = _definitions(settings, project, self.rows)
            self._feast = _opened(self.folder, self._told)

    @property
    def name(self) -> str:
        """Name of the view."""
        return str(self._view.name)

    @property
    def ttl(self) -> timedelta:
        """How long a row tells of its entity; zero is for ever."""
        return self._view.ttl or timedelta(0)

    @property
    def names(self) -> tuple[str, ...]:
        """Columns of a row besides key and time: the time as a number, features, their ages."""
        return tuple(f.name for f in self._view.features)

    def apply(self) -> None:
        """Register the definitions; a changed one becomes the next version of its view."""
        config.write(self._settings, self._project)
        with _quiet(self._settings):
            self._feast.apply(
                [self._entity, self._view, *_mark_view(self._view), *_keys_view(self._view)]
            )
            if not self._settings.features_online:
                offline.let_read(self.folder / config.ONLINE)

    def publish(self) -> None:
        """Let the offline store know the rows that ``rows`` holds now, all of them or none."""
        if config.is_postgres_offline(self._settings):
            with _quiet(self._settings):
                offline.upload(self._settings, self._project, self.rows)

    def join(self, entities: pd.DataFrame) -> "pa.Table":
        """The features of each row of ``entities`` (key, event_timestamp and others) at its time.

        In an order of Feast's own.
        """
        wanted = [f"{self.name}:{name}" for name in self.names]
        with _quiet(self._settings), offline.bounded(self.folder):
            job = self._feast.get_historical_features(entity_df=entities, features=wanted)
            return job.to_arrow()

    def write(self, rows: pd.DataFrame) -> None:
        """Send rows (key, event_time and ``names``) online, each whole or not at all.

        A row takes the place of its entity's last one, whatever the times of both are. One of
        nulls alone makes its entity unknown.
        """
        with _quiet(self._settings):
            view = self._feast.get_feature_view(self.name)
            for start in range(0, len(rows), _CHUNK):
                # write_to_online_store would leave rows out that are all null.
                self._feast.provider.ingest_df(view, rows.iloc[start : start + _CHUNK])

    def read(self, keys: Sequence[int], moment: datetime) -> pd.DataFrame:
        """What is online for each key, in their order: key and ``names``.

        All of a row is missing where it was not to be had or tells nothing any more at ``moment``.
        """
        wanted = [f"{self.name}:{name}" for name in self.names]
        with _quiet(self._settings):
            found = self._feast.get_online_features(
                features=wanted, entity_rows={self.key: [int(key) for key in keys]}
            ).to_dict()
        rows = pd.DataFrame({name: found[name] for name in (self.key, *self.names)})
        return rows.where(self._tells(rows, moment) | (rows.columns == self.key)[None, :], None)

    def mark(self) -> Mark | None:
        """How far the view is online; None before the first materialization."""
        fields = ("moment", "digest", "rows")
        with _quiet(self._settings):
            found = self._feast.get_online_features(
                features=[f"{MARK}:{field}" for field in fields], entity_rows={"view": [self.name]}
            ).to_dict()
        moment, digest, rows = (found[field][0] for field in fields)
        return None if moment is None else Mark(_EPOCH + moment * _MICRO, str(digest), int(rows))

    def set_mark(self, mark: Mark) -> None:
        """Write down how far the view is online, where its rows are and with no other row."""
        row = {"view": self.name, "event_time": mark.moment, "digest": mark.digest}
        row |= {"moment": (mark.moment - _EPOCH) // _MICRO, "rows": mark.rows}
        with _quiet(self._settings):
            self._feast.write_to_online_store(MARK, pd.DataFrame([row]))

    def read_keys(self, parts: Sequence[int]) -> list[bytes]:
        """Parts of the set of keys that are online; one that was never written is empty."""
        with _quiet(self._settings):
            found = self._feast.get_online_features(
                features=[f"{KEYS}:keys"], entity_rows={"part": list(parts)}
            ).to_dict()
        return [keys or b"" for keys in found["keys"]]

    def write_keys(self, parts: Mapping[int, bytes]) -> None:
        """Write parts of that set, each whole or not at all."""
        rows = {"part": list(parts), "event_time": _EPOCH, "keys": list(parts.values())}
        with _quiet(self._settings):
            self._feast.write_to_online_store(KEYS, pd.DataFrame(rows))

    def versions(self) -> list[ViewVersion]:
        """Every version of the view, oldest first; empty before anything was registered."""
        with _quiet(self._settings):
            registry, project = self._feast.registry, self._feast.project
            told = registry.list_feature_view_versions(self.name, project)
            return [
                ViewVersion(
                    int(one["version_number"]),
                    _moment(one["created_timestamp"]),
                    _fields(
                        registry.get_feature_view_by_version(
                            self.name, project, int(one["version_number"])
                        )
                    ),
                )
                for one in told
            ]

    def close(self) -> None:
        """Let go of the stores."""
        offline.close(self._feast)

    def _tells(self, rows: pd.DataFrame, moment: datetime) -> Any:
        times = pd.to_numeric(rows[TIME], errors="coerce").to_numpy(dtype="float64")
        oldest = (moment - self.ttl - _EPOCH) // _MICRO if self.ttl else 0
        return (times >= oldest)[:, None]


@contextmanager
def opened(settings: Settings, project: Project) -> Iterator[Store]:
    """The stores of a project, for as long as the block."""
    store = Store(settings, project)
    try:
        yield store
    finally:
        store.close()


def server_app(store: Store) -> Any:
    """Feast's own feature server over a store, as an ASGI application."""
    from feast import feature_server

    with _quiet(store._settings):
        return feature_server.get_app(store._feast)


def _opened(folder: Path, told: Mapping[str, Any]) -> "FeatureStore":
    from feast import FeatureStore, RepoConfig

    folder.mkdir(parents=True, exist_ok=True)
    return FeatureStore(config=RepoConfig(repo_path=folder, **told))


@contextmanager
def _quiet(settings: Settings) -> Iterator[None]:
    """Feast and ibis announce changes of their own, and their stores fail in words of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _read_times()
        try:
            yield
        except offline.stores_fail() as exc:
            raise _silence(settings, exc) from None


def _read_times() -> None:
    """Read SQLite's timestamps as Feast writes them: IPython, imported later, reads others."""
    from feast.infra.online_stores import sqlite

    sqlite3.register_converter("timestamp", sqlite.convert_timestamp)


def _silence(settings: Settings, exc: Exception) -> Unavailable:
    """That a store fails, without the words of an error that may hold what a URL holds."""
    urls = (settings.features_online, settings.features_registry, settings.features_offline)
    named = ", ".join(config.shown(url) for url in urls if url)
    said = type(exc).__name__ if named else " ".join(str(getattr(exc, "orig", exc)).split())
    where = named or f"SQLite below {settings.home}"
    return Unavailable(
        f"a store of features does not answer ({said}): {where}; try again when it does"
    )


def _definitions(settings: Settings, project: Project, rows: Path) -> "tuple[Entity, FeatureView]":
    """Feast's entity and view: written by hand for retail, made from the project for a table."""
    if project.kind == "transactions":
        module = _load(settings.root / DEFINITIONS)
        entity, view = module.customer, module.customer_purchases
    else:
        entity, view = _table_definitions(project)
    if TIME in project.feature_names:
        raise BadInput(f"features: {TIME} is a column of our own; rename that feature")
    known = {field.name: field for field in view.features}
    unknown = [name for name in project.feature_names if name not in known]
    if unknown:
        raise BadInput(f"{DEFINITIONS} has no feature {', '.join(unknown)}; project.yaml names it")
    view.features = [_told(known[f.name], f, project) for f in project.features]
    view.features += _technical(project)
    view.batch_source = _source(settings, project, view.batch_source.name, rows)
    return entity, view


def _told(field: "Field", feature: Feature, project: Project) -> "Field":
    """A field with what the project says of it: a change of any of it is another version."""
    tags = {"type": feature.type, "missing": feature.missing, "owner": feature.owner}
    tags["max_age"] = tell_length(feature.max_age) if feature.max_age else ""
    tags["made_by"] = churn.definition() if project.kind == "transactions" else "the table"
    field.tags = {name: value for name, value in tags.items() if value}
    field.description = feature.description
    return field


def _technical(project: Project) -> "list[Field]":
    from feast import Field
    from feast.types import Float64, Int64

    ages = [history.age_name(f.name) for f in project.features if f.missing == "last_known"]
    return [Field(name=TIME, dtype=Int64), *(Field(name=n, dtype=Float64) for n in ages)]


def _source(settings: Settings, project: Project, name: str, rows: Path) -> Any:
    from feast import FileSource

    if config.is_postgres_offline(settings):
        return offline.postgres_source(name, offline.table(project))
    # The DuckDB store takes a relative path from the working folder, not from the repository.
    return FileSource(name=name, path=str(rows), timestamp_field="event_time")


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
    source = FileSource(name="rows", path=ROWS, timestamp_field="event_time")
    schema = [
        Field(name=feature.name, dtype=Float64 if feature.type == "number" else String)
        for feature in project.features
    ]
    view = FeatureView(
        name="rows", entities=[entity], ttl=timedelta(0), schema=schema, source=source, online=True
    )
    return entity, view


def _mark_view(view: "FeatureView") -> "tuple[Entity, FeatureView]":
    """Where the mark is kept: in the online store itself, so that both go or stay together."""
    from feast import Entity, FeatureView, Field, ValueType
    from feast.types import Int64, String

    entity = Entity(name="view", join_keys=["view"], value_type=ValueType.STRING)
    schema = [
        Field(name="moment", dtype=Int64),
        Field(name="digest", dtype=String),
        Field(name="rows", dtype=Int64),
    ]
    source = view.batch_source
    return entity, FeatureView(
        name=MARK, entities=[entity], ttl=timedelta(0), schema=schema, source=source, online=True
    )


def _keys_view(view: "FeatureView") -> "tuple[Entity, FeatureView]":
    """Where the keys of all rows are kept that are online, with the rows like the mark."""
    from feast import Entity, FeatureView, Field, ValueType
    from feast.types import Bytes

    entity = Entity(name="part", join_keys=["part"], value_type=ValueType.INT64)
    schema = [Field(name="keys", dtype=Bytes)]
    source = view.batch_source
    return entity, FeatureView(
        name=KEYS, entities=[entity], ttl=timedelta(0), schema=schema, source=source, online=True
    )


def _fields(view: Any) -> dict[str, dict[str, str]]:
    return {
        f.name: {**dict(f.tags), "description": str(f.description)}
        for f in view.features
        if "missing" in f.tags
    }


def _moment(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)
    return datetime.fromtimestamp(float(value), UTC)
