"""Does a look-up give what training would have seen at the same moment?"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import duck
from perennial.errors import PerennialError, RunFailed
from perennial.features import known, online
from perennial.features.store import Store
from perennial.features.table import MOMENT
from perennial.project import Project
from perennial.store import scratch

TOLERANCE = 1e-9


class Differs(PerennialError):
    """What is looked up is not what training saw."""


@dataclass(frozen=True)
class Mismatch:
    """One value that differs; None is a missing one."""

    feature: str
    entity: int
    online: Any
    offline: Any

    @property
    def sentence(self) -> str:
        """What is where, in a few words."""
        return (
            f"{self.feature} of {self.entity} is {self.online!r} online, {self.offline!r} offline"
        )


@dataclass(frozen=True)
class Row:
    """One feature over all entities that were compared."""

    feature: str
    values: int  # that are on both sides
    missing: int  # on both sides
    differ: int
    largest: float  # difference of numbers


@dataclass(frozen=True)
class Report:
    """What a comparison of ``entities`` at ``moment`` found."""

    moment: datetime
    entities: int
    rows: tuple[Row, ...]
    mismatches: tuple[Mismatch, ...]


def measure(store: Store, project: Project, entities: int, seed: int) -> Report:
    """Compare online with offline values of so many entities, chosen by ``seed``, in all features.

    Those that are online but not offline come first. Offline are Feast's historical features as of
    the moment of the last materialization. Raises RunFailed when there was none, or it did not end.
    """
    mark = store.mark()
    if mark is None:
        raise _not_online(project, "never ran")
    with scratch.folder(store.folder) as near, duck.connected(near) as connection:
        newest = online.current(connection, store, project)
        if newest < mark.moment:
            raise RunFailed(
                f"offline rows end at {newest:%Y-%m-%d %H:%M}, online ones at"
                f" {mark.moment:%Y-%m-%d %H:%M}; run the pipeline on the newest rows"
            )
        if not mark.digest:
            raise _not_online(project, "was cut off")
        online.current(connection, store, project, mark.moment)
        known.load(connection, store)
        keys = _chosen(connection, store, entities, seed)
    asked = pd.DataFrame({store.key: keys}).assign(**{MOMENT: pd.Timestamp(mark.moment)})
    before = store.join(asked).to_pandas().set_index(store.key).loc[keys].reset_index()
    return compare(mark.moment, store.read(keys, mark.moment), before, store.key, store.names)


def compare(
    moment: datetime, looked_up: pd.DataFrame, before: pd.DataFrame, key: str, names: Sequence[str]
) -> Report:
    """Compare two frames of the same keys in the same order, column by column."""
    rows, mismatches = [], []
    for name in names:
        row, differ = _column(name, looked_up[name], before[name])
        rows.append(row)
        mismatches += [
            Mismatch(
                name,
                int(looked_up[key].iloc[i]),
                _plain(looked_up[name], i),
                _plain(before[name], i),
            )
            for i in differ
        ]
    return Report(moment, len(looked_up), tuple(rows), tuple(mismatches))


def _not_online(project: Project, why: str) -> RunFailed:
    return RunFailed(
        f"a materialization of {project.name} {why}; run 'perennial features materialize'"
    )


def _column(
    name: str, one: "pd.Series[Any]", other: "pd.Series[Any]"
) -> tuple[Row, "np.ndarray[Any, Any]"]:
    here, there = one.notna().to_numpy(), other.notna().to_numpy()
    both = here & there
    gaps = _gaps(one[both], other[both])
    wrong = here != there
    wrong[both] = ~(gaps <= TOLERANCE)
    largest = float(gaps.max()) if len(gaps) else 0.0
    row = Row(name, int(both.sum()), int((~here & ~there).sum()), int(wrong.sum()), largest)
    return row, np.flatnonzero(wrong)


def _gaps(one: "pd.Series[Any]", other: "pd.Series[Any]") -> "np.ndarray[Any, Any]":
    """Differences of numbers; of texts 0 where they are the same, else infinite."""
    if pd.api.types.is_numeric_dtype(other):
        numbers = pd.to_numeric(one, errors="coerce").to_numpy(dtype="float64")
        gaps: np.ndarray[Any, Any] = np.abs(numbers - other.to_numpy(dtype="float64"))
    else:
        gaps = np.where(one.to_numpy() == other.to_numpy(), 0.0, np.inf)
    return gaps


def _chosen(connection: Any, store: Store, entities: int, seed: int) -> list[int]:
    sql = (
        f"select key from (select {store.key} as key, 1 as place from current union all"
        f" select key, 0 from known anti join offline on known.key = offline.{store.key})"
        f" order by place, md5(key::varchar || '-{seed}'), key limit {entities}"
    )
    return [int(key) for (key,) in connection.execute(sql).fetchall()]


def _plain(values: "pd.Series[Any]", place: int) -> Any:
    value = values.iloc[place]
    if pd.isna(value):
        return None
    return value.item() if isinstance(value, np.generic) else value
