"""Which features are there, what became of each definition, and which models use it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from perennial import bundle
from perennial.data import duck
from perennial.errors import BadInput
from perennial.features import online
from perennial.features.store import Mark, Store, ViewVersion
from perennial.project import Feature, Project, tell_length
from perennial.records import Version
from perennial.settings import StateFolder
from perennial.store import scratch
from perennial.store.quality import Record

EXAMPLES = 5


@dataclass(frozen=True)
class Change:
    """A version of the view in which a feature's definition is another one."""

    version: str
    at: datetime
    what: str


@dataclass(frozen=True)
class Entry:
    """One feature; ``version`` is that of its view, empty before it was registered."""

    feature: Feature
    version: str
    models: tuple[str, ...]
    quality: Record | None

    @property
    def row(self) -> dict[str, Any]:
        """As a line of the listing."""
        return {
            "feature": self.feature.name,
            "type": self.feature.type,
            "version": self.version or None,
            "owner": self.feature.owner or None,
            "used by": ", ".join(self.models) or None,
            "quality": self.quality.verdict if self.quality else None,
            "description": self.feature.description or None,
        }


def entries(
    project: Project,
    versions: Sequence[ViewVersion],
    users: Mapping[str, tuple[str, ...]],
    quality: Mapping[str, Record],
) -> list[Entry]:
    """Every feature of a project, in its order; its version is the newest that changed it."""
    found = []
    for feature in project.features:
        last = changes(versions, feature.name)[-1:]
        version = last[0].version if last else ""
        found.append(
            Entry(feature, version, users.get(feature.name, ()), quality.get(feature.name))
        )
    return found


def changes(versions: Sequence[ViewVersion], feature: str) -> list[Change]:
    """When a feature was registered first, and what changed in it since; oldest first."""
    found: list[Change] = []
    before: Mapping[str, str] | None = None
    for version in versions:
        now = version.fields.get(feature)
        if what := _what(before, now):
            found.append(Change(f"v{version.number}", version.registered_at, what))
        before = now
    return found


def users(state: StateFolder, models: Sequence[Version]) -> dict[str, tuple[str, ...]]:
    """Names of the registered models that see each feature, from their own bundles."""
    found: dict[str, tuple[str, ...]] = {}
    for model in models:
        for name in _seen_by(state, model):
            found[name] = (*found.get(name, ()), model.label)
    return found


def examples(store: Store, project: Project, feature: str) -> list[dict[str, Any]]:
    """Some entities with their newest value, the same ones each time; empty before any was made."""
    if not store.rows.is_file():
        return []
    with scratch.folder(store.folder) as near, duck.connected(near) as connection:
        online.current(connection, store, project)
        sql = (
            f"select {store.key}, event_time, {duck.column(feature)} from current"
            f" order by {store.key} limit {EXAMPLES}"
        )
        rows = connection.execute(sql).fetchall()
    return [{store.key: k, "at": at.isoformat(), "value": value} for k, at, value in rows]


def facts(
    entry: Entry, versions: Sequence[ViewVersion], mark: Mark | None, shown: Sequence[Any]
) -> dict[str, Any]:
    """All that is known of one feature, JSON-ready."""
    feature, record = entry.feature, entry.quality
    return {
        **entry.row,
        "missing": feature.missing,
        "max age": tell_length(feature.max_age) if feature.max_age else None,
        "online up to": mark.moment.isoformat() if mark and mark.digest else None,
        "versions": [
            {"version": c.version, "at": c.at.isoformat(), "what": c.what}
            for c in changes(versions, feature.name)
        ],
        "quality": _quality(record) if record else None,
        "examples": list(shown),
    }


def named(found: Sequence[Entry], name: str, project: Project) -> Entry:
    """The entry of a feature. Raises BadInput that lists those there are."""
    entry = next((e for e in found if e.feature.name == name), None)
    if entry is None:
        raise BadInput(
            f"{project.name} has no feature {name!r}; it has {', '.join(project.feature_names)}"
        )
    return entry


def _what(before: Mapping[str, str] | None, now: Mapping[str, str] | None) -> str:
    if now is None:
        return "removed" if before is not None else ""
    if before is None:
        return "registered"
    keys = sorted({*before, *now})
    told = [
        f"{key.replace('_', ' ')}: {before.get(key) or 'none'} -> {now.get(key) or 'none'}"
        for key in keys
        if before.get(key, "") != now.get(key, "")
    ]
    return "; ".join(told)


def _seen_by(state: StateFolder, model: Version) -> list[str]:
    try:
        parts = bundle.parts(bundle.near(state, model.digest))
    except BadInput:
        # A bundle that was cleared away tells no more what it saw.
        return []
    return [str(feature["name"]) for feature in parts.contract["features"]]


def _quality(record: Record) -> dict[str, Any]:
    told = ("rows", "nulls", "least", "greatest")
    return {
        "at": record.moment.isoformat(),
        "verdict": record.verdict,
        "reason": record.reason,
        "drift": record.drift,
        **{key: record.profile[key] for key in told},
    }
