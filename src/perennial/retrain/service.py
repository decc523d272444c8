"""Take events over HTTP, keep them, and let the project's worker make of them what is due."""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
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
from perennial.retrain import choice
from perennial.retrain.confirm import FromSegments
from perennial.retrain.inbox import Inbox
from perennial.retrain.launchers import RunRequest
from perennial.retrain.runs import Result, Runs
from perennial.retrain.worker import Status, Worker
from perennial.settings import Settings, StateFolder
from perennial.store import lease, migrate
from perennial.store.engine import kept_engine

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_BYTES = 64 << 10
FRESH = timedelta(minutes=5)
TURN_S = 15.0


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
        self,
        box: Box,
        workers: Mapping[str, Worker],
        key: bytes,
        clock: Callable[[], datetime],
        fresh: timedelta = FRESH,
    ) -> None:
        """``workers`` are named by their project; ``fresh`` is the greatest age of an event."""
        self._box = box
        self._workers = workers
        self._key = key
        self._clock = clock
        self._fresh = fresh

    def app(self) -> Starlette:
        """The ASGI application."""
        return Starlette(
            routes=[
                Route("/", self._receive, methods=["POST"]),
                Route("/schedule", self._schedule, methods=["POST"]),
                Route("/dead", self._undelivered, methods=["POST"]),
                Route("/healthz", self._health),
                Route("/status", self._status),
            ]
        )

    async def _receive(self, request: Request) -> Response:
        return await _answered(self._keep, request)

    async def _schedule(self, request: Request) -> Response:
        return await _answered(self._keep_schedule, request)

    async def _undelivered(self, request: Request) -> Response:
        return await _answered(self._record_undelivered, request)

    async def _keep(self, request: Request) -> None:
        event = self._checked(request, await _body(request))
        if abs(self._clock() - event.time) > self._fresh:
            most = f"{self._fresh.total_seconds() / 60:.0f} minutes"
            raise Refused(401, f"time is over {most} from now; stamp and sign the event anew")
        await self._put(event)

    async def _keep_schedule(self, request: Request) -> None:
        """A timer's event says nothing but that it is time, so nobody need sign it."""
        await _body(request)
        for project in self._workers:
            # Named by the minute: a flood of them is one.
            await self._put(events.schedule_event(project, self._clock().replace(second=0)))

    async def _record_undelivered(self, request: Request) -> None:
        event = self._checked(request, await _body(request))
        log.error("an event was not delivered in time: %s", event.id)
        await run_in_threadpool(self._workers[event.subject].undelivered, event)

    async def _put(self, event: Event) -> None:
        await run_in_threadpool(self._box.put, event)
        self._workers[event.subject].wake()

    def _checked(self, request: Request, body: bytes) -> Event:
        if events.mode_of(request.headers) is None:
            wanted = f"{events.STRUCTURED}, or application/json with ce- headers"
            raise Refused(415, f"the content type is not {wanted}")
        event, signature = events.from_http(request.headers, body)
        self._check_meaning(event)
        if not signing.verify(self._key, events.message(event), signature):
            raise Refused(401, "the signature is missing or wrong; sign with this project's key")
        return event

    def _check_meaning(self, event: Event) -> None:
        if event.type != events.DRIFT:
            raise BadInput(f"the type is {event.type}, wanted {events.DRIFT}")
        if event.subject not in self._workers:
            raise BadInput(f"the subject is {event.subject}, wanted {' or '.join(self._workers)}")
        events.hint(event)

    async def _health(self, _request: Request) -> Response:
        alive = all(worker.alive for worker in self._workers.values())
        return Response(status_code=200 if alive else 503)

    async def _status(self, _request: Request) -> Response:
        told = {}
        for name, worker in self._workers.items():
            told[name] = _plain(await run_in_threadpool(worker.status))
        return JSONResponse(told)


async def _answered(handle: Callable[[Request], Awaitable[None]], request: Request) -> Response:
    """202 without a body, which could be taken for a reply event; or an error in one sentence."""
    try:
        await handle(request)
    except BadInput as exc:
        return JSONResponse({"error": str(exc)}, 400)
    except Refused as exc:
        return JSONResponse({"error": str(exc)}, exc.status)
    except Unavailable as exc:
        log.warning("event not kept: %s", exc.__cause__ or exc)
        return JSONResponse({"error": str(exc)}, 503, {"Retry-After": "1"})
    return Response(status_code=202)


def _plain(status: Status) -> dict[str, object]:
    decided = status.last_decided
    return {
        "pending": status.pending,
        "running": status.running,
        "last_decided": decided.isoformat() if decided else None,
        "failed": list(status.failed),
    }


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MOST_BYTES:
            raise Refused(413, f"the event is larger than {MOST_BYTES} bytes")
    return bytes(body)


