"""Take drift events over HTTP on this machine, and let the worker make of them what is due."""

import argparse
import logging
import signal
import socket
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import uvicorn
from sqlalchemy import Engine
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perennial import events, signing
from perennial import project as projects
from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.project import Project
from perennial.records import Event
from perennial.retrain.inbox import Inbox
from perennial.retrain.runs import Result, Runs
from perennial.retrain.worker import Confirm, Worker
from perennial.settings import Settings, StateFolder
from perennial.store.engine import make_engine

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_BYTES = 64 << 10
FRESH = timedelta(minutes=5)


class Box(Protocol):
    """Where accepted events go."""

    def put(self, event: Event) -> bool:
        """Keep an event for good before returning; raises Unavailable."""
        ...


class Refused(Exception):
    """A request that gets an error status and one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Service:
    """The HTTP side: an event is checked, kept, and only then acknowledged."""

    def __init__(
        self, name: str, box: Box, worker: Worker, key: bytes, clock: Callable[[], datetime]
    ) -> None:
        self._name = name
        self._box = box
        self._worker = worker
        self._key = key
        self._clock = clock

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._receive, methods=["POST"]),
                Route("/healthz", self._health),
                Route("/status", self._status),
            ]
        )

    async def _receive(self, request: Request) -> Response:
        try:
            event = self._checked(request, await _body(request))
            await run_in_threadpool(self._box.put, event)
        except Refused as exc:
            return JSONResponse({"error": str(exc)}, exc.status)
        except Unavailable as exc:
            log.warning("event not kept: %s", exc.__cause__ or exc)
            return JSONResponse({"error": str(exc)}, 503, {"Retry-After": "1"})
        self._worker.wake()
        # A 202 with a body could be taken for a reply event.
        return Response(status_code=202)

    def _checked(self, request: Request, body: bytes) -> Event:
        if events.mode_of(request.headers) is None:
            wanted = f"{events.STRUCTURED}, or application/json with ce- headers"
            raise Refused(415, f"the content type is not {wanted}")
        try:
            event, signature = events.from_http(request.headers, body)
            self._check_meaning(event)
        except BadInput as exc:
            raise Refused(400, str(exc)) from exc
        if not signing.verify(self._key, events.message(event), signature):
            raise Refused(401, "the signature is missing or wrong; sign with this project's key")
        if abs(self._clock() - event.time) > FRESH:
            raise Refused(401, "time is over 5 minutes from now; stamp and sign the event anew")
        return event

    def _check_meaning(self, event: Event) -> None:
        if event.type != events.DRIFT:
            raise BadInput(f"the type is {event.type}, wanted {events.DRIFT}")
        if event.subject != self._name:
            raise BadInput(f"the subject is {event.subject}, wanted {self._name}")
        events.hint(event)

    async def _health(self, _request: Request) -> Response:
        return Response(status_code=200 if self._worker.alive else 503)

    async def _status(self, _request: Request) -> Response:
        status = await run_in_threadpool(self._worker.status)
        decided = status.last_decided
        return JSONResponse(
            {
                "pending": status.pending,
                "running": status.running,
                "last_decided": decided.isoformat() if decided else None,
                "failed": list(status.failed),
            }
        )


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the event is larger than {MOST_BYTES} bytes")
    return bytes(body)


def listen(port: int) -> socket.socket:
    """A socket that only this machine reaches. Raises Unavailable when the port is taken."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((HOST, port))
    except OSError as exc:
        server.close()
        raise Unavailable(f"port {port} is not free ({exc.strerror}); give another --port") from exc
    return server


def serve(service: Service, worker: Worker, server: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then end the worker."""
    # uvicorn ends first and then raises the signal again, for us to leave with code 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    config = uvicorn.Config(
        service.app(),
        loop="asyncio",
        http="h11",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    worker.start()
    try:
        uvicorn.Server(config).run(sockets=[server])
    finally:
        worker.stop()


def main() -> int:
    """Run the service of one project in the foreground."""
    args = _parser().parse_args()
    settings = Settings.load()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        _run(settings, args.project, args.source, listen(args.port))
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _run(settings: Settings, path: Path, source: str, server: socket.socket) -> None:
    project = projects.load(path)
    state = settings.state(project.name)
    engine = make_engine(state.url)
    inbox, key = Inbox(engine), signing.event_key(state.keys)
    runs = _runs(settings, project, engine, path, source)
    worker = Worker(project, engine, inbox, runs, _confirm(state, engine, project), _now)
    serve(Service(project.name, inbox, worker, key, _now), worker, server)


def _runs(settings: Settings, project: Project, engine: Engine, path: Path, source: str) -> Runs:
    from perennial.retrain.launchers import SPEC, LocalLauncher, RunRequest

    launcher = LocalLauncher(settings, settings.root / SPEC)

    def launch(as_of: datetime, trigger: str) -> Result:
        return launcher.run(RunRequest(project=path, source=source, as_of=as_of, trigger=trigger))

    return Runs(project.name, engine, launch, _now, cancel=launcher.stop)


def _confirm(state: StateFolder, engine: Engine, project: Project) -> Confirm:
    from perennial.retrain.confirm import FromSegments

    return FromSegments(state, engine, project)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial.retrain.service")
    parser.add_argument("--project", type=Path, required=True, help="folder with a project.yaml")
    parser.add_argument("--port", type=int, required=True, help="port on 127.0.0.1")
    parser.add_argument("--source", default="", help="file that runs read instead of the project's")
    return parser


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())
