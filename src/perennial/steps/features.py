"""What was known of each row at its own time? The feature table, and the newest features online."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
from sqlalchemy import Engine

from perennial.data import duck, history, leaks, sift
from perennial.data.labels import Change
from perennial.data.leaks import Leak
from perennial.errors import BadInput, RunFailed
from perennial.features import online, table, truth, watch
from perennial.features import store as stores
from perennial.features.truth import Derived
from perennial.project import Project
from perennial.settings import Settings
from perennial.store import fence, files, objects, scratch
from perennial.store.engine import borrowed

PAGE = "features.html"  # below reports/, in the folder of the run


@dataclass(frozen=True)
class FeatureTable:
    """How many rows the table has, and how many of them have a known label.

    ``counts`` says what became of each row of the snapshot; ``quality`` is the verdict on the
    features that went online, ``written`` how many rows of them were new there.
    """

    rows: int
    labelled: int
    counts: Mapping[str, int] = field(default_factory=dict)
    quality: str = ""
    written: int = 0

    @property
    def told(self) -> dict[str, str | int]:
        """As metadata: the verdict, and what the rows of the snapshot were."""
        counts = {f"rows_{kind.replace(' ', '_')}": count for kind, count in self.counts.items()}
        return {"quality": self.quality, "written": self.written, **counts}


@dataclass(frozen=True)
class Origin:
    """Who makes features: the run, its time, and who may still write for it."""

    run: str
    now: datetime
    guard: fence.Guard = fence.free


@dataclass(frozen=True)
class _Judged:
    suspected: tuple[Leak, ...]
    labels: Derived | None


def build(
    settings: Settings,
    project: Project,
    snapshot: Path,
    as_of: datetime | None,
    out: Path,
    *,
    page: Path,
    origin: Origin,
) -> FeatureTable:
    """Write the feature table: row_id, event_time, label (NaN: unknown), label_known_at, features.

    Feast joins the features to the rows as of each row's own time (``feature_time`` says which row
    of features that was), and the newest ones go online. Raises RunFailed when labels are used
    before anybody could know them, when a feature misses a value that may not, when the leak check
    is sure, when labels that are made here come otherwise than in the last accepted table, or when
    rows are lost; BadInput without ``as_of``.
    """
    if as_of is None:
        raise BadInput("as_of is empty, wanted the moment that the snapshot was taken for")
    with (
        stores.opened(settings, project) as store,
        scratch.folder(store.folder) as near,
        borrowed(settings.state(project.name).url) as engine,
    ):

        def judge(examples: Path, counts: Mapping[str, int]) -> _Judged:
            _check(project, examples, as_of)
            labels = truth.judge(engine, project, examples, as_of)
            judged = _Judged(find_leaks(project, examples), labels)
            _refuse(settings, project, judged, counts, page, origin)
            return judged

        # Once before Feast has any of it, and once more with the times that it joined by.
        made = table.draft(project, store, snapshot, as_of, near, judge)
        judged = judge(made.path, made.counts)
        table.publish(made.path, out)
        with engine.begin() as connection:
            origin.guard(connection)
        done = online.materialize(store, project)
        seen = _watched(engine, store, project, done.moment, origin)
        _keep_labels(engine, project, judged.labels, origin)
    text = watch.render(
        project, seen, made.counts, done.written, judged.suspected, _changes(judged.labels)
    )
    files.write_atomic(page, text)
    return FeatureTable(made.rows, made.labelled, made.counts, seen.verdict, done.written)


def _check(project: Project, made: Path, as_of: datetime) -> None:
    """What must hold of a table before anybody sees it."""
    names = [f.name for f in project.features if f.missing == "fail"]
    frame = pd.read_parquet(made, columns=["event_time", "label"])
    check_label_times(project, frame, as_of)
    with duck.connected(made.parent) as connection:
        duck.view(connection, "made", made)
        for name in names:
            sql = f"select count(*) - count({duck.column(name)}) from made"
            check_missing(name, int(connection.execute(sql).fetchone()[0]), len(frame))


def find_leaks(project: Project, made: Path) -> tuple[Leak, ...]:
    """The leak check: which features know what nobody can know when a prediction is wanted?"""
    has = set(pq.read_schema(made).names)
    wanted = ("event_time", "label", "label_known_at", history.TIME, history.key(project))
    columns = [c for c in dict.fromkeys((*wanted, *project.feature_names)) if c in has]
    rows = sift.spaced(made, columns, leaks.MOST_ROWS)
    view = leaks.View("the feature table", project.feature_names, history.TIME)
    return leaks.check(leaks.of(project, rows, (view,) if history.TIME in has else ()))


def _refuse(
    settings: Settings,
    project: Project,
    judged: _Judged,
    counts: Mapping[str, int],
    page: Path,
    origin: Origin,
) -> None:
    """No model may learn from a leak or wrong labels. Raises RunFailed, once the page is there."""
    critical = [leak for leak in judged.suspected if leak.severity == "critical"]
    broken = judged.labels.broken if judged.labels else ()
    if not critical and not broken:
        return
    text = watch.render_refused(project, judged.suspected, counts, _changes(judged.labels))
    files.write_atomic(page, text)
    reports = objects.Folder(settings.state(project.name).artifacts("reports"))
    shown = reports.write(f"{origin.run}/{PAGE}", text)
    told = (("leak check", critical), ("labels are not as they were", broken))
    said = "; ".join(
        f"{what}: {'; '.join(one.sentence for one in found)}" for what, found in told if found
    )
    raise RunFailed(f"{said}; see {shown}")


def _changes(labels: Derived | None) -> Sequence[Change]:
    return labels.changes if labels else ()


def _keep_labels(engine: Engine, project: Project, labels: Derived | None, origin: Origin) -> None:
    if labels:
        truth.keep(engine, project, labels, run=origin.run, now=origin.now, guard=origin.guard)


def check_missing(feature: str, missing: int, rows: int) -> None:
    """No row may go without a feature whose policy is fail. Raises RunFailed."""
    if missing:
        raise RunFailed(
            f"{feature} has no value in {missing:,} of {rows:,} rows, and its policy is"
            " 'missing: fail'; mend the source, or choose last_known or allow in project.yaml"
        )


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


def _watched(
    engine: Engine, store: stores.Store, project: Project, moment: datetime, origin: Origin
) -> watch.Watched:
    seen = watch.measure(engine, store, project, moment)
    watch.keep(engine, project, seen, run=origin.run, now=origin.now, guard=origin.guard)
    return seen
