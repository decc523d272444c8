"""Run a child and say how long it took and how much memory all that it started held."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 0.5


@dataclass(frozen=True)
class Figure:
    """One line of the result: what was measured, against which target (empty: told only)."""

    what: str
    measured: str
    target: str = ""
    kept: bool | None = None


@dataclass(frozen=True)
class Run:
    """How a child went."""

    code: int
    took_s: float
    peak_mb: float
    output: str


def environment(home: Path) -> dict[str, str]:
    """This environment with a state folder of its own, by which its processes are known."""
    return {**os.environ, "PERENNIAL_HOME": str(home), "PERENNIAL_EDGE_PORT": "0"}


def run(
    command: Sequence[str], home: Path, root: Path = ROOT, more: Mapping[str, str] | None = None
) -> Run:
    """Run to the end in ``root``; memory is the proportional set size of this home's processes."""
    started = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=root,
        env={**environment(home), **(more or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        peaks = [0.0]
        watcher = threading.Thread(target=_watch, args=(child, home, peaks), daemon=True)
        watcher.start()
        output, _ = child.communicate()
    took = time.monotonic() - started
    watcher.join()
    return Run(child.returncode, took, max(peaks), output)


def _watch(child: "subprocess.Popen[str]", home: Path, peaks: list[float]) -> None:
    while child.poll() is None:
        peaks.append(memory_mb(home))
        time.sleep(EVERY_S)


def memory_mb(home: Path) -> float:
    """Memory of every process that was started with this state folder."""
    return sum(_pss_kb(process) for process in _processes(home)) / 1024


def _processes(home: Path) -> Iterator[Path]:
    mark = f"PERENNIAL_HOME={home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes():
                yield process
        except OSError:
            continue


def _pss_kb(process: Path) -> int:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def percentiles(values: Sequence[float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Nearest-rank percentiles by name."""
    ordered = sorted(values)
    return {k: ordered[min(int(q * len(ordered)), len(ordered) - 1)] for k, q in wanted.items()}
