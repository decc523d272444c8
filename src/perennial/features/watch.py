"""Measure the features that are online, keep what was found, and draw the page a person reads."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import pandas as pd
from sqlalchemy import Engine

from perennial.data import duck
from perennial.data.labels import Change
from perennial.data.leaks import Leak
from perennial.features import online, quality
from perennial.features.quality import Profile, Quality
from perennial.features.store import Store
from perennial.project import Feature, Project
from perennial.report import page as pages
from perennial.store import fence, scratch
from perennial.store import quality as records

_REFERENCE_ROWS = 20_000


@dataclass(frozen=True)
class Watched:
    """What was found of all features up to ``moment``."""

    moment: datetime
    found: tuple[Quality, ...]

    @property
    def verdict(self) -> str:
        return quality.worst(self.found)


def measure(engine: Engine, store: Store, project: Project, moment: datetime) -> Watched:
    """Compare the rows that tell at ``moment`` with the materialization before it.

    The first one is compared with older rows of the same table, those that train the first model.
    """
    known = records.before(engine, project.name, moment)
    with scratch.folder(store.folder) as near, duck.connected(near) as connection:
        online.current(connection, store, project, moment)
        found = [
            _feature(connection, store, feature, _profile(known, feature), moment)
            for feature in project.features
        ]
    return Watched(moment, tuple(found))


def keep(
    engine: Engine,
    project: Project,
    watched: Watched,
    *,
    run: str,
    now: datetime,
    guard: fence.Guard = fence.free,
) -> None:
    """Write what was found to the state database. Raises what the guard raises."""
    told = [
        records.Record(
            q.feature, watched.moment, run, q.verdict, q.reason, q.drift, asdict(q.profile)
        )
        for q in watched.found
    ]
    records.keep(engine, project.name, told, now, guard)


def render(
    project: Project,
    watched: Watched,
    counts: Mapping[str, int],
    written: int,
    suspected: Sequence[Leak] = (),
    changes: Sequence[Change] = (),
) -> str:
    """The page: the verdict first, then each feature, and what became of the rows."""
    judged = [q for q in watched.found if q.verdict != quality.GOOD]
    lead = (
        f"{watched.verdict}: {len(judged)} of {len(watched.found)} features differ from before."
        if judged
        else f"All {len(watched.found)} features are as before."
    )
    online = f"{written:,} rows were written online, up to {watched.moment:%F %R}."
    sections = [
        pages.Section("Features", _table(watched.found)),
        pages.Section("Leak check", _leaks(suspected)),
        *_labels(changes),
        pages.Section("Rows", _counts(counts) + pages.paragraph(online)),
    ]
    return pages.page(f"Features of {project.name}", sections, lead)


def render_refused(
    project: Project,
    suspected: Sequence[Leak],
    counts: Mapping[str, int],
    changes: Sequence[Change] = (),
) -> str:
    """The page of a table that leaks, or whose labels are not as they were."""
    sections = [
        pages.Section("Leak check", _leaks(suspected)),
        *_labels(changes),
        pages.Section("Rows", _counts(counts)),
    ]
    lead = "Stopped: features know what nobody can know when a prediction is wanted."
    if not any(leak.severity == "critical" for leak in suspected):
        lead = "Stopped: labels are not as they were in the last accepted table."
    return pages.page(f"Features of {project.name}", sections, lead)


def _leaks(suspected: Sequence[Leak]) -> str:
    tones = {"critical": "bad", "warning": "warn"}
    rows = [
        (pages.badge(leak.severity, tones[leak.severity]), leak.kind, leak.sentence)
        for leak in suspected
    ]
    return pages.table(rows, ("severity", "what is suspected", "why")) if rows else "<p>None.</p>"


def _labels(changes: Sequence[Change]) -> list[pages.Section]:
    """Nothing where there was no table before."""
    rows = [
        (pages.badge("bad", "bad") if c.is_broken else pages.badge("good", "good"), c.sentence)
        for c in changes
    ]
    return [pages.Section("Labels", pages.table(rows, ("verdict", "what was found")))][: len(rows)]


def _counts(counts: Mapping[str, int]) -> str:
    return pages.table([(kind, count) for kind, count in counts.items()], ("what", "rows"))


def _feature(
    connection: Any, store: Store, feature: Feature, before: Profile | None, moment: datetime
) -> Quality:
    values = _values(connection, f"select {duck.column(feature.name)} from current")
    if before is None:
        older = (
            f"select {duck.column(feature.name)} from offline"
            f" where event_time < (select min(event_time) from current)"
            f" order by hash({store.key}, event_time) limit {_REFERENCE_ROWS}"
        )
        reference = _values(connection, older)
        before = quality.profile(feature, reference, None) if len(reference) else None
    now = quality.profile(feature, values, before)
    judged = quality.judge(feature, now, values, before)
    # The next one is compared with bins of this one's own.
    own = quality.profile(feature, values, None)
    return Quality(judged.feature, own, judged.outside, judged.drift, judged.verdict, judged.reason)


def _values(connection: Any, sql: str) -> "pd.Series[Any]":
    frame: pd.DataFrame = connection.execute(sql).df()
    return frame.iloc[:, 0]


def _profile(known: Mapping[str, records.Record], feature: Feature) -> Profile | None:
    record = known.get(feature.name)
    if record is None:
        return None
    told = dict(record.profile)
    return Profile(**{**told, "edges": tuple(told["edges"])})


def _table(found: Sequence[Quality]) -> str:
    tones = {quality.GOOD: "good", quality.WARN: "warn", quality.BAD: "bad"}
    head = ("feature", "verdict", "reason", "no value", "least", "greatest", "stability index")
    rows = [
        (
            q.feature,
            pages.badge(q.verdict, tones[q.verdict]),
            q.reason,
            f"{q.profile.null_rate:.1%}",
            q.profile.least,
            q.profile.greatest,
            q.drift,
        )
        for q in found
    ]
    return pages.table(rows, head)
