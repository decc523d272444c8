"""Is the data what the project expects? Rules in three layers; rows that break them stay aside."""

import shutil
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from perennial.data import aside, back, checks, labels, leaks, sift, sources
from perennial.data.back import Back
from perennial.data.checks import Finding, Last, Remark, Validation
from perennial.data.shelf import Part, Shelf
from perennial.errors import RunFailed
from perennial.project import Expectation, Project
from perennial.report import checks as pages
from perennial.steps.context import Context
from perennial.store import accepted, files, objects
from perennial.store import scratch as scratches
from perennial.store.accepted import Accepted
from perennial.store.quarantine import Batch

PAGE = "validation.html"  # below reports/, in the folder of the run
NUMBERS = ["int64", "float64", "int32", "float32"]


@dataclass(frozen=True)
class Given:
    """The snapshot that is judged: its file, digest and moment."""

    path: Path
    digest: str
    as_of: datetime


@dataclass(frozen=True)
class Out:
    """Files that the step writes: rows that go on, rows kept aside, the page."""

    kept: Path
    aside: Path
    page: Path


@dataclass(frozen=True)
class Checked:
    """What came of a snapshot: its rows and those that joined it = kept + aside.

    Of those aside, ``again`` are in batches of earlier runs; ``batch`` has the others, and is empty
    where there are none.
    """

    found: Validation
    back: Back
    kept: int = 0
    aside: int = 0
    again: int = 0
    batch: str = ""


def validate(ctx: Context, given: Given, out: Out) -> Checked:
    """Judge a snapshot, write the page, and part the rows that go on from those kept aside.

    Raises RunFailed, after the page is written, for a critical failure or too many rows to keep
    aside; then nothing else was written. Raises what the guard raises.
    """
    with scratches.folder(ctx.state.scratch) as scratch:
        before = accepted.last(ctx.engine, ctx.project.name, given.as_of, given.digest)
        whole, came = _with_replayed(ctx, given, scratch)
        found = check(ctx.project, whole, _last(before), scratch)
        found, labelled = _with_labels(ctx.project, whole, found, before)
        if not found.passed:
            shown = _show(ctx, given, Checked(found, came), before, out)
            raise RunFailed(
                f"the data is not what {ctx.project.name} expects: {found.reason}; see {shown}"
            )
        kept, put = scratch / "kept.parquet", scratch / "aside.parquet"
        counts = _parted(found, whole, kept, put)
        held, again = _put_aside(ctx, given, found, whole, put)
        checked = Checked(found, came, *counts, again, held)
        _show(ctx, given, checked, before, out)
        shutil.copyfile(put, out.aside)
        shutil.copyfile(kept, out.kept)
    observed = found.observed | {_LABELS: labelled}
    record = Accepted(given.digest, given.as_of, ctx.now, found.rows, observed)
    accepted.record(ctx.engine, ctx.project.name, record, ctx.guard)
    return checked


def check(project: Project, snapshot: Path, last: Last | None, scratch: Path) -> Validation:
    """Judge a Parquet file by the project's expectations and those that every project has."""
    return checks.check(project, snapshot, _implied(project), last, scratch)


def _with_labels(
    project: Project, whole: Path, found: Validation, before: Accepted | None
) -> tuple[Validation, Any]:
    """Hold the labels of a table against those of last time; gives what the next one needs.

    Rows that are to be kept aside have no say: no model will learn from them either.
    Purchases have no labels of their own yet.
    """
    names = pq.read_schema(whole).names
    wanted = [c for c in ("event_time", "label", *project.feature_names) if c in names]
    if project.kind != "table" or len(wanted) < 2 + len(project.features):
        return found, None
    table = leaks.of(project, sift.spaced(whole, wanted, leaks.MOST_ROWS, found.aside))
    learned = labels.learn(table)
    told = before.observed.get(_LABELS) if before else None
    if not told:
        return found, learned.as_json()
    last = labels.from_json(told)
    jumped = labels.jumped(last, learned, table)
    changes = [*labels.judge(last, table, project.label.max_change), *((jumped,) if jumped else ())]
    remarks = [Remark(_RULES[c.kind], not c.is_broken, c.sentence, c.severity) for c in changes]
    return replace(found, remarks=tuple(remarks)), learned.as_json()


_LABELS = "labels"  # among what an accepted snapshot showed
_RULES = {
    "prior": "the share of positives is as in the last accepted snapshot",
    "turned": "features tell the label as in the last accepted snapshot",
    "jumped": "no feature tells the label much better than in the last accepted snapshot",
}


def _last(before: Accepted | None) -> Last | None:
    if before is None:
        return None
    return Last(before.digest, f"{before.as_of:%Y-%m-%d %H:%M}", before.rows, before.observed)


def _implied(project: Project) -> tuple[Expectation, ...]:
    """What no project can do without: its columns, numbers as such, and enough rows."""
    exist = [
        Expectation(expect="ExpectColumnToExist", args={"column": column})
        for column in _columns(project)
    ]
    typed = [
        Expectation(
            expect="ExpectColumnValuesToBeInTypeList",
            args={"column": column, "type_list": NUMBERS},
        )
        for column in _numbers(project)
    ]
    rows = Expectation(
        expect="ExpectTableRowCountToBeBetween",
        args={"min_value": project.training.min_rows},
    )
    return (*exist, *typed, rows)


def _columns(project: Project) -> tuple[str, ...]:
    if project.kind == "table":
        return (*project.feature_names, *(s for s in project.sensitive))
    return tuple(c for c in sources.TRANSACTIONS if c != "Description")


