"""Does a snapshot keep its rules, and which of its rows had better not go on?"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from perennial.data import aggregates, expectations, rules
from perennial.data.aggregates import Aggregate, Judged
from perennial.data.expectations import Result
from perennial.data.rules import RowRule
from perennial.data.sift import EXAMPLES, Broken, Positions, Sieve, nothing
from perennial.errors import BadInput
from perennial.project import LAST_ACCEPTED, OF_LAST, Expectation, Project

# What a histogram of last time gives to what it has never seen.
_HOLDOUTS = {"tail_weight_holdout": 0.001, "internal_weight_holdout": 0.001}


@dataclass(frozen=True)
class Last:
    """What the last accepted snapshot showed: see ``key`` and ``exact`` for the keys."""

    digest: str
    at: str
    rows: int
    observed: Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """What one expectation found.

    ``observed`` is JSON: of a rule about rows the number that break it, else the measured value;
    ``last`` is that of the last accepted snapshot; ``surplus`` are the rows that would have to go
    for the rule to hold.
    """

    expectation: Expectation
    passed: bool
    rows: int
    unexpected: int = 0
    surplus: int = 0
    examples: tuple[str, ...] = ()
    detail: str = ""
    observed: Any = None
    last: Any = None
    aside: Positions = field(default_factory=nothing, compare=False)

    @property
    def rule(self) -> str:
        """The expectation in a line."""
        return tell(self.expectation)

    @property
    def sentence(self) -> str:
        """What was wanted and what was seen, in one sentence."""
        said = f"{_subject(self.expectation)}: {self.expectation.expect}"
        if self.passed and not len(self.aside):
            return f"{said} holds"
        seen = f", such as {', '.join(self.examples)}" if self.examples else ""
        count = f"{self.unexpected:,} of {self.rows:,} rows break it" if self.unexpected else ""
        verb = "quarantines" if self.passed else "fails"
        return f"{said} {verb}: {count or self.detail or 'not met'}{seen}"


@dataclass(frozen=True)
class Remark:
    """What was found beside the expectations; ``severity`` as of an expectation."""

    rule: str
    passed: bool
    sentence: str
    severity: str = "critical"

    @property
    def stops(self) -> bool:
        return not self.passed and self.severity == "critical"


@dataclass(frozen=True)
class Validation:
    """All findings on one snapshot of ``rows`` rows; ``aside`` are positions to be quarantined."""

    findings: tuple[Finding, ...]
    rows: int
    remarks: tuple[Remark, ...] = ()
    aside: Positions = field(default_factory=nothing, compare=False)
    max_share: float = 1.0
    partitions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def critical(self) -> tuple[Finding, ...]:
        """Failures that stop a run."""
        return self._failed("critical")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Failures that are only reported."""
        return self._failed("warning") + self._failed("info")

    @property
    def share(self) -> float:
        """Rows to be quarantined, as a share of all."""
        return len(self.aside) / self.rows if self.rows else 0.0

    @property
    def too_many(self) -> bool:
        """Would more rows be quarantined than the project allows?"""
        return self.share > self.max_share

    @property
    def passed(self) -> bool:
        stopped = any(remark.stops for remark in self.remarks)
        return not (stopped or self.critical or self.too_many)

    @property
    def reason(self) -> str:
        """Why the run must stop, in one line; empty where it may go on."""
        said = [finding.sentence for finding in self.critical]
        said += [remark.sentence for remark in self.remarks if remark.stops]
        if self.too_many:
            worst = [f.sentence for f in self.findings if len(f.aside)]
            said.append(
                f"{len(self.aside):,} of {self.rows:,} rows ({self.share:.2%}) would be"
                f" quarantined, more than quarantine.max_share ({self.max_share:.2%}):"
                f" {'; '.join(worst)}"
            )
        return "; ".join(said)

    @property
    def observed(self) -> dict[str, Any]:
        """What the next snapshot is compared with, by the keys of expectations."""
        shared = _shared([f.expectation for f in self.findings])
        found = {exact(f.expectation): f.observed for f in self.findings}
        found |= {k: f.observed for f in self.findings if (k := key(f.expectation)) not in shared}
        return found | {f"{k}|{LAST_ACCEPTED}": v for k, v in self.partitions.items()}

    def _failed(self, severity: str) -> tuple[Finding, ...]:
        return tuple(
            f for f in self.findings if not f.passed and f.expectation.severity == severity
        )


