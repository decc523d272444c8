"""Do all tests pass at full counts: whole histories of years, and many kills on a cluster?"""

import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from benchmarks.measure import ROOT, Figure

# What 'make test-cluster' asks for less of, so that it ends within half an hour.
COUNTS = {
    "PERENNIAL_TEST_KILLS": "20",
    "PERENNIAL_TEST_AWAY_S": "60",
    "PERENNIAL_TEST_PATIENCE_S": "180",
}
_SUMMARY = re.compile(r"^[= ]*(\d+ \w+(?:, \d+ \w+)*) in [\d.]+s")
_COUNT = re.compile(r"(\d+) (\w+)")


def here() -> list[Figure]:
    """Run those that want no cluster; their output is passed on."""
    return [_one("all tests without a cluster", ["tests/run"], {"FULL": "1"})]


def on_cluster() -> list[Figure]:
    """Run those on a cluster; their output is passed on."""
    told = ", ".join(f"{name.removeprefix('PERENNIAL_TEST_')}={n}" for name, n in COUNTS.items())
    return [_one(f"all tests on a cluster ({told})", ["tests/cluster/run"], COUNTS)]


def counted(lines: Sequence[str]) -> str:
    """What several runs of pytest said at their ends, as one sum."""
    found: Counter[str] = Counter()
    for line in lines:
        if summary := _SUMMARY.match(line):
            found.update({kind.rstrip("s"): int(n) for n, kind in _COUNT.findall(summary[1])})
    return ", ".join(f"{n:,} {kind}" for kind, n in sorted(found.items())) or "no test"


def _one(what: str, command: Sequence[str], more: Mapping[str, str]) -> Figure:
    began, lines = time.monotonic(), []
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **more}, stdout=subprocess.PIPE, text=True
    ) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    minutes = (time.monotonic() - began) / 60
    measured = f"{counted(lines)} in {minutes:.0f} min"
    return Figure(what, measured, "none fails", child.returncode == 0)