def _numbers(project: Project) -> tuple[str, ...]:
    if project.kind == "table":
        return tuple(f.name for f in project.features if f.type == "number")
    return ("Quantity", "UnitPrice", "CustomerID")


def _with_replayed(ctx: Context, given: Given, scratch: Path) -> tuple[Path, Back]:
    """The snapshot with the rows of replayed batches that it has not already.

    Raises RunFailed where a row would be lost or doubled.
    """
    replayed = _shelf(ctx).replayed()
    if not replayed:
        return given.path, Back()
    whole = scratch / "whole.parquet"
    time = "event_time" if ctx.project.kind == "table" else str(ctx.project.time.column)
    moment, places = back.Moment(time, given.as_of), aside.places(ctx.project)
    came = back.unite(given.path, replayed, moment, whole, scratch, places)
    before, after = (pq.read_metadata(path).num_rows for path in (given.path, whole))
    if before + came.joined != after:
        raise RunFailed(
            f"rows were lost or doubled: {before:,} in the snapshot and {came.joined:,} of the"
            f" quarantine made {after:,}"
        )
    return whole, came


def _parted(found: Validation, whole: Path, kept: Path, put: Path) -> tuple[int, int]:
    """Write both parts. Raises RunFailed where a row would be lost or doubled."""
    counts = sift.split(whole, found.aside, kept, put)
    if not checks.within(found, *counts):
        raise RunFailed(
            f"rows were lost or doubled: {found.rows:,} in, {counts[0]:,} out and {counts[1]:,}"
            f" kept aside, of which {len(found.aside):,} were meant"
        )
    return counts


def _put_aside(
    ctx: Context, given: Given, found: Validation, whole: Path, put: Path
) -> tuple[str, int]:
    """Mark the rows in ``put`` and keep those that no earlier run kept; gives how many it did."""
    broken = {f.rule: f.aside for f in found.findings}
    marked = aside.mark(put, found.aside, broken, whole, aside.places(ctx.project))
    pq.write_table(marked, put, compression="zstd")
    shelf = _shelf(ctx)
    known = shelf.known(ctx.run) if len(marked) else set()
    fresh = pa.array([key not in known for key in aside.keys(marked)], pa.bool_())
    rows = marked.filter(fresh)
    if not len(rows):
        return "", len(marked)
    about = Batch("", ctx.now, ctx.run, given.digest, digest="", rows=0, rules={})
    batch = shelf.hold(Part(about, rows))
    return batch.id, len(marked) - batch.rows


def _shelf(ctx: Context) -> Shelf:
    return Shelf(ctx.engine, ctx.ledger, ctx.project.name, ctx.state)


def _show(ctx: Context, given: Given, checked: Checked, before: Accepted | None, out: Out) -> str:
    """Write the page, and give the address where it stays."""
    page = _page(ctx, given, checked, before)
    files.write_atomic(out.page, page)
    # What a step that fails wrote ends with its pod: who must see the page finds it here.
    return objects.Folder(ctx.state.artifacts("reports")).write(f"{ctx.run}/{PAGE}", page)


def _page(ctx: Context, given: Given, checked: Checked, before: Accepted | None) -> str:
    found = checked.found
    snapshot = pages.Snapshot(
        digest=given.digest,
        as_of=f"{given.as_of:%Y-%m-%d %H:%M}",
        rows=found.rows,
        kept=found.rows - len(found.aside),
        aside=len(found.aside),
        again=checked.again,
        came_back=checked.back.joined,
        not_back=checked.back.there + checked.back.later,
        batch=checked.batch,
        last=_told(before),
        unreadable=_unreadable(ctx),
        max_share=found.max_share,
    )
    lines = [_line(finding) for finding in found.findings]
    lines += [_remark(remark) for remark in found.remarks]
    return pages.page(f"Validation of {ctx.project.name}", snapshot, lines, found.reason)


def _unreadable(ctx: Context) -> str:
    """What ingest took as missing, in words; only it saw the values as they were."""
    started = ctx.ledger.entries(ctx.project.name, "run.started", ctx.run)
    found = started[-1].body.get("unreadable", {}) if started else {}
    told = (
        f"{name}: {odd['rows']:,} rows, such as {odd['example']!r}" for name, odd in found.items()
    )
    return "; ".join(told) or "none"


def _told(before: Accepted | None) -> str:
    if before is None:
        return "nothing: this is the first snapshot"
    return f"{before.digest} as of {before.as_of:%Y-%m-%d %H:%M}, {before.rows:,} rows"


def _line(finding: Finding) -> pages.Line:
    return pages.Line(
        layer=finding.expectation.layer,
        severity=finding.expectation.severity,
        rule=finding.rule,
        passed=finding.passed,
        quarantined=len(finding.aside),
        broken=_broken(finding),
        last=_number(finding.last),
        examples=finding.examples,
    )


def _remark(remark: Remark) -> pages.Line:
    return pages.Line(
        layer="statistics",
        severity=remark.severity,
        rule=remark.rule,
        passed=remark.passed,
        quarantined=0,
        broken=remark.sentence,
        last="",
        examples=(),
    )


def _broken(finding: Finding) -> str:
    if not finding.unexpected:
        return finding.detail or "none"
    said = f"{finding.unexpected:,} ({finding.unexpected / max(finding.rows, 1):.2%})"
    if finding.surplus < finding.unexpected:
        said += f", {finding.surplus:,} of them after the first"
    return f"{said}; {finding.detail}" if finding.detail else said


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