def check(
    project: Project,
    snapshot: Path,
    implied: Sequence[Expectation],
    last: Last | None,
    scratch: Path,
) -> Validation:
    """Judge a snapshot by the project's expectations and ``implied`` ones.

    Rules about rows come first; the others look at the rows that would go on, and at all rows
    where too many would stay aside: what is left of those hides what is wrong. A rule that counts
    from last time holds where there is no value of then (no accepted snapshot, a new rule, or
    nothing to see at that time), but only if there is one now: else it would never come to judge.
    Raises BadInput for an expectation that Great Expectations does not know.
    """
    wanted = [*implied, *project.expectations]
    expectations.check([_plain(one) for one in wanted])
    _refuse_of_last(wanted)
    last = _of_one_each(last, wanted)
    with Sieve(snapshot, scratch) as sieve:
        checker = _Checker(sieve, last)
        row_level = [one for one in wanted if is_about_rows(one)]
        found = checker.rows(row_level)
        aside = _union([f.aside for f in found.values()])
        share = project.quarantine.max_share
        if 0 < len(aside) <= share * sieve.rows:
            sieve.leave_out(aside)
        found |= checker.others([one for one in wanted if id(one) not in found])
        partitions = checker.partitions(wanted)
    findings = tuple(replace(found[id(one)], last=_seen(one, last)) for one in wanted)
    return Validation(findings, sieve.rows, (), aside, share, partitions)


_FIRST = "the first time: there is no accepted snapshot to compare with"
_NEW = "the first time for this rule: the last accepted snapshot was not held against it"
_BLANK = "the last accepted snapshot showed no value to compare with"


def _uncompared(wanted: Expectation, last: Last | None) -> str:
    """Why a rule that counts from last time cannot."""
    of_parts = wanted.args.get("partition_object") == LAST_ACCEPTED
    keys = {f"{key(wanted)}|{LAST_ACCEPTED}"} if of_parts else {exact(wanted), key(wanted)}
    if last is None:
        return _FIRST
    return _BLANK if keys & set(last.observed) else _NEW


def _refuse_of_last(wanted: Sequence[Expectation]) -> None:
    """A rule about rows shows a number of rows: no limit of one row can be a multiple of it."""
    for one in wanted:
        names = [k for k, v in one.args.items() if isinstance(v, dict) and OF_LAST in v]
        if names and is_about_rows(one):
            raise BadInput(
                f"expectations: {one.expect} is about single rows, so its {names[0]} cannot be"
                f" {{of_last: ...}}; wanted a number, or an expectation about the whole column"
            )


