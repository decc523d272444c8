"""Which labelled rows judge a model, and which may train it?"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import churn
from perennial.errors import RunFailed
from perennial.project import Project

LEAST_FOLD_ROWS = 40

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Rows = np.ndarray[Any, np.dtype[np.intp]]


@dataclass(frozen=True)
class Split:
    """Rows that train and the later rows that judge, which lie in one stretch of windows.

    ``left`` counts the others by why they do neither; together they are all rows.
    """

    train: pd.DataFrame
    holdout: pd.DataFrame
    window_start: datetime
    window_end: datetime
    left: Mapping[str, int]


@dataclass(frozen=True)
class Fold:
    """Positions in the training rows: fit on the older ones, score on the next ones."""

    train: Rows
    valid: Rows


def split(project: Project, frame: pd.DataFrame) -> Split:
    """Keep the newest labelled windows from training. Raises RunFailed that counts the rows.

    Also where a row would train and judge, or be nowhere.

    Rows about one entity may overlap in what decides their label (a customer is in many weeks,
    and 60 days of silence decide all of them). Half of the entities therefore judge: their older
    rows train only where the label was known before the first judging window began.
    """
    labelled = frame[frame["label"].notna()].sort_values("event_time", kind="stable")
    windows = _judging_windows(project, labelled)
    start, end = windows[0], project.window_end(windows[-1])
    judges = _judges(project, labelled)
    inside = _starts(project, labelled).isin(windows).to_numpy()
    train = _may_train(project, labelled, start, judges)
    times = labelled["event_time"]
    before = (times < start).to_numpy()
    if project.training.keep:
        train &= (times >= start - project.training.keep).to_numpy()
    _check_training(project, labelled["label"].to_numpy()[train])
    left = {
        "no label yet": int(frame["label"].isna().sum()),
        "before judging, too old or told too late": int((before & ~train).sum()),
        "since judging began, of who does not judge": int((~before & inside & ~judges).sum()),
        "since judging began, in a window with few rows": int((~before & ~inside).sum()),
    }
    _check_all(frame, train, inside & judges, left)
    return Split(
        labelled[train].reset_index(drop=True),
        labelled[inside & judges].reset_index(drop=True),
        start,
        end,
        left,
    )


def folds(project: Project, train: pd.DataFrame) -> tuple[Fold, ...]:
    """Cut training rows (as ``split`` gives them) into folds that only look forward.

    Fewer than ``training.folds`` come back where rows are few; none at all raises RunFailed.
    """
    times = train["event_time"]
    judges = _judges(project, train, coin=1)  # those of the holdout are hardly in here
    edges = _edges(times, project.training.folds)
    labels = train["label"].to_numpy()
    found = []
    stretch = sum(((times >= edge).to_numpy().astype(int) for edge in edges), np.zeros(len(train)))
    for number, start in enumerate(edges, 1):
        older = _may_train(project, train, start, judges)
        fold = Fold(np.flatnonzero(older), np.flatnonzero((stretch == number) & judges))
        if _both_classes(labels[fold.train]) and _both_classes(labels[fold.valid]):
            found.append(fold)
    if not found:
        raise RunFailed(
            f"{len(train):,} training rows give no two stretches of time with"
            f" {LEAST_FOLD_ROWS} rows and both labels each; give a longer history"
        )
    return tuple(found)


def early_labels(frame: pd.DataFrame, as_of: datetime) -> int:
    """How many rows carry a label that nobody could know at ``as_of``."""
    early = frame["label"].notna() & (frame["label_known_at"] > as_of)
    return int(early.sum())


def _judging_windows(project: Project, labelled: pd.DataFrame) -> list[datetime]:
    counts = _starts(project, labelled).value_counts()
    full = sorted(counts[counts >= project.window.min_rows].index)
    wanted = project.gates.holdout_windows
    if len(full) < wanted:
        most = int(counts.max()) if len(counts) else 0
        raise RunFailed(
            f"{len(full)} windows of {project.window.every} hold {project.window.min_rows} labelled"
            f" rows, wanted {wanted} to judge on; there are {len(labelled):,} labelled rows and at"
            f" most {most:,} in a window"
        )
    return [pd.Timestamp(moment).to_pydatetime() for moment in full[-wanted:]]


def _starts(project: Project, rows: pd.DataFrame) -> "pd.Series[Any]":
    times = rows["event_time"]
    begin = {t: project.window_start(t.to_pydatetime()) for t in times.unique()}
    return times.map(begin)


def _judges(project: Project, rows: pd.DataFrame, coin: int = 0) -> Mask:
    """Rows whose entity judges by this coin; without repeated entities every row does."""
    if project.kind != "transactions":
        return np.ones(len(rows), dtype=np.bool_)
    entity = (rows["row_id"].to_numpy() % churn.ID_ROOM).astype(np.uint64)
    # Knuth's multiplier spreads ids that follow each other; its upper bits are the coins.
    spread = (entity * np.uint64(2654435761)) % np.uint64(2**32)
    heads: Mask = (spread >> np.uint64(31 - coin)) % np.uint64(2) == 0
    return heads


def _may_train(project: Project, rows: pd.DataFrame, start: datetime, judges: Mask) -> Mask:
    """Rows older than ``start`` that tell nothing of how the judges' labels will turn out."""
    older: Mask = (rows["event_time"] < start).to_numpy()
    if project.kind != "transactions":
        return older
    known: Mask = (rows["label_known_at"] <= start).to_numpy()
    return older & (known | ~judges)


def _edges(times: "pd.Series[Any]", count: int) -> list[datetime]:
    """Moments that cut rows into ``count + 1`` stretches of about as many rows each."""
    ordered = times.sort_values().reset_index(drop=True)
    places = [len(ordered) * k // (count + 1) for k in range(1, count + 1)]
    return sorted({ordered[place] for place in places} - {ordered[0]})


def _check_training(project: Project, labels: np.ndarray[Any, Any]) -> None:
    wanted = project.training.min_rows
    if len(labels) < wanted:
        raise RunFailed(
            f"{len(labels):,} labelled rows may train, wanted at least {wanted:,}; give a longer"
            " history or lower training.min_rows"
        )
    if len(np.unique(labels)) < 2:
        raise RunFailed(f"all {len(labels):,} training rows have the label {labels[0]:g}")


def _check_all(frame: pd.DataFrame, train: Mask, judge: Mask, left: Mapping[str, int]) -> None:
    counts = {"train": int(train.sum()), "judge": int(judge.sum()), **left}
    if sum(counts.values()) != len(frame) or (train & judge).any():
        told = ", ".join(f"{what} {count:,}" for what, count in counts.items())
        raise RunFailed(f"rows were lost or doubled: of {len(frame):,} rows {told}")


def _both_classes(labels: np.ndarray[Any, Any]) -> bool:
    return len(labels) >= LEAST_FOLD_ROWS and len(np.unique(labels)) == 2
