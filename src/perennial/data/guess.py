"""What project would fit a table that nobody described? A commented project.yaml to confirm."""

import re
from dataclasses import dataclass
from math import floor, log
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from perennial.data import columns, sources
from perennial.data.columns import Column
from perennial.errors import BadInput
from perennial.project import Project

LEAST_ROWS = 600
# Usual names of a label, the surest first.
LABELS = (
    *("churn", "churned", "target", "label", "y", "class", "outcome", "exited", "attrition"),
    *("response", "converted", "fraud", "default", "defaulted", "survived", "income"),
)
POSITIVES = ("yes", "y", "true", "t", "1", "churn", "churned", "exited", "left", "default", "up")
_SENSITIVE = re.compile(
    r"(?i)(^|[\W_])(sex|gender|age|race|ethnic\w*|religion|nationality|marital|disab\w*)($|[\W_])"
    r"|citizen"
)
_SENSITIVE_VALUES = re.compile(r"(?i)\b(female|asian|hispanic|caucasian)\b")
# A moment of these kinds is rarely when a row's prediction was wanted.
_POOR_CLOCK = re.compile(r"(?i)birth|dob|end|clos|cancel|churn|updat|modif|last|due|expir")

_WINDOW_ROWS = 1000  # with fewer, chance alone makes rows of one kind differ now and then
_LEAST_WINDOW_ROWS = 200
_WINDOWS = 6  # at least so many: to train, to judge, and to replay
_WIDTH = 60  # letters of a comment's quotation


@dataclass(frozen=True)
class Label:
    """What to predict."""

    column: str
    positive: str
    other: str
    share: float


@dataclass(frozen=True)
class Windows:
    """How the history is cut, and how many windows' rest there is between two trainings."""

    every: str
    min_rows: int
    cooldown: str
    comment: str


@dataclass(frozen=True)
class Guess:
    """All that is told in the text."""

    name: str
    path: Path
    header: bool
    rows: int
    label: Label
    clock: str | None
    moment: str  # how a value of the clock is read
    odd_clocks: tuple[str, ...]  # dates, but not in every row
    windows: Windows
    columns: tuple[Column, ...]

    @property
    def features(self) -> tuple[Column, ...]:
        return tuple(c for c in self.columns if not c.left_out)


def guess(
    table: Path, name: str | None = None, *, label: str | None = None, time: str | None = None
) -> str:
    """Text of a valid ``project.yaml`` for a CSV or Parquet table with one row an example.

    ``name`` defaults to the file's; ``label`` and ``time`` name columns where the guess would be
    wrong. Raises BadInput when nothing in the file can be predicted or learned from.
    """
    if not table.is_file():
        raise BadInput(f"no file at {table}; give a CSV (also .gz) or Parquet file")
    raw, header = _read(table)
    if len(raw) < LEAST_ROWS:
        raise BadInput(
            f"{table} has {len(raw):,} rows, wanted at least {LEAST_ROWS}: to train, to judge and"
            " to replay"
        )
    text = _text(_look(table, _name(table, name), raw, header, label, time))
    # What is written must be read again, here as well as in the first run.
    sources.table_rows(Project.model_validate(yaml.safe_load(text)), raw)
    return text


def _name(table: Path, given: str | None) -> str:
    if given is None:
        stem = re.sub(r"[^a-z0-9]+", "-", table.name.split(".")[0].lower()).strip("-")
        return (stem if stem[:1].isalpha() else f"table-{stem}")[:39].strip("-")
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,38}", given):
        raise BadInput(
            f"{given!r} cannot name a project, wanted small letters, digits and hyphens after a"
            " letter; give another by --name"
        )
    return given


def _read(table: Path) -> tuple[pd.DataFrame, bool]:
    """The table, and whether its first line names the columns."""
    raw = sources.read_file(table)
    if _is_headed(raw):
        return raw, True
    return sources.read_file(table, header=False), False