class _Checker:
    """Asks DuckDB where it judges alike, and Great Expectations for the rest."""

    def __init__(self, sieve: Sieve, last: Last | None) -> None:
        self._sieve = sieve
        self._last = last

    def rows(self, wanted: Sequence[Expectation]) -> dict[int, Finding]:
        """Findings on rules about rows, by the identity of the expectation."""
        found, asked = self._resolved(wanted)
        ours, theirs = [], []
        for one, resolved in asked:
            rule = rules.translate(resolved, self._sieve.columns)
            ours += [(one, resolved, rule)] if rule else []
            theirs += [] if rule else [(one, resolved)]
        counted = self._sieve.count([rule for *_, rule in ours])
        for (one, resolved, rule), broken in zip(ours, counted, strict=True):
            found[id(one)] = self._of_rule(one, resolved, rule, broken)
        return found | self._foreign_rows(theirs)

    def _of_rule(
        self, one: Expectation, resolved: Expectation, rule: RowRule, broken: Broken
    ) -> Finding:
        quarantined = broken.rows and quarantines(one)
        examples = tuple(_example(example) for example in broken.examples)
        return _row_finding(
            one,
            resolved,
            Result(True, broken.looked_at, broken.rows, examples),
            self._sieve.rows,
            self._sieve.positions(rule) if quarantined else nothing(),
            broken.surplus,
        )

    def _foreign_rows(self, asked: Sequence[tuple[Expectation, Expectation]]) -> dict[int, Finding]:
        together: list[tuple[Expectation, Expectation]] = []
        apart: list[tuple[Expectation, Expectation]] = []
        for pair in asked:
            by_group = expectations.reach(pair[1], self._sieve.columns) == "rows"
            (apart if by_group else together).append(pair)
        results = expectations.judge_groups([r for _, r in apart], self._sieve.snapshot)
        results += [self._whole(resolved) for _, resolved in together]
        return {
            id(one): _row_finding(
                one, resolved, self._shown(one, result), self._sieve.rows, result.positions
            )
            for (one, resolved), result in zip([*apart, *together], results, strict=True)
        }

    def _shown(self, one: Expectation, result: Result) -> Result:
        """With examples that say which rows they are."""
        args = {k: v for k, v in one.args.items() if k != "row_condition"}
        columns = self._present(one.model_copy(update={"args": args}))
        found = self._sieve.examples(result.positions[:EXAMPLES].tolist(), columns)
        return replace(result, examples=tuple(map(_example, found)) or result.examples)

    def _whole(self, resolved: Expectation) -> Result:
        return expectations.judge([resolved], self._sieve.frame(self._present(resolved)))[0]

    def _present(self, wanted: Expectation) -> list[str]:
        return [c for c in wanted.columns if c in self._sieve.columns]

    def others(self, wanted: Sequence[Expectation]) -> dict[int, Finding]:
        """Findings on tables and whole columns, by the identity of the expectation."""
        found, asked = self._resolved(wanted)
        ours: list[tuple[Expectation, Aggregate]] = []
        for one, resolved in asked:
            made = aggregates.translate(resolved, self._sieve.columns)
            if one.expect == expectations.QUERY:
                found[id(one)] = self._of_query(one)
            elif made:
                ours.append((one, made))
            else:
                found[id(one)] = self._foreign(one, resolved)
        judged = self._sieve.observe([made for _, made in ours])
        for (one, _), result in zip(ours, judged, strict=True):
            found[id(one)] = self._of_all(one, result)
        return found

    def _of_query(self, one: Expectation) -> Finding:
        rows, query = self._sieve.rows, str(one.args.get("unexpected_rows_query", ""))
        try:
            count, examples = self._sieve.unexpected(query)
        except BadInput as exc:
            # Of a column that changed its type as well as of a slip in the query.
            return Finding(one, False, rows, detail=str(exc))
        shown = tuple(_values(example) for example in examples)
        return Finding(one, not count, rows, count, count, examples=shown, observed=count)

    def _of_all(self, one: Expectation, result: Judged) -> Finding:
        rows, seen = self._sieve.rows, result.observed
        if resolve(one, self._last) is None:
            return self._first(one, seen, result.said)
        return Finding(one, result.passed, rows, detail=result.said, observed=seen)

    def _first(self, one: Expectation, seen: Any, said: str) -> Finding:
        """Nothing to compare with: what has no value now either would pass time after time."""
        told = said or "there is no value to look at" if seen is None else f"observed {seen}"
        detail = f"{_uncompared(one, self._last)}; {told}"
        return Finding(one, seen is not None, self._sieve.rows, detail=detail, observed=seen)

    def _foreign(self, one: Expectation, resolved: Expectation) -> Finding:
        reach = expectations.reach(resolved, self._sieve.columns)
        if reach == "rows":
            (found,) = expectations.judge_groups([resolved], self._sieve.snapshot)
            result = self._shown(one, found)
        elif reach == "schema":
            (result,) = expectations.judge([resolved], self._sieve.no_rows())
        else:
            result = self._whole(resolved)
        seen = _number(result.observed)
        if resolve(one, self._last) is None:
            return self._first(one, seen, result.detail)
        return Finding(
            one,
            result.passed,
            self._sieve.rows,
            result.unexpected,
            examples=result.examples,
            detail=result.detail,
            observed=seen,
        )

    def _first_parts(self, one: Expectation) -> Finding:
        values = self._sieve.present(one)
        found = self._first(one, f"{values:,} values" if values else None, "")
        return replace(found, observed=None)

    def partitions(self, wanted: Sequence[Expectation]) -> dict[str, Any]:
        """Distributions that a later snapshot will be compared with."""
        found = {}
        for one in wanted:
            if one.args.get("partition_object") == LAST_ACCEPTED:
                found[key(one)] = self._sieve.partition(one)
        return found

    def _resolved(
        self, wanted: Sequence[Expectation]
    ) -> tuple[dict[int, Finding], list[tuple[Expectation, Expectation]]]:
        """What is found at once, and pairs of an expectation and what it means this time."""
        found, asked = {}, []
        for one in wanted:
            missing = [c for c in _needed(one) if c not in self._sieve.names]
            if missing:
                detail = f"there is no column {', '.join(missing)}"
                found[id(one)] = Finding(one, False, self._sieve.rows, detail=detail)
                continue
            meant = resolve(one, self._last)
            if meant is None and one.args.get("partition_object") == LAST_ACCEPTED:
                found[id(one)] = self._first_parts(one)
            else:
                asked.append((one, meant or _plain(one)))
        return found, asked


