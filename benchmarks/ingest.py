"""How long does a snapshot of 10 million purchases take, and how much memory?"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Figure, environment

SIZES = (1_000_000, 3_000_000, 10_000_000)
LIMIT_MB = 2048
_PART = 500_000
_SECOND = 1_000_000  # microseconds
_FIRST = 1_262_304_000  # 2010-01-01
_SPAN_S = 3 * 365 * 86_400
# A process of its own: its peak is what the kernel says of it at its end.
_CHILD = """
import json, resource, sys, time
from datetime import UTC, datetime
from pathlib import Path
from perennial import project
from perennial.settings import Settings
from perennial.steps import ingest

example, source, home = map(Path, sys.argv[1:])
began = time.monotonic()
taken = ingest.ingest(Settings(home=home), project.load(example), example, str(source), None,
    home / "out", run="r", trigger="t", now=datetime.now(UTC))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
took = time.monotonic() - began
print(json.dumps({"digest": taken.digest, "rows": taken.rows, "took_s": took, "peak_mb": peak}))
"""


@dataclass(frozen=True)
class _Ingest:
    digest: str
    rows: int
    took_s: float
    peak_mb: float


def figures(scratch: Path) -> list[Figure]:
    """Time and peak memory by number of rows and form of file; both forms give one digest."""
    return [figure for rows in SIZES for figure in _of(rows, scratch / str(rows))]


def _of(rows: int, folder: Path) -> list[Figure]:
    folder.mkdir(parents=True)
    paths = [folder / "rows.parquet", folder / "rows.csv"]
    _write(rows, *paths)
    done = [_ingest(path, folder / f"home-{path.suffix}") for path in paths]
    shutil.rmtree(folder)
    same = len({one.digest for one in done}) == 1 and all(one.rows == rows for one in done)
    return [
        *(_told(path, one) for path, one in zip(paths, done, strict=True)),
        Figure(f"one digest of {rows:,} rows in both forms", "yes" if same else "no", "yes", same),
    ]


def _told(path: Path, one: _Ingest) -> Figure:
    speed = one.rows / one.took_s
    return Figure(
        f"ingest of {one.rows:,} purchases, {path.suffix[1:]}",
        f"{one.took_s:.1f} s, {speed:,.0f} rows/s, {one.peak_mb:,.0f} MB peak",
        f"<= {LIMIT_MB:,} MB",
        one.peak_mb <= LIMIT_MB,
    )


def _ingest(source: Path, home: Path) -> _Ingest:
    where = map(str, (ROOT / "examples" / "retail", source, home))
    command = [sys.executable, "-c", _CHILD, *where]
    done = subprocess.run(
        command, env=environment(home), check=True, stdout=subprocess.PIPE, text=True
    )
    return _Ingest(**json.loads(done.stdout.splitlines()[-1]))


def _write(rows: int, parquet: Path, text: Path) -> None:
    rng = np.random.default_rng(7)
    with text.open("wb") as file, pq.ParquetWriter(parquet, _SCHEMA) as writer:
        for part in _parts(rng, rows):
            writer.write_table(part)
            header = not file.tell()
            pyarrow.csv.write_csv(part, file, pyarrow.csv.WriteOptions(include_header=header))


_SCHEMA = pa.schema(
    [
        ("InvoiceNo", pa.string()),
        ("StockCode", pa.string()),
        ("Description", pa.string()),
        ("Quantity", pa.int64()),
        ("InvoiceDate", pa.timestamp("us")),
        ("UnitPrice", pa.float64()),
        ("CustomerID", pa.int64()),
        ("Country", pa.string()),
    ]
)


def _parts(rng: np.random.Generator, rows: int) -> Iterator[pa.Table]:
    """Purchases in parts that are in order of time, but overlap each other."""
    for start in range(0, rows, _PART):
        count = min(_PART, rows - start)
        marks = np.where(rng.random(count) < 0.02, "C", "")
        numbers = rng.integers(500_000, 999_999, count).astype(str)
        words = rng.integers(0, 4000, count).astype(str)
        columns = (
            np.char.add(marks, numbers),
            rng.integers(10_000, 99_999, count).astype(str),
            pa.array(
                np.char.add("RED RETROSPOT CAKE STAND ", words), mask=rng.random(count) < 0.003
            ),
            rng.integers(-5, 50, count),
            (np.sort(rng.integers(0, _SPAN_S, count)) + _FIRST) * _SECOND,
            np.round(rng.gamma(2, 2, count), 2),
            pa.array(rng.integers(10_000, 200_000, count), mask=rng.random(count) < 0.25),
            rng.choice(["United Kingdom", "Germany", "France", "EIRE"], count),
        )
        arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
        yield pa.Table.from_arrays(arrays, schema=_SCHEMA)
