"""How long do validation and quarantine take, beside plain Great Expectations on pandas?"""

import json
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Figure, environment
from perennial import project
from perennial.data import sources
from perennial.ledger import Ledger
from perennial.settings import Settings
from perennial.steps import validate
from perennial.steps.context import Context
from perennial.store import files
from perennial.store.engine import make_engine

MILLIONS = (1, 3, 10)
LIMIT_S, LIMIT_MB = 60.0, 2048.0
EXAMPLE = ROOT / "examples" / "retail"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
_GROUP = 131_072


def figures(scratch: Path, data: Path) -> list[Figure]:
    """Both ways at each size, in processes of their own, one after the other."""
    scratch.mkdir(parents=True)
    found = []
    for millions in MILLIONS:
        path = scratch / f"{millions}.parquet"
        transactions(data / "online_retail.parquet", millions * 1_000_000, path)
        found += [_ours(path, millions, scratch), _theirs(path, millions, scratch)]
        path.unlink()
    return found


def transactions(real: Path, rows: int, out: Path) -> None:
    """The public file again and again, with later dates and other invoices each time."""
    raw = sources.read(project.load(EXAMPLE), str(real), EXAMPLE)
    schema = pa.Schema.from_pandas(raw, preserve_index=False).remove_metadata()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for number, start in enumerate(range(0, rows, len(raw))):
            part = raw.head(rows - start).copy()
            part["InvoiceNo"] += f"-{number}"
            part["InvoiceDate"] += number * pd.Timedelta(days=400)
            table = pa.Table.from_pandas(part, schema, preserve_index=False)
            writer.write_table(table.replace_schema_metadata(None), row_group_size=_GROUP)


def _ours(path: Path, millions: int, scratch: Path) -> Figure:
    told = _child("ours", path, scratch)
    seconds, memory = told["seconds"], told["mb"]
    is_largest = millions == max(MILLIONS)
    return Figure(
        f"validate and quarantine {millions} million transactions, all rules of examples/retail",
        f"{seconds:.1f} s, {told['rows'] / seconds:,.0f} rows/s, {memory:,.0f} MB peak"
        f" ({told['aside']:,} rows kept aside)",
        f"<= {LIMIT_S:.0f} s, <= {LIMIT_MB:,.0f} MB" if is_largest else "",
        seconds <= LIMIT_S and memory <= LIMIT_MB if is_largest else None,
    )


def _theirs(path: Path, millions: int, scratch: Path) -> Figure:
    told = _child("theirs", path, scratch)
    return Figure(
        f"the same file by Great Expectations on pandas, nothing kept aside, {told['rules']} rules",
        f"{told['seconds']:.1f} s, {told['rows'] / told['seconds']:,.0f} rows/s,"
        f" {told['mb']:,.0f} MB peak",
    )


def _child(way: str, path: Path, scratch: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.validation", way, str(path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(scratch / f"{way}-{path.stem}"),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def ours(path: Path) -> dict[str, Any]:
    """The validate step, with its page, its record and its quarantine."""
    settings, found = Settings.load(), project.load(EXAMPLE)
    state = settings.state(found.name)
    engine = make_engine(state.url)
    ctx = Context(settings, found, EXAMPLE, state, engine, Ledger(engine), "bench", NOW)
    given = validate.Given(path, files.digest_file(path), NOW)
    folder = state.root
    out = validate.Out(folder / "kept", folder / "aside", folder / "page.html")
    checked = validate.validate(ctx, given, out)
    engine.dispose()
    return {"rows": checked.found.rows, "aside": checked.aside}


def theirs(path: Path) -> dict[str, Any]:
    """What a user would write: a frame, a suite, one call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import great_expectations as gx  # noqa: PLC0415
        import great_expectations.expectations as gxe  # noqa: PLC0415
        from great_expectations.data_context.types.base import (  # noqa: PLC0415
            ProgressBarsConfig,
        )

        frame = pd.read_parquet(path)
        rules = [e for e in project.load(EXAMPLE).expectations if hasattr(gxe, e.expect)]
        # A query is for engines of SQL: pandas has none.
        rules = [e for e in rules if e.expect != "UnexpectedRowsExpectation"]
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False)
        asset = context.data_sources.add_pandas("data").add_dataframe_asset("rows")
        batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
        made = [getattr(gxe, rule.expect)(**rule.args, severity=rule.severity) for rule in rules]
        suite = gx.ExpectationSuite(name="retail", expectations=made)
        batch.validate(suite, result_format="BASIC")
    return {"rows": len(frame), "rules": len(rules)}


def main() -> int:
    """Take one way on one file and print what it took, as JSON."""
    ways: dict[str, Callable[[Path], dict[str, Any]]] = {"ours": ours, "theirs": theirs}
    started = time.perf_counter()
    told = ways[sys.argv[1]](Path(sys.argv[2]))
    told["seconds"] = time.perf_counter() - started
    told["mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