def _needed(one: Expectation) -> tuple[str, ...]:
    """Columns without which it cannot be asked; one on existence asks for itself."""
    return () if one.expect.startswith("ExpectTable") else one.columns


def _row_finding(
    one: Expectation,
    resolved: Expectation,
    result: Result,
    rows: int,
    positions: Positions,
    surplus: int | None = None,
) -> Finding:
    """A rule holds when enough rows keep it, or when those that do not can be set aside."""
    may_go = quarantines(one) and not result.detail
    share = 1 - result.unexpected / result.looked_at if result.looked_at else 1.0
    enough = share >= resolved.mostly or (may_go and "mostly" not in one.args)
    return Finding(
        one,
        passed=enough and not result.detail,
        rows=rows,
        unexpected=result.unexpected,
        surplus=len(positions) if surplus is None else surplus,
        examples=result.examples,
        detail=result.detail,
        observed=result.unexpected,
        aside=positions if may_go else nothing(),
    )


def _number(observed: Any) -> int | float | None:
    is_one = isinstance(observed, int | float) and math.isfinite(observed)
    return observed if is_one else None


def is_about_rows(one: Expectation) -> bool:
    """Does each row keep or break it?"""
    return expectations.is_row_level(_plain(one))


def quarantines(one: Expectation) -> bool:
    """Do rows that break it stay aside, if it is about rows?"""
    if one.rows:
        return one.rows == "quarantine"
    return one.severity == "critical" and one.mostly == 1.0


def _union(positions: Sequence[Positions]) -> Positions:
    return reduce(np.union1d, positions, nothing()).astype(np.int64)


def key(wanted: Expectation) -> str:
    """What was observed, by the rule's name and columns: limits may change from time to time."""
    about = {k: v for k, v in wanted.args.items() if k in _ABOUT}
    return f"{wanted.expect}|{json.dumps(about, sort_keys=True, default=str)}"


def exact(wanted: Expectation) -> str:
    """What was observed, by all that makes a difference to it: two rules may share a key."""
    limits = ("mostly",) if is_about_rows(wanted) else _LIMITS
    about = {k: v for k, v in wanted.args.items() if k not in limits}
    return f"{wanted.expect}|all|{json.dumps(about, sort_keys=True, default=str)}"


