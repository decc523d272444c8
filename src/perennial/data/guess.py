"""What project would fit this table? Guesses to confirm, as a commented project.yaml."""

import json
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from perennial.data import sources
from perennial.errors import BadInput
from perennial.project import Project

LABELS = ("churn", "churned", "target", "label", "y", "class", "default", "outcome", "income")
POSITIVES = ("yes", "true", "1", "y", "t", "churn", "churned", "default", "bad", "up")
SENSITIVE = ("sex", "gender", "race", "ethnicity", "religion", "seniorcitizen")
_MOST_CATEGORIES = 100
_WINDOW_ROWS = 1000  # fewer, and windows of one and the same kind of rows begin to differ
_SMALL_TABLE = 5000
_TOO_GOOD = 0.97


@dataclass(frozen=True)
class Column:
    """One column of the table and what it seems to be."""

    name: str
    kind: str  # number, category, time, id, constant, text
    missing: float
    note: str = ""

    @property
    def usable(self) -> bool:
        return self.kind in ("number", "category")


@dataclass(frozen=True)
class Guess:
    """All that is written into the project."""

    name: str
    path: Path
    header: bool
    rows: int
    label: str
    positive: str
    values: tuple[str, ...]
    time: str | None
    every: str
    columns: tuple[Column, ...]
    ranges: dict[str, tuple[float, float]]


def guess(
    path: Path, name: str | None, *, label: str | None = None, time: str | None = None
) -> str:
    """Text of a valid ``project.yaml`` for a CSV or Parquet table.

    ``label`` and ``time`` name columns where the guess would be wrong. Raises BadInput when the
    file is not readable, or no column could be a label.
    """
    if not path.is_file():
        raise BadInput(f"no file at {path}; give a CSV (also .gz) or Parquet file")
    raw, header = _table(path)
    for given, option in ((label, "--label"), (time, "--time")):
        if given and given not in raw.columns:
            raise BadInput(
                f"{path} has no column {given} for {option}; it has"
                f" {', '.join(map(str, raw.columns[:30]))}"
            )
    found = _look(path, name or _name(path), raw, header, label, time)
    text = _write(found)
    Project.model_validate(yaml.safe_load(text))
    return text


def _table(path: Path) -> tuple[pd.DataFrame, bool]:
    """The table, and whether its first line names the columns."""
    raw = sources.read_file(path)
    if all(_is_name(str(column)) for column in raw.columns):
        return raw, True
    return sources.read_file(path, header=False), False


def _is_name(text: str) -> bool:
    """Numbers, and names that pandas numbered because they occur twice, head no column."""
    return re.fullmatch(r"-?\d+(\.\d+)*|<=?.*|>=?.*|\s*", text.strip()) is None


def _look(
    path: Path, name: str, raw: pd.DataFrame, header: bool, label: str | None, time: str | None
) -> Guess:
    label = label or _label(path, raw)
    clock = time or next((str(c) for c in raw.columns if c != label and _is_time(raw[c])), None)
    texts = raw[label].dropna().map(_plain)
    shares = texts.value_counts(normalize=True)
    columns = tuple(_column(raw, str(c), clock) for c in raw.columns if c != label)
    if len(shares) < 2:
        raise BadInput(
            f"column {label} of {path} has fewer than two values; name a label by --label"
        )
    positive = _positive(shares)
    columns = tuple(_suspected(c, raw, texts == positive) for c in columns)
    ranges = {c.name: _range(raw[c.name]) for c in columns if c.kind == "number"}
    return Guess(
        name,
        path.resolve(),
        header,
        len(raw),
        label,
        positive,
        tuple(map(str, shares.index[:6])),
        clock,
        _every(raw, clock),
        columns,
        ranges,
    )


def _label(path: Path, raw: pd.DataFrame) -> str:
    two = [str(c) for c in raw.columns if raw[c].dropna().map(_plain).nunique() == 2]
    named = [c for wanted in LABELS for c in two if c.lower() == wanted]
    if not two:
        raise BadInput(
            f"no column of {path} has two values, so none is a label; name one by --label COLUMN"
        )
    return named[0] if named else two[-1]


