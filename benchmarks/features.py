"""How long do features take to make of millions of rows, and one entity's to look up?"""

import asyncio
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq

from benchmarks.measure import ROOT, Figure, environment, percentiles
from perennial.data import duck, simulator
from perennial.features import store as stores
from perennial.project import Project, Simulator, load
from perennial.serving import lookup
from perennial.settings import Settings
from perennial.steps import features as step

EXAMPLE = ROOT / "examples" / "retail"
MILLIONS = (1, 3, 10)
MOST_S, MOST_MB, MOST_MS = 90.0, 3 * 1024, 10.0
ASKED, WARM = 3000, 300
READY_S = 120.0
ROOM = 100_000  # customer ids of one copy of the invented history
WANTED = {"p50": 0.5, "p99": 0.99}


def figures(scratch: Path) -> list[Figure]:
    """Making features at three sizes; then looking one entity up, in four ways in turns."""
    scratch.mkdir(parents=True, exist_ok=True)
    base = scratch / "base.parquet"
    simulator.simulate(Simulator(seed=7, days=400, customers=6000)).to_parquet(
        base, coerce_timestamps="us"
    )
    made = [_built(scratch, base, millions) for millions in MILLIONS]
    return [*made, *_looked_up(scratch, base)]


def _built(scratch: Path, base: Path, millions: int) -> Figure:
    snapshot, home = scratch / "rows.parquet", scratch / "build"
    _multiply(base, snapshot, millions * 1_000_000)
    command = [sys.executable, "-m", "benchmarks.features", str(snapshot), str(home)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(home), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout.splitlines()[-1])
    snapshot.unlink()
    shutil.rmtree(home)
    # The targets are those of ten million rows.
    is_target = millions == MILLIONS[-1]
    kept = told["seconds"] <= MOST_S and told["peak_mb"] <= MOST_MB
    return Figure(
        f"features of {millions} million transaction rows, joined and materialized",
        f"{told['seconds']:.0f} s, peak {told['peak_mb']:,.0f} MB"
        f" ({told['rows']:,} examples, {told['written']:,} online)",
        f"<= {MOST_S:.0f} s, <= {MOST_MB:,} MB" if is_target else "",
        kept if is_target else None,
    )


def _multiply(base: Path, to: Path, rows: int) -> None:
    """As many rows as wanted: the same history, of other customers each time."""
    copies = -(-rows // pq.ParquetFile(base).metadata.num_rows)
    with duck.connected(to.parent / "spill") as connection:
        duck.view(connection, "base", base)
        sql = (
            "select * exclude copy replace (InvoiceNo || '-' || copy as InvoiceNo,"
            f" CustomerID + copy * {ROOM} as CustomerID) from base, range({copies}) t(copy)"
            f" order by InvoiceDate, copy limit {rows}"
        )
        duck.write(connection, sql, to)


def build(snapshot: Path, home: Path) -> dict[str, Any]:
    """Run the features step here, and say what it took."""
    began = time.monotonic()
    origin = step.Origin("bench", datetime.now(UTC))
    end = datetime(2030, 1, 1, tzinfo=UTC)
    made = step.build(
        Settings(home=home),
        load(EXAMPLE),
        snapshot,
        end,
        home / "table.parquet",
        page=home / "page.html",
        origin=origin,
    )
    took = time.monotonic() - began
    return {"seconds": took, "peak_mb": _peak_mb(), "rows": made.rows, "written": made.written}


def _peak_mb() -> float:
    """Most memory that this process ever held; what its parent held before it does not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def _looked_up(scratch: Path, base: Path) -> list[Figure]:
    project, found = load(EXAMPLE), []
    with _redis() as url:
        for name, online in (("SQLite", ""), ("Redis", url)):
            settings = Settings(home=scratch / name, features_online=online)
            snapshot = scratch / "rows.parquet"
            _multiply(base, snapshot, 500_000)
            _make(settings, project, snapshot)
            found += _measured(settings, project, name)
    return found


def _make(settings: Settings, project: Project, snapshot: Path) -> None:
    out = settings.home / "table.parquet"
    origin = step.Origin("bench", datetime.now(UTC))
    end, page = datetime(2030, 1, 1, tzinfo=UTC), settings.home / "page.html"
    settings.home.mkdir(parents=True)
    step.build(settings, project, snapshot, end, out, page=page, origin=origin)


def _measured(settings: Settings, project: Project, name: str) -> list[Figure]:
    """Ours, over HTTP and judged by policies, and Feast's own call in this process."""
    with stores.opened(settings, project) as store:
        mark = store.mark()
        assert mark is not None
        keys = _keys(store)
        names = [f"{store.name}:{feature}" for feature in project.feature_names]
        feast: Any = store._feast
        plain = _timed(
            keys, lambda key: feast.get_online_features(names, [{store.key: key}]).to_dict()
        )
        with _server(settings) as url:
            ours = asyncio.run(_asked(url, project, keys, mark.moment))
    kept = percentiles(ours, WANTED)["p99"] <= MOST_MS
    what = "look one customer's 13 features up"
    return [
        Figure(f"{what}, {name}, through the feature server", _told(ours), "p99 <= 10 ms", kept),
        Figure(f"{what}, {name}, Feast's get_online_features", _told(plain)),
    ]


def _keys(store: stores.Store) -> list[int]:
    rows = pq.read_table(store.rows, columns=[store.key, "event_time"]).to_pandas()
    newest = rows[rows["event_time"] == rows["event_time"].max()][store.key]
    return [int(key) for key in newest.sample(ASKED, replace=True, random_state=7)]


def _timed(keys: list[int], ask: Callable[[int], object]) -> list[float]:
    waited = []
    for key in keys:
        began = time.perf_counter()
        ask(key)
        waited.append((time.perf_counter() - began) * 1000)
    return waited[WARM:]


async def _asked(url: str, project: Project, keys: list[int], moment: datetime) -> list[float]:
    waited = []
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        way = lookup.Lookup(client, project, lookup.connect(url))
        for key in keys:
            began = time.perf_counter()
            await way.rows([key], moment)
            waited.append((time.perf_counter() - began) * 1000)
    return waited[WARM:]


def _told(waited: list[float]) -> str:
    found = percentiles(waited, WANTED)
    return ", ".join(f"{k} {ms:.1f} ms" for k, ms in found.items()) + f" ({len(waited):,})"


@contextlib.contextmanager
def _server(settings: Settings) -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "perennial.features.server", "--project", str(EXAMPLE)]
    env = {**environment(settings.home), "PERENNIAL_FEATURES_ONLINE": settings.features_online}
    with _running([*command, "--port", str(port)], env):
        url = f"http://127.0.0.1:{port}"
        limit = time.monotonic() + READY_S
        while time.monotonic() < limit:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health", timeout=2.0).status_code == 200:
                    break
            time.sleep(0.25)
        yield url


@contextlib.contextmanager
def _redis() -> Iterator[str]:
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("no redis-server on the path; install redis, or leave this bench out")
    port = _free_port()
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", ""]
    with _running(command, None):
        time.sleep(1.0)
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str] | None) -> Iterator[None]:
    child = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        child.terminate()
        child.wait(60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    print(json.dumps(build(Path(sys.argv[1]), Path(sys.argv[2]))))
