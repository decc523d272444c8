"""Which features know what nobody can know when the prediction is wanted?

Limits stand in the gap between what honest features of five public tables measure, cut into slices
of time and drawn anew, and what planted leaks do; docs/breaks.md has the table of measurements.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from perennial.data import alone, columns, sources
from perennial.data.alone import MOST, MOST_TWO_VALUED
from perennial.project import Project

MOST_ROWS = 100_000
_NEWEST_ROWS = 20_000  # of which the order counts
_MODEL_ROWS = 20_000
_SHIFTS = range(1, 61)  # rows back in which a label that came too early is looked for
# Rows in the usual stretches of time: hours and half hours of a day, days of weeks and months.
_STRETCHES = (2, 3, 5, 7, 12, 14, 24, 28, 30, 48, 60, 90, 96, 168, 336)
_OLDER = 0.8  # of the rows, as a split in time has them
_AFTER = {"after", "outcome", "target", "label", "future", "truth", "actual", "resolved", "result"}
_BEFORE = {"previous", "prev", "prior", "past", "last", "before"}
_FEW = 0.2  # of the features
_LEAST_STEM = 4  # letters; shorter stems are in too many words


@dataclass(frozen=True)
class Limits:
    """Most that an honest feature measures; shares and AUCs."""

    alone: float = MOST
    two_valued: float = MOST_TWO_VALUED  # one yes or no that tells so much is nearly the label
    named: float = 0.80  # of a feature whose name speaks of the label
    moves: float = 0.999  # AUC of how a feature moves: the label is made of it, or it is not
    together: float = 0.95  # AUC of a small model of all features
    outweighs: float = 0.80  # one feature may beat all others up to this AUC
    later: float = 0.01  # share of a feature's dates that lie behind the row's time
    early: float = 0.99  # agreement with a label that was not known yet
    repeated: float = 0.01  # share of rows whose key another row has
    copies: float = 0.05  # share of newer rows that an older one equals, beyond chance


@dataclass(frozen=True)
class Leak:
    """One suspicion: ``critical`` must stop a run, ``warning`` is for a person to judge.

    ``measure`` is above ``limit``, both in the unit of the kind (an AUC or a share of rows);
    ``feature`` names a feature, or the columns of a key with commas.
    """

    feature: str
    kind: str
    measure: float
    limit: float
    severity: str
    sentence: str


@dataclass(frozen=True)
class View:
    """Features that were looked up together, and the column that says of when their values are."""

    name: str
    features: tuple[str, ...]
    time: str


@dataclass(frozen=True)
class Table:
    """Rows in order of time and what their columns are.

    ``rows`` has event_time, label (0, 1, NaN: not known), the features and, where known,
    label_known_at. ``target`` is what the label's column was called at its source, ``key`` names
    the columns that together with event_time no two rows share (empty: nothing does),
    ``vouched`` are features that somebody says are known in time: only the clock accuses them.
    """

    rows: pd.DataFrame
    features: tuple[str, ...]
    target: str
    key: tuple[str, ...] = ()
    views: tuple[View, ...] = ()
    vouched: frozenset[str] = frozenset()

    @property
    def judged(self) -> tuple[str, ...]:
        """Features that nobody vouches for."""
        return tuple(name for name in self.features if name not in self.vouched)


def of(project: Project, rows: pd.DataFrame, views: tuple[View, ...] = ()) -> Table:
    """A feature table, or the snapshot of a table project, as the judgement wants it."""
    known = {"customer_id", project.entity} if project.kind == "transactions" else {project.entity}
    key = tuple(name for name in rows.columns if name in known)
    vouched = frozenset(feature.name for feature in project.features if feature.vouched)
    target = project.label.column or "label"
    return Table(rows, project.feature_names, target, key, views, vouched)


def check(table: Table, limits: Limits | None = None) -> tuple[Leak, ...]:
    """All suspicions, the critical ones first.

    At most ``MOST_ROWS`` labelled rows are looked at, evenly spaced, so that the same rows give the
    same answer.
    """
    limits = limits or Limits()
    labelled = table.rows[table.rows["label"].notna()]
    found = alone_each(table)
    leaks = [
        *_repeated(table, limits),
        *_point_in_time(table),
        *_later_dates(table, limits),
        *_early(table, labelled, limits),
        *_alone(table, found, labelled, limits),
        *_moves(table, labelled, limits),
        *_copies(table, labelled, limits),
        *_by_name(table, found, limits),
    ]
    # One accusation a feature, by the rule that knows most about it.
    leaks = list({leak.feature: leak for leak in reversed(leaks)}.values())[::-1]
    if not any(leak.severity == "critical" for leak in leaks):
        leaks += _by_model(table, found, labelled, limits)
    return tuple(sorted(leaks, key=lambda leak: leak.severity != "critical"))


def alone_each(table: Table) -> dict[str, alone.Alone]:
    """What each feature tells alone; dates count as days from the row's time."""
    rows = spaced(table.rows[table.rows["label"].notna()], MOST_ROWS)
    found = {}
    for name in table.judged:
        values = rows[name]
        if columns.is_dates(values):
            values = (sources.as_times(values) - rows["event_time"]).dt.total_seconds()
        found[name] = alone.measure(values, rows["label"])
    return found