def _positive(shares: "pd.Series[float]") -> str:
    """The value that says yes, else the rarer one; a churn of 27 % is worth a warning, not 73 %."""
    named = [str(v) for v in shares.index if str(v).lower() in POSITIVES]
    return named[0] if named else str(shares.index[-1])


def _plain(value: object) -> str:
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _is_time(column: "pd.Series[Any]") -> bool:
    if pd.api.types.is_datetime64_any_dtype(column):
        return True
    if column.dtype != object or column.isna().any():
        return False
    first = column.head(200)
    if not first.map(lambda v: isinstance(v, str) and bool(re.search(r"\d{4}|\d[/.-]\d", v))).all():
        return False
    return bool(sources.as_times(first).notna().all() and sources.as_times(column).notna().all())


def _column(raw: pd.DataFrame, name: str, clock: str | None) -> Column:
    column = raw[name]
    missing = float(column.isna().mean())
    if name == clock:
        return Column(name, "time", missing)
    distinct = column.nunique()
    if distinct <= 1:
        return Column(name, "constant", missing, "it has one value only")
    if _is_time(column):
        return Column(name, "text", missing, "it is a time; make it a number if it should count")
    numbers = sources.as_numbers(column)
    is_number = numbers.notna().sum() >= 0.99 * column.notna().sum()
    whole = is_number and bool((numbers.dropna() % 1 == 0).all())
    if distinct == len(column) and len(column) > 50 and (not is_number or whole):
        return Column(name, "id", missing, "each row has another value, as an id has")
    if is_number:
        return Column(name, "number", missing)
    if distinct > _MOST_CATEGORIES:
        return Column(name, "text", missing, f"it has {distinct:,} different texts")
    return Column(name, "category", missing)


def _suspected(column: Column, raw: pd.DataFrame, positive: "pd.Series[bool]") -> Column:
    """The column with a note when it alone tells the label nearly for sure."""
    if not column.usable:
        return column
    kept = raw.loc[positive.index, column.name]
    if column.kind == "number":
        score = sources.as_numbers(kept).rank().fillna(0)
    else:
        score = kept.map(positive.groupby(kept.astype(str)).mean()).fillna(float(positive.mean()))
    skill = _auc(score.to_numpy(), positive.to_numpy())
    if max(skill, 1 - skill) < _TOO_GOOD:
        return column
    note = "it alone tells the label: remove it if it is known only afterwards"
    return Column(column.name, column.kind, column.missing, note)


def _auc(score: "np.ndarray[Any, Any]", truth: "np.ndarray[Any, Any]") -> float:
    ranks = pd.Series(score).rank().to_numpy()
    ones = int(truth.sum())
    if not 0 < ones < len(truth):
        return 0.5
    return float((ranks[truth].sum() - ones * (ones + 1) / 2) / (ones * (len(truth) - ones)))


def _range(column: "pd.Series[Any]") -> tuple[float, float]:
    numbers = sources.as_numbers(column).dropna()
    return float(numbers.min()), float(numbers.max())


def _every(raw: pd.DataFrame, clock: str | None) -> str:
    """Windows of about a thousand rows, in lengths that people speak of."""
    if clock is None:
        return f"{_window_rows(len(raw))} rows"
    times = sources.as_times(raw[clock])
    span = times.max() - times.min()
    wanted = span * min(1.0, max(_WINDOW_ROWS / len(raw), 1 / 60))
    steps = {"1h": 1, "6h": 6, "1d": 24, "7d": 168}
    fitting = [text for text, hours in steps.items() if timedelta(hours=hours) >= wanted]
    return fitting[0] if fitting else "month"


