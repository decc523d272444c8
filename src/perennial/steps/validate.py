"""Is the data what the project expects? Great Expectations in three layers, by severity."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from perennial.errors import BadInput, RunFailed
from perennial.project import Expectation, Project
from perennial.report import page as pages
from perennial.store import files

LAYERS = {
    "schema": "Schema: columns, types, ranges",
    "statistics": "Statistics: shares, outliers, distributions",
    "business": "Business rules: what must hold between columns",
}

NUMBERS = ["int64", "float64", "int32", "float32"]


@dataclass(frozen=True)
class Finding:
    """What one expectation found."""

    expectation: Expectation
    passed: bool
    rows: int
    unexpected: int
    examples: tuple[str, ...]
    detail: str

    @property
    def sentence(self) -> str:
        """What was wanted and what was seen, in one sentence."""
        column = self.expectation.args.get("column", "the table")
        said = f"{column}: {self.expectation.expect}"
        if self.passed:
            return f"{said} holds"
        seen = f", such as {', '.join(self.examples)}" if self.examples else ""
        count = f"{self.unexpected:,} of {self.rows:,} rows break it" if self.unexpected else ""
        return f"{said} fails: {count or self.detail or 'not met'}{seen}"


@dataclass(frozen=True)
class Validation:
    """All findings on one snapshot."""

    findings: tuple[Finding, ...]

    @property
    def critical(self) -> tuple[Finding, ...]:
        """Failures that stop a run."""
        return self._failed("critical")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """Failures that are only reported."""
        return self._failed("warning") + self._failed("info")

    @property
    def passed(self) -> bool:
        return not self.critical

    def _failed(self, severity: str) -> tuple[Finding, ...]:
        return tuple(
            f for f in self.findings if not f.passed and f.expectation.severity == severity
        )


def validate(project: Project, snapshot: Path, page: Path) -> Validation:
    """Check a snapshot and write the page; raises RunFailed after it when something is critical."""
    frame = pd.read_parquet(snapshot)
    found = check(project, frame)
    files.write_atomic(page, render(project, found, len(frame)))
    if not found.passed:
        said = "; ".join(f.sentence for f in found.critical)
        raise RunFailed(f"{len(found.critical)} critical expectation(s) failed: {said}")
    return found


def check(project: Project, frame: pd.DataFrame) -> Validation:
    """Run the project's expectations and those that every project has."""
    wanted = (*_implied(project), *project.expectations)
    missing = _without_column(wanted, frame)
    gone = {id(f.expectation) for f in missing}
    return Validation((*missing, *_run([e for e in wanted if id(e) not in gone], frame)))


def _implied(project: Project) -> tuple[Expectation, ...]:
    """What no project can do without: its columns, numbers as such, and enough rows."""
    needed = _columns(project)
    exist = [
        Expectation(expect="ExpectColumnToExist", args={"column": column}) for column in needed
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
    return (
        "InvoiceNo",
        "StockCode",
        "Quantity",
        "InvoiceDate",
        "UnitPrice",
        "CustomerID",
        "Country",
    )


def _numbers(project: Project) -> tuple[str, ...]:
    if project.kind == "table":
        return tuple(f.name for f in project.features if f.type == "number")
    return ("Quantity", "UnitPrice", "CustomerID")


def _without_column(wanted: tuple[Expectation, ...], frame: pd.DataFrame) -> tuple[Finding, ...]:
    """Expectations on a column that is not there fail without asking Great Expectations."""
    return tuple(
        Finding(e, False, len(frame), 0, (), f"there is no column {e.args['column']}")
        for e in wanted
        if isinstance(e.args.get("column"), str) and e.args["column"] not in frame.columns
    )


def _run(wanted: list[Expectation], frame: pd.DataFrame) -> tuple[Finding, ...]:
    with warnings.catch_warnings():
        # Great Expectations warns of its own dependencies' future; none of it is about the data.
        warnings.simplefilter("ignore")
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

        made = [_make(e, place) for place, e in enumerate(wanted)]
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("data").add_dataframe_asset("snapshot")
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        suite = gx.ExpectationSuite(name="project", expectations=made)
        results = batch.validate(suite, result_format="BASIC").results
    # Results come back in an order of their own.
    by_place = {_place(r): r for r in results}
    return tuple(_finding(e, by_place[i], len(frame)) for i, e in enumerate(wanted))


def _place(result: Any) -> int:
    return int(result.expectation_config.meta["place"])


def _make(wanted: Expectation, place: int) -> Any:
    import great_expectations.expectations as gxe

    kind = getattr(gxe, wanted.expect, None)
    if kind is None or not wanted.expect.startswith("Expect"):
        raise BadInput(
            f"expectations: {wanted.expect} is not an expectation of Great Expectations; wanted a"
            " name such as ExpectColumnValuesToNotBeNull"
        )
    try:
        return kind(**wanted.args, severity=wanted.severity, meta={"place": place})
    except (TypeError, ValueError) as exc:
        first = " ".join(str(exc).split())
        raise BadInput(f"expectations: {wanted.expect} has wrong args: {first}") from exc


def _finding(wanted: Expectation, result: Any, rows: int) -> Finding:
    found = result.result or {}
    raised = _raised(result.exception_info or {})
    examples = tuple(dict.fromkeys(str(v) for v in found.get("partial_unexpected_list", [])))
    observed = found.get("observed_value")
    detail = raised or (f"observed {observed}" if observed is not None else "")
    return Finding(
        wanted,
        bool(result.success),
        rows,
        int(found.get("unexpected_count") or 0),
        examples[:3],
        " ".join(str(detail).split())[:200],
    )


def _raised(info: dict[str, Any]) -> str:
    """Why an expectation could not be tried: one message, or one for each thing it measures."""
    several = [info] if "exception_message" in info else list(info.values())
    said = (str(found.get("exception_message") or "") for found in several)
    return next((message for message in said if message), "")


def render(project: Project, found: Validation, rows: int) -> str:
    """The page that a person reads: what failed first, then each layer."""
    lead = (
        f"{rows:,} rows; {len(found.findings)} expectations,"
        f" {len(found.critical)} critical and {len(found.warnings)} other failures."
    )
    failed = [*found.critical, *found.warnings]
    sections = [
        pages.Section("What failed", _table(failed) if failed else "<p>Nothing.</p>"),
        *(
            pages.Section(title, _table([f for f in found.findings if f.expectation.layer == key]))
            for key, title in LAYERS.items()
        ),
    ]
    return pages.page(f"Validation of {project.name}", sections, lead)


def _table(findings: list[Finding]) -> str:
    head = ("result", "severity", "expectation", "arguments", "rows that break it", "examples")
    rows = [
        (
            "kept" if f.passed else "BROKEN",
            f.expectation.severity,
            f.expectation.expect,
            ", ".join(f"{k}={v}" for k, v in f.expectation.args.items()),
            f"{f.unexpected:,}" if f.unexpected else f.detail,
            ", ".join(f.examples),
        )
        for f in findings
    ]
    return pages.table(rows, head) if rows else "<p>No expectation.</p>"