_ABOUT = (
    *("column", "column_A", "column_B", "column_list", "column_set"),
    *("row_condition", "unexpected_rows_query"),
)
_LIMITS = ("min_value", "max_value", "strict_min", "strict_max", "threshold", "value", "mostly")


def _shared(wanted: Sequence[Expectation]) -> set[str]:
    """Keys under which several of these rules observe different things."""
    different = {exact(one): key(one) for one in wanted}
    return {k for k, times in Counter(different.values()).items() if times > 1}


def _of_one_each(last: Last | None, wanted: Sequence[Expectation]) -> Last | None:
    """Without what any of several rules may have observed last time."""
    if last is None:
        return None
    shared = _shared(wanted)
    return replace(last, observed={k: v for k, v in last.observed.items() if k not in shared})


def _seen(wanted: Expectation, last: Last | None) -> Any:
    """What the same rule observed last time, else one of its name and columns."""
    if last is None:
        return None
    return last.observed.get(exact(wanted), last.observed.get(key(wanted)))


def resolve(wanted: Expectation, last: Last | None) -> Expectation | None:
    """The expectation with what the last accepted snapshot showed in its place; None without one.

    ``of_last: f`` is ``v + (f - 1) |v|`` for the value v of last time, so that 0.5 is less than v
    also where v is below zero.
    """
    seen = _seen(wanted, last)
    args = {name: _counted(value, seen) for name, value in wanted.args.items()}
    if any(value is _UNKNOWN for value in args.values()):
        return None
    if args.get("partition_object") == LAST_ACCEPTED:
        parts = last.observed.get(f"{key(wanted)}|{LAST_ACCEPTED}") if last else None
        if parts is None:
            return None
        args = _holdouts(parts) | args | {"partition_object": parts}
    return wanted.model_copy(update={"args": args})


_UNKNOWN = object()


def _counted(value: Any, seen: Any) -> Any:
    """An argument, counted from what was seen last time where it says so."""
    if not isinstance(value, dict) or OF_LAST not in value:
        return value
    if not isinstance(seen, int | float):
        return _UNKNOWN
    return seen + (value[OF_LAST] - 1) * abs(seen)


def _holdouts(parts: Mapping[str, Any]) -> dict[str, float]:
    if "bins" in parts:
        return _HOLDOUTS
    return {"tail_weight_holdout": _HOLDOUTS["tail_weight_holdout"]}


def _plain(wanted: Expectation) -> Expectation:
    """The expectation with something that Great Expectations can read in place of last time's."""
    args = {
        k: 0 if isinstance(v, dict) and OF_LAST in v else v
        for k, v in wanted.args.items()
        if v != LAST_ACCEPTED
    }
    return wanted.model_copy(update={"args": args})


def tell(wanted: Expectation) -> str:
    """An expectation in a line, as Great Expectations would be called."""
    args = ", ".join(f"{k}={_value(v)}" for k, v in wanted.args.items() if k != "condition_parser")
    return f"{wanted.expect}({args})"


def _value(value: Any) -> str:
    if isinstance(value, dict) and OF_LAST in value:
        return f"{value[OF_LAST]:g} x last time"
    return str(value)


def _subject(wanted: Expectation) -> str:
    args = wanted.args
    if "column" in args:
        return str(args["column"])
    return ", ".join(wanted.columns) or "the table"


def _example(row: Mapping[str, Any]) -> str:
    """One row that breaks a rule: its columns, and which row it is."""
    shown = {name: value for name, value in row.items() if name != "row"}
    only = _cell(next(iter(shown.values()))) if len(shown) == 1 else _values(shown)
    return f"{only} (row {row['row']:,})"


def _values(row: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={_cell(v)}" for k, v in row.items())


def _cell(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def within(found: Validation, rows_out: int, rows_aside: int) -> bool:
    """Is no row lost and none doubled?"""
    return rows_out + rows_aside == found.rows and rows_aside == len(found.aside)