def spaced(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    """At most so many rows, evenly spaced, in their order."""
    if len(rows) <= most:
        return rows
    return rows.iloc[np.linspace(0, len(rows) - 1, most).astype("int64")]


def _alone(
    table: Table, found: Mapping[str, alone.Alone], labelled: pd.DataFrame, limits: Limits
) -> Iterator[Leak]:
    for name, told in found.items():
        two = labelled[name].nunique() == 2
        limit = limits.two_valued if two else limits.alone
        if told.auc <= limit:
            continue
        kind, why = "alone", f"tells {table.target} all alone"
        if told.way == "missing":
            kind, why = "missing", f"tells {table.target} by whether it is filled in"
        elif two and told.auc == 1:
            kind, why = "copy", f"is {table.target} under another name"
        yield _critical(
            name, kind, told.auc, limit, f"{name} {why}", "leave it out if it is filled in later"
        )


def _point_in_time(table: Table) -> Iterator[Leak]:
    for view in table.views:
        times = pd.to_datetime(table.rows[view.time], utc=True)
        share = float((times > table.rows["event_time"]).mean()) if len(times) else 0.0
        if share:
            names = ", ".join(view.features)
            said = f"{view.name} gives {names} values from after the row's time"
            yield _critical(names, "point in time", share, 0.0, said, "join them as of event_time")


def _later_dates(table: Table, limits: Limits) -> Iterator[Leak]:
    for name in table.features:
        values = table.rows[name]
        if not columns.is_dates(values):
            continue
        times = sources.as_times(values)
        share = float((times > table.rows["event_time"])[times.notna()].mean())
        if share > limits.later:
            said = f"{name} holds dates from after the row's time"
            yield _critical(name, "time", share, limits.later, said, "leave it out")


def _early(table: Table, labelled: pd.DataFrame, limits: Limits) -> Iterator[Leak]:
    """Features that equal an older row's label before it was known."""
    two = [name for name in table.judged if labelled[name].nunique() == 2]
    if not two or "label_known_at" not in labelled:
        return
    rows = labelled.tail(_NEWEST_ROWS)
    codes = {name: pd.Series(pd.factorize(rows[name])[0], rows.index) for name in two}
    for name, code in codes.items():
        best = max((_agreement(table, rows, code, back) for back in _SHIFTS), default=0.0)
        if best >= limits.early:
            said = f"{name} equals the {table.target} of an older row before it was known"
            yield _critical(name, "early label", best, limits.early, said, "leave it out")


def _agreement(table: Table, rows: pd.DataFrame, code: "pd.Series[Any]", back: int) -> float:
    """Share of rows in which a feature equals the label ``back`` rows before, not known by then."""
    about = rows[["label", "label_known_at"]]
    older = (about.groupby([rows[k] for k in table.key]) if table.key else about).shift(back)
    early = (older["label_known_at"] > rows["event_time"]) & older["label"].notna() & (code >= 0)
    label, said = older["label"][early], code[early]
    if min((label == 1).sum(), (label == 0).sum()) < alone.LEAST_EACH:
        return 0.0
    same = float((label == said).mean())
    return max(same, 1 - same)


def _moves(table: Table, labelled: pd.DataFrame, limits: Limits) -> Iterator[Leak]:
    """Features of which the label says how they move; where rows are one series, not many."""
    if table.key:
        return
    rows = labelled.tail(_NEWEST_ROWS)
    for name in table.judged:
        if not alone.is_number(rows[name]):
            continue
        best, stretch = max((_moved(rows, name, rows_back), rows_back) for rows_back in _STRETCHES)
        if best > limits.moves:
            said = f"{table.target} says how {name} moves against its last {stretch} rows"
            yield _critical(name, "moves", best, limits.moves, said, "leave it out")


def _moved(rows: pd.DataFrame, name: str, stretch: int) -> float:
    before = rows[name].shift(1).rolling(stretch).mean()
    moved = rows[name] - before
    known = moved.notna()
    truth = (rows["label"][known] > 0).to_numpy()
    if min(truth.sum(), (~truth).sum()) < alone.LEAST_EACH:
        return 0.5
    found = alone.auc(moved[known].to_numpy(), truth)
    return max(found, 1 - found)


def _repeated(table: Table, limits: Limits) -> Iterator[Leak]:
    if not table.key:
        return
    key = [*table.key, "event_time"]
    share = float(table.rows.duplicated(key).mean()) if len(table.rows) else 0.0
    if share:
        names = ", ".join(key)
        critical = share > limits.repeated
        said = f"{names} name more than one row"
        make = _critical if critical else _warning
        limit = limits.repeated if critical else 0.0
        yield make(names, "key", share, limit, said, "keep one row of each")


def _copies(table: Table, labelled: pd.DataFrame, limits: Limits) -> Iterator[Leak]:
    """Newer rows that stand among the older ones too, more often than older ones repeat."""
    names = [*table.features, "label"]
    if len(labelled) < 2 * alone.LEAST_EACH:
        return
    rows = pd.util.hash_pandas_object(labelled[names].astype(object), index=False).to_numpy()
    cut = int(len(rows) * _OLDER)
    older, newer = rows[:cut], rows[cut:]
    _, place, counts = np.unique(older, return_inverse=True, return_counts=True)
    share = float(np.isin(newer, older).mean()) - float((counts[place] > 1).mean())
    if share > limits.copies:
        said = "newer rows stand among the older ones too, so a model is judged on what it learned"
        yield _warning("event_time", "copies", share, limits.copies, said, "keep one of each")


def _by_name(table: Table, found: Mapping[str, alone.Alone], limits: Limits) -> Iterator[Leak]:
    words = {name: speaks_of(name, table.target) for name in found}
    # What many names share, such as the column of column_7, is no word about the label.
    common = {w for w in words.values() if list(words.values()).count(w) > _FEW * len(words) + 1}
    for name, told in found.items():
        word = words[name]
        if not word or word in common:
            continue
        said = f"the name of {name} speaks of {table.target} ({word})"
        if told.auc > limits.named:
            yield _critical(name, "name", told.auc, limits.named, said, "leave it out")
        else:
            yield _warning(name, "name", told.auc, 0.5, said, "make sure it is known in time")


def speaks_of(name: str, target: str) -> str:
    """The word of a feature's name that comes from the label, or from after it; else empty."""
    words, stems = _words(name), {_stem(word) for word in _words(target)}
    if _BEFORE & set(words):
        return ""
    told = [w for w in words if w in _AFTER or (len(_stem(w)) >= _LEAST_STEM and _stem(w) in stems)]
    return told[0] if told else ""


def _words(name: str) -> list[str]:
    apart = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    return [word for word in re.split(r"[\W_]+", apart.lower()) if word]


def _stem(word: str) -> str:
    return re.sub(r"(ed|er|ing|s)$", "", word) if len(word) > _LEAST_STEM else word


def _by_model(
    table: Table, found: Mapping[str, alone.Alone], labelled: pd.DataFrame, limits: Limits
) -> Iterator[Leak]:
    """What only a comparison with the other features shows; never more than a warning."""
    strongest = max(found, key=lambda name: found[name].auc, default="")
    if not strongest or min(labelled["label"].value_counts(), default=0) < 2 * alone.LEAST_EACH:
        return
    rows = spaced(labelled, _MODEL_ROWS)
    everything = learned(rows, table.features)
    if everything > limits.together:
        said = f"all features together tell {table.target} too well, {strongest} the most of it"
        yield _warning(strongest, "together", everything, limits.together, said, "see what is late")
    best, others = found[strongest].auc, [n for n in table.features if n != strongest]
    if best > limits.outweighs and others and (rest := learned(rows, others)) < best:
        said = f"{strongest} alone tells {table.target} better than all other features together"
        yield _warning(strongest, "outweighs", best, rest, said, "make sure it is known in time")


def learned(rows: pd.DataFrame, names: "tuple[str, ...] | list[str]") -> float:
    """AUC of a small model on every other row, learned on those between."""
    import xgboost

    matrix = np.column_stack([_numbers(rows[n]) for n in names])
    truth, odd = rows["label"].to_numpy() > 0, np.arange(len(rows)) % 2 == 1
    params = {"max_depth": 4, "eta": 0.2, "objective": "binary:logistic", "nthread": 1, "seed": 0}
    model = xgboost.train(params, xgboost.DMatrix(matrix[odd], truth[odd], nthread=1), 50)
    return alone.auc(model.predict(xgboost.DMatrix(matrix[~odd], nthread=1)), truth[~odd])


def _numbers(values: "pd.Series[Any]") -> alone.Numbers:
    numbers = values if alone.is_number(values) else pd.Series(values.factorize()[0])
    found: alone.Numbers = numbers.to_numpy(dtype="float64")
    return found


def _critical(name: str, kind: str, measure: float, limit: float, said: str, do: str) -> Leak:
    return _leak(name, kind, measure, limit, "critical", said, do)


def _warning(name: str, kind: str, measure: float, limit: float, said: str, do: str) -> Leak:
    return _leak(name, kind, measure, limit, "warning", said, do)


_SHARES = ("point in time", "time", "early label", "key", "copies")


def _leak(
    name: str, kind: str, measure: float, limit: float, severity: str, said: str, do: str
) -> Leak:
    seen = f"{measure:.1%} of rows" if kind in _SHARES else f"AUC {measure:.3f}"
    most = f"{limit:.1%}" if kind in _SHARES else f"{limit:.3f}"
    return Leak(
        name, kind, measure, limit, severity, f"{said}: {seen}, wanted at most {most}; {do}"
    )
