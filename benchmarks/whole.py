"""How long do one retraining and the whole loop take, and how much memory?"""

import json
import subprocess
from pathlib import Path

from benchmarks.measure import ROOT, Figure, Run, run

RETRAINING_S, LOOP_S, NOTHING_S, LOOP_MB = 150.0, 360.0, 600.0, 4096.0


def loop(home: Path) -> list[Figure]:
    """Do what ``make loop`` does, with warm environments."""
    done = run(["make", "-s", "loop"], home)
    if done.code:
        return [_broken("`make loop`", done)]
    summary = json.loads(max((home / "reports").glob("*.json")).read_text())
    return [
        Figure(
            f"`make loop`, warm: {len(summary['windows'])} windows,"
            f" {summary['requests']:,} requests",
            f"{done.took_s:.0f} s",
            f"<= {LOOP_S:.0f} s",
            done.took_s <= LOOP_S,
        ),
        Figure(
            "memory of all its processes together, peak (PSS)",
            f"{done.peak_mb:,.0f} MB",
            f"<= {LOOP_MB:,.0f} MB",
            done.peak_mb <= LOOP_MB,
        ),
    ]


def nothing(scratch: Path) -> list[Figure]:
    """`make loop` in a fresh clone with an empty HOME, so with no package cache either."""
    what = "`make loop` from nothing: fresh clone, empty HOME"
    clone, home = scratch / "clone", scratch / "home"
    home.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    done = run(["make", "-s", "loop"], scratch / "state", clone, {"HOME": str(home)})
    if done.code:
        return [_broken(what, done)]
    took, kept = f"{done.took_s:.0f} s", done.took_s <= NOTHING_S
    return [Figure(what, took, f"<= {NOTHING_S:.0f} s", kept)]


def retraining(bin_folder: Path, home: Path, data: Path) -> list[Figure]:
    """One run of the compiled pipeline on the real retail file, 20 trials."""
    source = data / "online_retail.parquet"
    what = "one retraining on Online Retail (541,909 rows), ingest to registered bundle, 20 trials"
    if not source.is_file():
        return [Figure(what, f"not measured: no {source.name} in {data}")]
    command = [str(bin_folder / "perennial"), "pipeline", "run", "examples/retail"]
    done = run([*command, "--source", str(source)], home)
    if done.code:
        return [_broken(what, done)]
    return [
        Figure(
            what,
            f"{done.took_s:.0f} s, {done.peak_mb:,.0f} MB",
            f"<= {RETRAINING_S:.0f} s",
            done.took_s <= RETRAINING_S,
        )
    ]


def _broken(what: str, done: Run) -> Figure:
    lines = [line for line in done.output.splitlines() if line.strip()]
    said = lines[-1] if lines else "no output"
    return Figure(what, f"ended with code {done.code}: {said}", "", False)
