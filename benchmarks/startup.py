"""How long does a person wait for help?"""

import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.measure import Figure

LIMIT_S = 0.15
TIMES = 15


def figures(bin_folder: Path) -> list[Figure]:
    """Median wall time of ``perennial --help``."""
    seconds = sorted(_once(bin_folder) for _ in range(TIMES))
    middle = statistics.median(seconds)
    return [
        Figure(
            "`perennial --help`, wall time",
            f"{middle:.3f} s median, {seconds[-1]:.3f} s slowest of {TIMES}",
            f"<= {LIMIT_S} s",
            middle <= LIMIT_S,
        )
    ]


def _once(bin_folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run([bin_folder / "perennial", "--help"], check=True, capture_output=True)
    return time.perf_counter() - started
