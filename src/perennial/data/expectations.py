"""What does Great Expectations say? It judges what DuckDB cannot, on as few rows as will do."""

import ast
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from perennial.data.rules import TEXT, Columns
from perennial.data.sift import EXAMPLES, Positions, nothing
from perennial.errors import BadInput
from perennial.project import Expectation

Reach = Literal["schema", "rows", "columns"]
QUERY = "UnexpectedRowsExpectation"
_GROUP = 131_072
# About rows, but each is judged by the others.
_TOGETHER = (
    "ExpectColumnValueZScoresToBeLessThan",
    "ExpectColumnValuesToNotBeOutliers",
    "ExpectColumnValuesToBeIncreasing",
    "ExpectColumnValuesToBeDecreasing",
    "ExpectColumnValuesToBeUnique",
    "ExpectCompoundColumnsToBeUnique",
)
# What a condition may call without a look at other rows; x.mean() of some rows is not that of all.
_BY_ROW = (
    *("abs", "between", "dt", "isin", "isna", "isnull", "notna", "notnull", "round", "str"),
    *("contains", "endswith", "fullmatch", "len", "lower", "match", "startswith", "strip", "upper"),
    *("date", "day", "dayofweek", "hour", "minute", "month", "year"),
)
_TYPES = ("ExpectColumnValuesToBeInTypeList", "ExpectColumnValuesToBeOfType")
_SCHEMA = ("ExpectColumnToExist", "ExpectTableColumn", "ExpectColumnTypeToBe")


@dataclass(frozen=True)
class Result:
    """What one expectation found; positions count from 0 and are those of rows that break it."""

    passed: bool
    looked_at: int = 0
    unexpected: int = 0
    examples: tuple[str, ...] = ()
    detail: str = ""
    observed: Any = None
    positions: Positions = field(default_factory=nothing, compare=False)


def check(wanted: Sequence[Expectation]) -> None:
    """Raises BadInput for a name or arguments that Great Expectations does not know."""
    for one in wanted:
        _make(one, 0)


def is_row_level(wanted: Expectation) -> bool:
    """Does each row of a snapshot keep or break the expectation?"""
    kinds = _library().expectations.expectation
    rowwise = (
        kinds.ColumnMapExpectation,
        kinds.ColumnPairMapExpectation,
        kinds.MulticolumnMapExpectation,
    )
    return issubclass(_kind(wanted), rowwise) and wanted.expect not in _TYPES


def reach(wanted: Expectation, columns: Columns) -> Reach:
    """What must be at hand to judge: no row, some rows at a time, or whole columns."""
    if wanted.expect.startswith(_SCHEMA):
        return "schema"
    if wanted.expect in _TYPES:
        return "rows" if columns.get(str(wanted.args.get("column"))) == TEXT else "schema"
    if not is_row_level(wanted) or wanted.expect in _TOGETHER:
        return "columns"
    return "rows" if _is_by_row(str(wanted.args.get("row_condition") or "")) else "columns"


def _is_by_row(condition: str) -> bool:
    """Does a condition of pandas say of each row alone whether the rule is about it?"""
    try:
        tree = ast.parse(condition.strip() or "None", mode="eval")
    except SyntaxError:
        return False
    return not any(_looks_around(node) for node in ast.walk(tree))


def _looks_around(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name)) | ast.Attribute(attr=name):
            return name not in _BY_ROW
        case ast.Compare(comparators=others):
            return any(isinstance(op, ast.In | ast.NotIn) for op in node.ops) and any(
                isinstance(other, ast.Name) for other in others
            )
    return isinstance(node, ast.Subscript)


def judge(wanted: Sequence[Expectation], frame: Any) -> list[Result]:
    """Judge a pandas frame whose index counts from 0; raises BadInput as ``check`` does."""
    if not wanted:
        return []
    gx, made = _library(), [_make(one, place) for place, one in enumerate(wanted)]
    bars = gx.data_context.types.base.ProgressBarsConfig(globally=False)
    with _quiet():
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = bars
        asset = context.data_sources.add_pandas("data").add_dataframe_asset("snapshot")
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        suite = gx.ExpectationSuite(name="project", expectations=made)
        results = batch.validate(suite, result_format="COMPLETE").results
    # Results come back in an order of their own.
    by_place = {_place(result): result for result in results}
    return [_result(by_place[place]) for place in range(len(wanted))]


