"""Do labels that are made with the features come as they came in the last accepted table?

A table brings its labels, and they are judged with its other columns. Those of purchases are made
no earlier than here.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine

from perennial.data import churn, labels, leaks, sift
from perennial.data.labels import Change, Labels
from perennial.features import quality
from perennial.project import Project
from perennial.store import fence
from perennial.store import quality as records

LABEL = "label"  # among the records of features, none of which has that name


@dataclass(frozen=True)
class Derived:
    """The labels of one table as of a moment, and what was found against the last one's."""

    learned: Labels
    changes: tuple[Change, ...]
    made_by: str
    as_of: datetime

    @property
    def broken(self) -> tuple[Change, ...]:
        """What ends the run."""
        return tuple(change for change in self.changes if change.is_broken)


def judge(engine: Engine, project: Project, examples: Path, as_of: datetime) -> Derived | None:
    """Hold the labels of a file of examples against those before ``as_of``; None for a table.

    Those that another definition made are no measure.
    """
    if project.kind == "table":
        return None
    wanted = ("event_time", "label", *project.feature_names)
    table = leaks.of(project, sift.spaced(examples, wanted, leaks.MOST_ROWS))
    made_by = _definition(project)
    before = records.before(engine, project.name, as_of).get(LABEL)
    changes: tuple[Change, ...] = ()
    if before and before.profile["made_by"] == made_by:
        last = labels.from_json(before.profile["labels"])
        changes = labels.judge(last, table, project.label.max_change)
    return Derived(labels.learn(table), changes, made_by, as_of)


def keep(
    engine: Engine,
    project: Project,
    derived: Derived,
    *,
    run: str,
    now: datetime,
    guard: fence.Guard = fence.free,
) -> None:
    """Let the next table be held against this one. Raises what the guard raises."""
    profile: dict[str, Any] = {"made_by": derived.made_by, "labels": derived.learned.as_json()}
    told = records.Record(LABEL, derived.as_of, run, quality.GOOD, "", None, profile)
    records.keep(engine, project.name, [told], now, guard)


def _definition(project: Project) -> str:
    made = (churn.definition(), churn.labels_sql(project.label.horizon), *project.feature_names)
    return hashlib.sha256(" ".join(" ".join(made).split()).encode()).hexdigest()[:12]