def _window_rows(rows: int) -> int:
    return _WINDOW_ROWS if rows >= _SMALL_TABLE else max(40, rows // 5)


def _name(path: Path) -> str:
    stem = re.sub(r"[^a-z0-9]+", "-", path.name.split(".")[0].lower()).strip("-")
    return (stem if stem[:1].isalpha() else f"table-{stem}")[:39].strip("-")


def _write(found: Guess) -> str:
    parts = (
        _head(found),
        _clock(found),
        _answer(found),
        _features(found),
        _expectations(found),
        _rest(found),
    )
    return "\n\n".join(parts) + "\n"


def _head(found: Guess) -> str:
    lines = [
        f"# Guessed from {found.path.name}: {found.rows:,} rows. Please look at each line that",
        "# says 'confirm', then run: perennial replay FOLDER",
        f"name: {found.name}",
        "kind: table",
        "",
        "source:",
        "  # Relative paths start at this file's folder.",
        f"  path: {_quoted(str(found.path))}",
    ]
    if not found.header:
        lines.append("  header: false  # confirm: the first line holds values, not column names")
    return "\n".join(lines)


def _clock(found: Guess) -> str:
    if found.time:
        return f"time:\n  column: {_quoted(found.time)}  # confirm: this says when a row happened"
    return "\n".join(
        [
            "# No column tells the time, so the rows count as in order, one a minute.",
            "time:",
            "  row_order: {start: 2000-01-01, step: 1min}  # confirm: rows are in order of time",
        ]
    )


def _answer(found: Guess) -> str:
    values = ", ".join(found.values)
    return "\n".join(
        [
            "label:",
            f"  column: {_quoted(found.label)}  # confirm: this is to be predicted",
            f"  positive: {_quoted(found.positive)}  # confirm: one of {values} counts as 1",
            "  known_after: 0d  # confirm: how long after a row its label is known, such as 60d",
        ]
    )


def _features(found: Guess) -> str:
    lines = ["features:"]
    for column in found.columns:
        entry = f"- {{name: {_quoted(column.name)}, type: {column.kind}}}"
        if column.usable:
            lines.append(f"  {entry}" + (f"  # confirm: {column.note}" if column.note else ""))
        elif column.kind != "time":
            lines.append(f"  # confirm: {_quoted(column.name)} is left out, {column.note}")
    sensitive = [c.name for c in found.columns if c.name.lower() in SENSITIVE and c.usable]
    if sensitive:
        quoted = ", ".join(map(_quoted, sensitive))
        lines.append(f"sensitive: [{quoted}]  # confirm: fairness is reported for these")
    return "\n".join(lines)


def _expectations(found: Guess) -> str:
    lines = ["# Warnings are reported; make one critical and it stops a training."]
    lines += ["expectations:"]
    for column in (c for c in found.columns if c.usable):
        full = np.floor((1 - column.missing) * 95) / 100
        lines += _expect(
            "ExpectColumnValuesToNotBeNull", "schema", column.name, f"mostly: {full:g}"
        )
    for name, (low, high) in found.ranges.items():
        room = (high - low) * 0.5
        floor = 0.0 if low >= 0 else low - room
        limits = f"min_value: {floor:.6g}, max_value: {high + room:.6g}, mostly: 0.99"
        lines += _expect("ExpectColumnValuesToBeBetween", "statistics", name, limits)
    return "\n".join(lines)


def _expect(kind: str, layer: str, column: str, limits: str) -> list[str]:
    return [
        f"  - expect: {kind}",
        f"    layer: {layer}",
        "    severity: warning",
        f"    args: {{column: {_quoted(column)}, {limits}}}",
    ]


def _rest(found: Guess) -> str:
    least = min(200, _window_rows(found.rows) // 2)
    return "\n".join(
        [
            "# Drift is looked for in each window; one with fewer than min_rows is passed over.",
            f"window: {{every: {found.every}, min_rows: {least}}}  # confirm: its length",
            "",
            f"training: {{min_rows: {max(50, min(300, found.rows // 10))}}}",
            "",
            "# A new model serves only if it keeps these limits and beats the one that serves.",
            f"gates: {{min_auc: 0.6, min_rows: {min(100, least)}}}",
            "",
            "replay: {train_share: 0.4}  # the older part trains the first model",
        ]
    )


def _quoted(text: str) -> str:
    """A text as YAML reads it back: JSON is YAML."""
    if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", text) and isinstance(yaml.safe_load(text), str):
        return text
    return json.dumps(text, ensure_ascii=False)