def _is_headed(raw: pd.DataFrame) -> bool:
    """A first line without names has numbers over numbers, or texts that come again below."""
    numeric = [name for name in raw.columns if columns.kind(raw[name]) == "number"]
    if numeric:
        return not all(_is_number(str(name)) for name in numeric)
    return not all((raw[name].astype(str) == str(name)).any() for name in raw.columns)


def _is_number(name: str) -> bool:
    # A second column of the same name gets .1 behind it; one without any is called Unnamed.
    text = re.sub(r"^Unnamed: \d+$|^\?$", "0", name)
    return bool(re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?(\.\d+)?", text.strip()))


def _look(
    table: Path, name: str, raw: pd.DataFrame, header: bool, label: str | None, time: str | None
) -> Guess:
    _require(table, raw, label, "--label")
    _require(table, raw, time, "--time")
    found = _label(table, raw, label, time)
    clock, odd = (time, ()) if time else _clock(raw, found.column)
    texts = sources.as_texts(raw[found.column])
    positive = (texts == found.positive).astype("float64").where(texts.notna())
    others = [c for c in raw.columns if c not in (found.column, clock)]
    seen = tuple(columns.look(raw, str(c), positive) for c in others)
    if all(c.left_out for c in seen):
        why = "; ".join(f"{c.name}: {c.left_out}" for c in seen[:5]) or "there is no other column"
        raise BadInput(f"no column of {table} can tell {found.column}: {why}")
    windows, moment = _in_rows(len(raw)), ""
    if clock:
        times = sources.known_times(raw[clock], clock)
        windows, moment = _in_time(times), f"{raw[clock].iloc[0]} is {times.iloc[0]:%-d %B %Y}"
    return Guess(name, table.resolve(), header, len(raw), found, clock, moment, odd, windows, seen)


def _require(table: Path, raw: pd.DataFrame, column: str | None, option: str) -> None:
    if column is not None and column not in raw.columns:
        has = ", ".join(map(str, raw.columns[:30]))
        raise BadInput(f"{table} has no column {column} for {option}; it has {has}")


def _label(table: Path, raw: pd.DataFrame, given: str | None, clock: str | None) -> Label:
    if given is not None:
        count = raw[given].nunique() if columns.kind(raw[given]) != "other" else 0
        if count != 2:
            raise BadInput(
                f"column {given} of {table} has {count:,} different values, wanted two; name"
                " another by --label COLUMN"
            )
        return _with_values(raw, given)
    two = [str(c) for c in raw.columns if c != clock and _has_two_values(raw[c])]
    if not two:
        raise BadInput(
            f"no column of {table} has exactly two values, so none looks like a label; make one"
            " and name it by --label COLUMN"
        )
    return _with_values(raw, min(two, key=lambda c: (_rank(c), -two.index(c))))


def _has_two_values(column: "pd.Series[Any]") -> bool:
    return columns.kind(column) in ("number", "category") and column.nunique() == 2


def _rank(name: str) -> int:
    """Place of a name among usual ones: all of it, else one of its words, else behind them."""
    if name.lower() in LABELS:
        return LABELS.index(name.lower())
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower()
    words = [LABELS.index(word) for word in re.split(r"[\W_]+", apart) if word in LABELS]
    return len(LABELS) + min(words, default=len(LABELS))


def _with_values(raw: pd.DataFrame, column: str) -> Label:
    shares = sources.as_texts(raw[column]).value_counts(normalize=True)
    common, rare = map(str, shares.index)
    told = [v for v in (rare, common) if v.lower() in POSITIVES or v.startswith(">")]
    positive = told[0] if told else rare
    other = common if positive == rare else rare
    return Label(column, positive, other, float(shares[positive]))


def _clock(raw: pd.DataFrame, label: str) -> tuple[str | None, tuple[str, ...]]:
    """The column that says when, and columns of dates that do not say it in every row."""
    dates = [str(c) for c in raw.columns if c != label and columns.kind(raw[c]) == "date"]
    whole = [c for c in dates if sources.as_times(raw[c]).notna().all()]
    best = min(whole, key=lambda c: bool(_POOR_CLOCK.search(c)), default=None)
    return best, tuple(c for c in dates if c not in whole)


def _in_rows(rows: int) -> Windows:
    """Windows of rows; four of them pass between two trainings, for there is no other clock."""
    size = max(_LEAST_WINDOW_ROWS, min(_WINDOW_ROWS, rows // 5 // 50 * 50))
    comment = "confirm: as many rows as come between two looks at the model"
    if size < _WINDOW_ROWS:
        comment = "confirm: short, as the table is; so few rows differ by chance now and then"
    return Windows(f"{size} rows", 100, f"{4 * size}min", comment)


def _in_time(times: "pd.Series[Any]") -> Windows:
    """The length whose windows come closest to a thousand rows."""
    plain = times.dt.tz_localize(None)
    counts = {
        ("91d", "182d"): plain.dt.floor("91D").value_counts(),
        ("month", "60d"): plain.dt.to_period("M").value_counts(),
        ("7d", "28d"): plain.dt.floor("7D").value_counts(),
        ("1d", "7d"): plain.dt.floor("D").value_counts(),
        ("1h", "12h"): plain.dt.floor("h").value_counts(),
        ("1min", "30min"): plain.dt.floor("min").value_counts(),
    }
    enough = {key: float(c.median()) for key, c in counts.items() if len(c) >= _WINDOWS}
    if not enough:
        raise BadInput(
            f"{times.name} has {times.nunique()} different moments, too few to cut a history into"
            " windows; name another column by --time, or leave it out of the file"
        )
    every, cooldown = min(enough, key=lambda key: abs(log(enough[key] / _WINDOW_ROWS)))
    typical = enough[every, cooldown]
    least = max(20, min(100, int(typical / 2)))
    comment = f"confirm: how often could you act? Half of these windows have {typical:,.0f} rows"
    return Windows(every, least, cooldown, f"{comment} or more")


def _text(found: Guess) -> str:
    blocks = (_head, _source, _time, _predicted, _features, _sensitive, _expectations, _rest)
    return "\n\n".join("\n".join(block(found)) for block in blocks) + "\n"


def _head(found: Guess) -> list[str]:
    return [
        f"# Guessed by 'perennial init' from {_words(found.path.name)}, {found.rows:,} rows: one"
        " row, one example.",
        "# Please look at each line that says 'confirm'. Then: perennial replay, and this folder.",
        f"name: {found.name}",
        "kind: table",
    ]


def _source(found: Guess) -> list[str]:
    lines = [
        "# Where rows come from; --source gives another file with the same columns.",
        "source:",
        f"  path: {_yaml(str(found.path))}",
    ]
    if not found.header:
        lines.append(
            "  header: false  # confirm: the first line holds values, so the columns get numbers"
        )
    return lines


def _time(found: Guess) -> list[str]:
    odd = [
        f"# {_words(c)} holds dates, but not in every row; mend it if it is the time."
        for c in found.odd_clocks
    ]
    lines = ["# When a row happened, which is when its prediction was wanted.", *odd, "time:"]
    if found.clock:
        return [*lines, f"  column: {_yaml(found.clock)}  # confirm: {_words(found.moment)}"]
    return [
        *lines,
        "  # No column says it: rows count as in order, oldest first, one a minute from then on.",
        "  row_order: {start: 2000-01-01, step: 1min}  # confirm: the rows are in order of time",
    ]


def _predicted(found: Guess) -> list[str]:
    label = found.label
    return [
        "# What is predicted, and how long it takes until the truth is known.",
        "label:",
        f"  column: {_yaml(label.column)}  # confirm: or name another by --label",
        f"  positive: {_yaml(label.positive)}  # confirm: counts as 1 ({label.share:.1%} of rows),"
        f" {_words(label.other)} as 0",
        "  known_after: 0d  # confirm: such as 60d; too short makes every number too good",
    ]


def _features(found: Guess) -> list[str]:
    lines = [
        "# What the model sees. A column that is filled in after the prediction is a leak.",
        "features:  # confirm: each is known when the prediction is made",
        *(f"  - {_feature(c)}  # {_words(c.holds)}" for c in found.features),
    ]
    out = [c for c in found.columns if c.left_out]
    if out:
        lines.append("# Left out; take away the # before those that should count after all.")
    return lines + [_left_out(c) for c in out]


def _left_out(column: Column) -> str:
    what = f" - {_feature(column)}" if column.type else _words(column.name)
    return f"# {what}  # confirm: {_words(column.left_out, 100)}"


def _feature(column: Column) -> str:
    return _yaml({"name": column.name, "type": column.type})


def _sensitive(found: Guess) -> list[str]:
    named = [
        c.name
        for c in found.features
        if _SENSITIVE.search(c.name) or _SENSITIVE_VALUES.search(c.holds)
    ]
    hint = _yaml(named) if named else "[COLUMN]"
    return [
        "# Groups of people whose predictions the report compares; take away the # to compare.",
        f"#sensitive: {hint}  # confirm: whose treatment must be watched",
    ]


def _expectations(found: Guess) -> list[str]:
    """A warning only tells: what the whole table holds is no law."""
    lines = []
    for column in found.features:
        args: dict[str, Any] = {"column": column.name}
        # A hundredth part is room for chance, and an empty column may stay so.
        mostly = max(0, floor((1 - column.missing) * 95)) / 100
        lines.append(_expectation("ExpectColumnValuesToNotBeNull", {**args, "mostly": mostly}))
        if column.limits:
            low, high = map(_short, column.limits)
            args |= {"min_value": low, "max_value": high, "mostly": 0.99}
            lines.append(_expectation("ExpectColumnValuesToBeBetween", args))
    return [
        "# What rows must keep (Great Expectations). A warning is reported, critical stops a run.",
        "expectations:  # confirm: shares and ranges as they are in this file",
        *lines,
    ]


def _expectation(name: str, args: dict[str, Any]) -> str:
    return "  - " + _yaml({"expect": name, "severity": "warning", "args": args})


def _short(number: float) -> float:
    return int(number) if number.is_integer() and abs(number) < 1e15 else number


def _rest(found: Guess) -> list[str]:
    windows, least = found.windows, max(50, min(300, found.rows // 10))
    return [
        "# Drift is looked for in each window of served rows; thinner ones are not judged.",
        f"window: {{every: {windows.every}, min_rows: {windows.min_rows}}}  # {windows.comment}",
        "",
        "# How long a model is searched for; more trials take longer and find little more.",
        f"training: {{trials: 10, min_rows: {least}}}",
        "",
        "# A new model must keep these limits, and beat the one that serves if there is one.",
        f"gates: {{min_auc: 0.5, min_rows: {windows.min_rows}}}"
        "  # confirm: 0.5 is a coin; raise it to what is worth serving",
        "",
        "# Training is spent on drift in two windows in a row, and not again during the cooldown.",
        f"retraining: {{persistence: 2, cooldown: {windows.cooldown}}}"
        "  # confirm: how often you could train",
        "",
        "# Features that change by nature, such as a season, would report drift for ever; name"
        " them here.",
        "#drift: {ignore: [COLUMN]}",
        "",
        "# 'perennial replay' trains on the oldest 40 % and serves the rest in order.",
        "replay: {train_share: 0.4}",
    ]


def _yaml(value: object) -> str:
    """A value in one line, quoted where YAML wants it."""
    dumped: str = yaml.safe_dump(
        [value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=1_000_000
    )
    return dumped[1:-2]


def _words(text: str, width: int = _WIDTH) -> str:
    """A text that stays inside its comment."""
    words = "".join(c for c in " ".join(text.split()) if c.isprintable())
    return words if len(words) <= width else words[: width - 3] + "..."