def judge_groups(wanted: Sequence[Expectation], snapshot: Path) -> list[Result]:
    """Judge row-level expectations on a Parquet file, some rows at a time."""
    found = [Result(True) for _ in wanted]
    for start, frame in _groups(snapshot, wanted) if wanted else ():
        for place, result in enumerate(judge(wanted, frame)):
            found[place] = _added(found[place], result, start)
    return [_kept(one, result) for one, result in zip(wanted, found, strict=True)]


def _groups(snapshot: Path, wanted: Sequence[Expectation]) -> Iterator[tuple[int, Any]]:
    file, start = pq.ParquetFile(snapshot), 0
    named = {column for one in wanted for column in one.columns}
    columns = [c for c in file.schema_arrow.names if c in named]
    for batch in file.iter_batches(_GROUP, columns=columns):
        yield start, batch.to_pandas()
        start += len(batch)


def _added(sum_: Result, more: Result, start: int) -> Result:
    return replace(
        sum_,
        passed=sum_.passed and more.passed,
        looked_at=sum_.looked_at + more.looked_at,
        unexpected=sum_.unexpected + more.unexpected,
        examples=(sum_.examples + more.examples)[:EXAMPLES],
        detail=sum_.detail or more.detail,
        positions=np.concatenate([sum_.positions, more.positions + start]),
    )


def _kept(wanted: Expectation, found: Result) -> Result:
    """Over all groups: a share that is too great in one of them may be small in all."""
    if not found.looked_at:
        return found
    share = (found.looked_at - found.unexpected) / found.looked_at
    return replace(found, passed=not found.detail and share >= wanted.mostly)


def _library() -> Any:
    with _quiet():
        import great_expectations
        import great_expectations.data_context.types.base
        import great_expectations.expectations.expectation
    return great_expectations


@contextmanager
def _quiet() -> Iterator[None]:
    """Great Expectations warns of its own dependencies' future; none of it is about the data."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _kind(wanted: Expectation) -> Any:
    kind = getattr(_library().expectations, wanted.expect, None)
    if kind is None or not (wanted.expect.startswith("Expect") or wanted.expect == QUERY):
        raise BadInput(
            f"expectations: {wanted.expect} is not an expectation of Great Expectations; wanted a"
            " name such as ExpectColumnValuesToNotBeNull"
        )
    return kind


def _make(wanted: Expectation, place: int) -> Any:
    kind = _kind(wanted)
    try:
        with _quiet():
            return kind(**wanted.args, severity=wanted.severity, meta={"place": place})
    except (TypeError, ValueError) as exc:
        first = " ".join(str(exc).split())
        raise BadInput(f"expectations: {wanted.expect} has wrong args: {first}") from exc


def _place(told: Any) -> int:
    return int(told.expectation_config.meta["place"])


def _result(told: Any) -> Result:
    found = told.result or {}
    raised = _raised(told.exception_info or {})
    examples = tuple(dict.fromkeys(str(v) for v in found.get("partial_unexpected_list") or []))
    observed = found.get("observed_value")
    detail = raised or (f"observed {observed}" if observed is not None else "")
    positions = [p for p in found.get("unexpected_index_list") or [] if isinstance(p, int)]
    return Result(
        passed=bool(told.success),
        looked_at=int(found.get("element_count") or 0) - int(found.get("missing_count") or 0),
        unexpected=int(found.get("unexpected_count") or 0),
        examples=examples[:EXAMPLES],
        detail=" ".join(str(detail).split())[:200],
        observed=observed,
        positions=np.unique(np.asarray(positions, dtype=np.int64)),
    )


def _raised(info: dict[str, Any]) -> str:
    """Why an expectation could not be tried: one message, or one for each thing it measures."""
    several = [info] if "exception_message" in info else list(info.values())
    said = (str(found.get("exception_message") or "") for found in several)
    return next((message for message in said if message), "")
