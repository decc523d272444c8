"""How do the Envoys of a cluster hear of new weights: documents in SQL, served over HTTP (xDS).

Any replica of the operator serves the same words, also one that holds no lease; only the leader
writes them.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Mapping
from json import JSONDecodeError

import uvicorn
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perennial.errors import PerennialError, Unavailable
from perennial.rollout import edge
from perennial.store import edges, fence

DOCUMENTS = {"clusters": edge.CDS, "listeners": edge.LDS, "routes": edge.RDS}
POLL_S = 0.1
START_S = 10.0


class Rows:
    """The Envoys of a project's edge on a cluster, which ask the operator."""

    def __init__(
        self,
        engine: Engine,
        project: str,
        edges: Callable[[], Mapping[str, str]],
        port: int = edge.POD_PORT,
        guard: fence.Guard = fence.free,
    ) -> None:
        self._engine = engine
        self._project = project
        self._edges = edges
        self._port = port
        self._guard = guard

    def listener(self) -> edge.Config:
        return edge.listener(edge.operator_source, self._port, edge.ANYWHERE)

    def read(self, name: str) -> str | None:
        return edges.read(self._engine, self._project, name)

    def write(self, name: str, version: str, body: str) -> None:
        edges.write(self._engine, self._project, name, version, body, self._guard)

    def edges(self) -> Mapping[str, str]:
        return self._edges()


class _Board:
    """Versions of all documents, read once for all who wait."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock = asyncio.Lock()
        self._versions: dict[tuple[str, str], str] = {}
        self._read_at = -math.inf

    async def version(self, project: str, name: str) -> str | None:
        async with self._lock:
            if time.monotonic() - self._read_at >= POLL_S:
                self._versions = await run_in_threadpool(edges.versions, self._engine)
                self._read_at = time.monotonic()
        return self._versions.get((project, name))


def app(
    engine: Engine, hold_s: float = edge.HOLD_S, is_over: Callable[[], bool] = bool
) -> Starlette:
    """The discovery service: an Envoy asks with what it has and is answered when that is old."""
    board = _Board(engine)

    async def discover(request: Request) -> Response:
        name = DOCUMENTS.get(request.path_params["kind"])
        asked = await request.json()
        project = str(asked.get("node", {}).get("cluster", ""))
        if name is None or not project:
            return JSONResponse({"error": "wanted a document and a node with a cluster"}, 404)
        limit = time.monotonic() + hold_s
        while (version := await board.version(project, name)) == asked.get("version_info"):
            if time.monotonic() > limit or is_over():
                return Response(status_code=304)
            await asyncio.sleep(POLL_S)
        body = await run_in_threadpool(edges.read, engine, project, name) if version else None
        # Nothing written yet is no empty configuration: an Envoy keeps what it has.
        return Response(body, media_type="application/json") if body else _silent(request, None)

    return Starlette(
        routes=[Route("/v3/discovery:{kind}", discover, methods=["POST"])],
        exception_handlers={PerennialError: _silent, JSONDecodeError: _refuse},
    )


def _silent(_request: Request, exc: Exception | None) -> Response:
    return JSONResponse({"error": str(exc or "nothing is known of this project yet")}, 503)


def _refuse(_request: Request, exc: Exception) -> Response:
    return JSONResponse({"error": f"the request is not JSON: {exc}"}, 400)


class Server:
    """The discovery service in a thread of its own, for as long as it is entered."""

    def __init__(self, engine: Engine, host: str, port: int, hold_s: float = edge.HOLD_S) -> None:
        config = uvicorn.Config(
            app(engine, hold_s, lambda: self._server.should_exit),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=1,
        )
        self._where = f"{host}:{port}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="xds", daemon=True)

    def __enter__(self) -> "Server":
        """Raises Unavailable when the port cannot be had."""
        self._thread.start()
        limit = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > limit:
                raise Unavailable(f"cannot serve the edge's configuration on {self._where}")
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(START_S)

    def is_alive(self) -> bool:
        """For a liveness probe: does it serve?"""
        return self._thread.is_alive() and self._server.started

    def _serve(self) -> None:
        try:
            self._server.run()
        except SystemExit:
            # uvicorn's way of saying that it cannot listen; __enter__ tells it.
            return