def listen(host: str, port: int) -> socket.socket:
    """A socket for events. Raises Unavailable when the port is taken."""
    server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((host, port))
    except OSError as exc:
        server.close()
        raise Unavailable(f"port {port} is not free ({exc.strerror}); give another --port") from exc
    return server


def serve(service: Service, workers: Iterable[Worker], server: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT, then end the workers."""
    # uvicorn ends first and then raises the signal again, for us to leave with code 0.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit())
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
    with ExitStack() as running:
        for worker in workers:
            worker.start()
            running.callback(worker.stop)
        uvicorn.Server(config).run(sockets=[server])


def main() -> int:
    """Run the service of one project, or of all in a folder, in the foreground."""
    args = _parser().parse_args()
    settings = Settings.load()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(message)s")
    for chatty in ("uvicorn", "httpx", "httpx2"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        _check_host(settings, args.host)
        _run(settings, args.project, args.source, listen(args.host, args.port))
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    return 0


def _check_host(settings: Settings, host: str) -> None:
    if host != HOST and settings.event_key is None:
        raise BadInput(
            f"--host is {host}, which others reach: set PERENNIAL_EVENT_KEY to the file with the"
            " key that the senders of events sign with"
        )


def _run(settings: Settings, path: Path, source: str, server: socket.socket) -> None:
    if settings.state_url:
        # The first process of a container ends on no signal by itself.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        migrate.await_tables(settings.state_url)
    places = {projects.load(place).name: place for place in _places(path)}
    # Several projects share one database, as a cluster's do, and one engine; one has its own.
    workers = {name: _worker(settings, place, source) for name, place in places.items()}
    name, place = next(iter(places.items()))
    state = settings.state(name)
    box, key = Inbox(kept_engine(state.url)), _key(settings, state)
    fresh = timedelta(seconds=settings.event_fresh_s)
    serve(Service(box, workers, key, _now, fresh), workers.values(), server)


def _places(path: Path) -> list[Path]:
    """The project at ``path``, or all YAML files in a folder that is none itself."""
    if not path.is_dir() or (path / "project.yaml").is_file():
        return [path]
    found = sorted(path.glob("*.yaml"))
    if not found:
        raise BadInput(f"no project in {path}; wanted a project.yaml or files such as retail.yaml")
    return found


def _worker(settings: Settings, place: Path, source: str) -> Worker:
    project = projects.load(place)
    state = settings.state(project.name)
    engine = kept_engine(state.url)
    confirm = FromSegments(state, engine, project)
    box = Inbox(engine, project.name)
    if not settings.state_url:
        runs = _runs(settings, project, engine, place, source)
        return Worker(project, engine, box, runs, confirm, _now)
    # Several copies of this service share a database on a cluster; here there is one.
    turn = _turn(project.name, engine)
    runs = _runs(settings, project, engine, place, source, turn.keep)
    return Worker(project, engine, box, runs, confirm, _now, turn.leads, turn.guard)


def _turn(project: str, engine: Engine) -> lease.Leader:
    holder = f"{socket.gethostname()}-{os.getpid()}"
    name = f"retraining:{project}"
    return lease.Leader(engine, name, holder, TURN_S, lambda: _now().timestamp())


def _key(settings: Settings, state: StateFolder) -> bytes:
    given = settings.event_key
    return signing.read_key(given) if given else signing.event_key(state.keys)


def _runs(
    settings: Settings,
    project: Project,
    engine: Engine,
    path: Path,
    source: str,
    beat: Callable[[], object] = lambda: None,
) -> Runs:
    launcher = choice.launcher(settings)

    def launch(as_of: datetime, trigger: str) -> Result:
        request = RunRequest(project=path, source=source, as_of=as_of, trigger=trigger, key=trigger)
        return launcher.run(request)

    return Runs(
        project.name,
        engine,
        launch,
        _now,
        cancel=launcher.stop,
        outlives=launcher.outlives,
        beat=beat,
        is_over=launcher.is_over,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perennial.retrain.service")
    parser.add_argument(
        "--project",
        type=Path,
        required=True,
        help="folder with a project.yaml, or with one YAML file for each of several projects",
    )
    parser.add_argument("--host", default=HOST, help="address to listen on")
    parser.add_argument("--port", type=int, required=True, help="port to listen on")
    parser.add_argument("--source", default="", help="file that runs read instead of the project's")
    return parser


def _now() -> datetime:
    return datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main())
