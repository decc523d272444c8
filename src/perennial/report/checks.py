"""Which rules did a snapshot keep, how many rows break the others, and what was it last time?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perennial.report import page as pages

LAYERS = {
    "schema": "Schema: columns, types, ranges",
    "statistics": "Statistics: shares, outliers, distributions",
    "business": "Business rules: what must hold between columns",
}
_HEAD = ("result", "severity", "rule, and three rows that break it", "how many", "last time")


@dataclass(frozen=True)
class Line:
    """One rule on the page; ``broken``, ``last`` and ``examples`` are words already."""

    layer: str
    severity: str
    rule: str
    passed: bool
    quarantined: int
    broken: str
    last: str
    examples: Sequence[str]


@dataclass(frozen=True)
class Snapshot:
    """What was judged: rows in, rows that go on, rows that are kept aside."""

    digest: str
    as_of: str
    rows: int
    kept: int
    aside: int
    again: int  # of those, in batches of earlier runs
    came_back: int
    not_back: int  # rows that were replayed, and are in the source or too young
    batch: str  # with the others; empty: none
    last: str  # the accepted snapshot that this one was compared with, in words
    unreadable: str  # values that ingest took as missing, in words
    max_share: float


def page(title: str, snapshot: Snapshot, lines: Sequence[Line], reason: str) -> str:
    """The page that a person reads: what failed first, then what is kept aside, then each layer."""
    failed = [line for line in lines if not line.passed]
    critical = [line for line in failed if line.severity == "critical"]
    lead = f"Stopped: {reason}" if reason else "The snapshot goes on."
    numbers = {
        "rows in": snapshot.rows,
        "rows that go on": 0 if reason else snapshot.kept,
        "rows quarantined": 0 if reason else snapshot.aside,
        "rules": len(lines),
        "critical failures": len(critical),
        "warnings and notes": len(failed) - len(critical),
    }
    sections = [
        pages.Section("", pages.tiles(numbers)),
        pages.Section("What failed", _table(failed) if failed else "<p>Nothing.</p>"),
        pages.Section("Rows kept aside", _aside(snapshot, lines, bool(reason))),
        *(
            pages.Section(heading, _table([line for line in lines if line.layer == layer]))
            for layer, heading in LAYERS.items()
        ),
        pages.Section("What was judged", _about(snapshot)),
    ]
    return pages.page(title, sections, lead)


def _table(lines: Sequence[Line]) -> str:
    return pages.table([_row(line) for line in lines], _HEAD) if lines else "<p>No rule.</p>"


def _row(line: Line) -> tuple[object, ...]:
    return (_result(line), line.severity, _rule(line), line.broken, line.last)


def _rule(line: Line) -> pages.Html:
    shown = "".join(f'<br><small class="muted">{pages.escape(e)}</small>' for e in line.examples)
    return pages.Html(pages.escape(line.rule) + shown)


def _result(line: Line) -> pages.Html:
    if not line.passed and line.severity == "info":
        return pages.badge("noted")
    if not line.passed:
        return pages.badge("BROKEN", "bad" if line.severity == "critical" else "warn")
    return pages.badge("quarantined", "warn") if line.quarantined else pages.badge("kept", "good")


def _aside(snapshot: Snapshot, lines: Sequence[Line], stopped: bool) -> str:
    named = [(line.rule, line.quarantined) for line in lines if line.quarantined]
    if not named:
        return "<p>None: no rule that quarantines rows is broken.</p>"
    share = snapshot.aside / snapshot.rows
    said = (
        f"{snapshot.aside:,} rows break rules ({share:.2%} of {snapshot.rows:,}; a row may break"
        f" several); the project allows {snapshot.max_share:.2%}. "
    )
    said += "The run was stopped, so nothing was kept aside." if stopped else _batches(snapshot)
    return pages.paragraph(said) + pages.table(named, ("rule", "rows"))


def _batches(snapshot: Snapshot) -> str:
    """Where the rows are that this run put aside."""
    new = snapshot.aside - snapshot.again
    said = []
    if new:
        said = [
            f"{new:,} are new, in batch {snapshot.batch}: perennial quarantine show"
            f" {snapshot.batch}."
        ]
    if snapshot.again:
        said.append(
            f"{snapshot.again:,} are in batches of earlier runs: perennial quarantine list."
        )
    return " ".join(said)


def _about(snapshot: Snapshot) -> str:
    about: list[tuple[str, Any]] = [
        ("snapshot", snapshot.digest),
        ("as of", snapshot.as_of),
        ("compared with", snapshot.last),
        ("values that are no number, taken as missing", snapshot.unreadable),
        ("rows that came back from the quarantine", snapshot.came_back),
        ("replayed rows that the source has, or that are too young", snapshot.not_back),
    ]
    return pages.table([(name, str(value)) for name, value in about], ("what", "value"))
