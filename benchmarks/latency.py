"""How long does a client wait for one row, through the whole stack and from the predictor alone?"""

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measure import ROOT, Figure, environment, percentiles
from perennial import bundle, project
from perennial.contract import Contract
from perennial.data import history, sources
from perennial.settings import Settings

EXAMPLE = ROOT / "examples" / "retail"
RATE, BLOCK_S, BLOCKS, WARM_S = 100, 20, 3, 5
READY_S = 300.0
WANTED = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass
class Answers:
    """What came back at one place."""

    waited_ms: list[float] = field(default_factory=list)
    failed: int = 0


def figures(bin_folder: Path, home: Path) -> list[Figure]:
    """Both places in one run, in turns, so that both see the same machine."""
    found = project.load(EXAMPLE)
    with _stack(bin_folder, home, found.name) as edge:
        folder = next(Settings(home=home).state(found.name).bundles.iterdir())
        bodies = _bodies(found, folder)
        with _predictor(home, found.name, folder) as alone:
            answers = asyncio.run(_turns({"edge": edge, "predictor": alone}, found.name, bodies))
    names = {
        "edge": "predict one row through Envoy, transformer and predictor",
        "predictor": "predict one row, predictor alone",
    }
    return [Figure(f"{names[k]}, {RATE} requests/s", _told(a)) for k, a in answers.items()]


def _told(answers: Answers) -> str:
    found = percentiles(answers.waited_ms, WANTED)
    times = ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items())
    return f"{times} ({len(answers.waited_ms):,} requests, {answers.failed} failed)"


def _bodies(found: project.Project, folder: Path) -> list[dict[str, Any]]:
    contract = Contract.from_plain(bundle.parts(folder).contract)
    raw = sources.read(found, None, EXAMPLE)
    rows = history.examples(found, raw, project.parse_moment("2000-01-01"), None).head(500)
    moments = [m.to_pydatetime() for m in rows["event_time"]]
    return [
        contract.to_request(rows.iloc[i : i + 1], f"b{i}", moments[i]) for i in range(len(rows))
    ]


async def _turns(
    places: dict[str, str], name: str, bodies: list[dict[str, Any]]
) -> dict[str, Answers]:
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=64)
    async with httpx.AsyncClient(timeout=10.0, limits=limits) as client:
        for url in places.values():
            await _block(client, f"{url}/v2/models/{name}/infer", bodies, WARM_S, Answers())
        answers = {place: Answers() for place in places}
        for _ in range(BLOCKS):
            for place, url in places.items():
                address = f"{url}/v2/models/{name}/infer"
                await _block(client, address, bodies, BLOCK_S, answers[place])
    return answers


async def _block(
    client: httpx.AsyncClient, url: str, bodies: list[dict[str, Any]], seconds: int, to: Answers
) -> None:
    """Send at a fixed rate whatever comes back; time runs from when a request was due."""
    begin = time.perf_counter() + 0.1
    due = [begin + i / RATE for i in range(seconds * RATE)]
    await asyncio.gather(
        *(_ask(client, url, bodies[i % len(bodies)], moment, to) for i, moment in enumerate(due))
    )


async def _ask(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], due: float, to: Answers
) -> None:
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    try:
        response = await client.post(url, json=body)
        to.failed += response.status_code != 200
    except httpx.HTTPError:
        to.failed += 1
    to.waited_ms.append((time.perf_counter() - due) * 1000)


@contextlib.contextmanager
def _stack(bin_folder: Path, home: Path, name: str) -> Iterator[str]:
    port = _free_port()
    env = {**environment(home), "PERENNIAL_EDGE_PORT": str(port)}
    command = [str(bin_folder / "perennial"), "up", str(EXAMPLE)]
    with _running(command, env, home / "up.log"):
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/v2/models/{name}/ready")
        yield url


@contextlib.contextmanager
def _predictor(home: Path, name: str, folder: Path) -> Iterator[str]:
    http, grpc = _free_port(), _free_port()
    command = [str(Settings().runtime_python), "-m", "perennial.serving.predictor"]
    command += ["--model_name", name, "--bundle", str(folder), "--host", "127.0.0.1"]
    command += ["--http_port", str(http), "--grpc_port", str(grpc)]
    env = {**environment(home), "OMP_NUM_THREADS": "1"}
    with _running(command, env, home / "predictor.log"):
        url = f"http://127.0.0.1:{http}"
        _wait(f"{url}/v2/models/{name}/ready")
        yield url


@contextlib.contextmanager
def _running(command: list[str], env: dict[str, str], log: Path) -> Iterator[None]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
    try:
        yield
    finally:
        child.terminate()
        child.wait(60)


def _wait(url: str) -> None:
    until = time.monotonic() + READY_S
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        time.sleep(0.25)
    sys.exit(f"{url} was not ready after {READY_S:.0f} s; see the logs beside the state folder")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
