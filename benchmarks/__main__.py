"""Measure what the project promises about time and memory, and write it into BENCHMARKS.md."""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    cluster,
    features,
    full,
    ingest,
    latency,
    operator,
    startup,
    validation,
    whole,
)
from benchmarks.measure import ROOT, Figure

PAGE = ROOT / "BENCHMARKS.md"
# Hours: only when they are asked for.
LONG = {"full", "full-cluster"}
HEAD = """# Benchmarks

Measured by `make bench` on one machine, newest first. Targets are for 2 cores.
"""


def main() -> int:
    """Run the benches asked for; exit 1 if a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "only",
        nargs="*",
        help="startup, ingest, validation, features, retraining, loop, nothing, latency, operator,"
        " cluster, full, full-cluster",
    )
    only = parser.parse_args().only
    with tempfile.TemporaryDirectory(prefix="perennial-bench-") as scratch:
        benches = _benches(Path(sys.executable).parent, Path(scratch))
        unknown = sorted(set(only) - set(benches))
        if unknown:
            parser.error(f"no bench called {', '.join(unknown)}; there are {', '.join(benches)}")
        found = [
            f
            for name, bench in benches.items()
            if name in (only or set(benches) - LONG)
            for f in _tell(bench)
        ]
    _write(found, only)
    return int(any(f.kept is False for f in found))


def _benches(bin_folder: Path, scratch: Path) -> dict[str, Callable[[], list[Figure]]]:
    data = Path(os.environ.get("PERENNIAL_TEST_DATA", ROOT.parent / "shared" / "data"))
    return {
        "startup": lambda: startup.figures(bin_folder),
        "validation": lambda: validation.figures(scratch / "validation", data),
        "ingest": lambda: ingest.figures(scratch / "ingest"),
        "retraining": lambda: whole.retraining(bin_folder, scratch / "retraining", data),
        "loop": lambda: whole.loop(scratch / "loop"),
        "nothing": lambda: whole.nothing(scratch / "nothing"),
        "latency": lambda: latency.figures(bin_folder, scratch / "latency"),
        "features": lambda: features.figures(scratch / "features"),
        "operator": lambda: operator.figures(scratch / "operator"),
        **({"cluster": cluster.figures} if os.environ.get("KUBECONFIG") else {}),
        "full": full.here,
        "full-cluster": full.on_cluster,
    }


def _tell(bench: Callable[[], list[Figure]]) -> list[Figure]:
    found = bench()
    for figure in found:
        print(
            f"{figure.what}: {figure.measured} {figure.target} {_verdict(figure)}".rstrip(),
            flush=True,
        )
    return found


def _verdict(figure: Figure) -> str:
    return {True: "kept", False: "MISSED", None: ""}[figure.kept]


def _write(found: list[Figure], only: list[str]) -> None:
    old = PAGE.read_text(encoding="utf-8").removeprefix(HEAD) if PAGE.is_file() else ""
    PAGE.write_text(HEAD + _section(found, only) + old, encoding="utf-8")


def _section(found: list[Figure], only: list[str]) -> str:
    command = f"python -m benchmarks {' '.join(only)}" if only else "make bench"
    rows = [f"| {f.what} | {f.measured} | {f.target} | {_verdict(f)} |" for f in found]
    lines = [
        f"\n## {datetime.now(UTC):%Y-%m-%d %H:%M} UTC\n",
        f"`{command}` at commit {_commit()}, {_machine()}\n",
        "| what | measured | target | |",
        "|---|---|---|---|",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=8", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {memory:.0f} GB, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
