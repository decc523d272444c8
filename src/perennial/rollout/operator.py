"""Run the operator of one namespace: its loop, watch and health, and the edge's configuration."""

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sqlalchemy.exc import DBAPIError

from perennial import kube
from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.rollout import edge, places, xds
from perennial.rollout.board import Board
from perennial.rollout.champion import Champion
from perennial.rollout.reconcile import Reconciler
from perennial.rollout.watch import Census, Watcher
from perennial.settings import Settings
from perennial.store import migrate
from perennial.store.engine import make_engine
from perennial.store.lease import Leader

log = logging.getLogger(__name__)

XDS_PORT, HEALTH_PORT = 8081, 8082
LEASE, LEASE_S = "operator", 15.0
TURN_S = 0.5
IDLE_S = 2.0
PATIENCE_S = 60.0


class SystemClock:
    """The machine's clocks."""

    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


class Health:
    """Does all of it work still? Asked by the kubelet, which ends a process that hangs."""

    def __init__(self) -> None:
        self._turned = time.monotonic()
        self._parts: list[Callable[[], bool]] = []

    def turned(self) -> None:
        self._turned = time.monotonic()

    def depends_on(self, is_alive: Callable[[], bool]) -> None:
        """A part that runs beside the loop, and cannot be mended without a new process."""
        self._parts.append(is_alive)

    @property
    def is_good(self) -> bool:
        late = time.monotonic() - self._turned > PATIENCE_S
        return not late and all(is_alive() for is_alive in self._parts)

    @contextmanager
    def told(self, host: str, port: int) -> Iterator[None]:
        """Answer ``GET /healthz`` for as long as it is entered."""
        health = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if health.is_good else 503)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Probes are no news."""

        with _listening(host, port, Handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield
            server.shutdown()


def _listening(host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    try:
        return ThreadingHTTPServer((host, port), handler)
    except OSError as exc:
        raise Unavailable(f"{host}:{port} cannot be listened on; give another port") from exc


def main(argv: Sequence[str] | None = None) -> int:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="perennial.rollout.operator")
    parser.add_argument("--host", default=edge.LOOPBACK, help="Where xDS and health are answered.")
    parser.add_argument("--xds-port", type=int, default=XDS_PORT)
    parser.add_argument("--health-port", type=int, default=HEALTH_PORT)
    parser.add_argument(
        "--no-registry", action="store_true", help="Do not tell MLflow which version serves."
    )
    given = parser.parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = Settings.load()
        logging.getLogger("perennial").setLevel(settings.log_level)
        return _run(settings, given)
    except PerennialError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code


def _told_to_stop() -> threading.Event:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


def _run(settings: Settings, given: argparse.Namespace) -> int:
    if not settings.state_url:
        raise BadInput("PERENNIAL_STATE_URL is missing: the operator needs the store of the loop")
    stop, health, clock = _told_to_stop(), Health(), SystemClock()
    with ExitStack() as opened:
        client = opened.enter_context(kube.connect(settings.namespace))
        migrate.await_tables(settings.state_url, pause=lambda s: stop.wait(s) and sys.exit())
        # Not before: who has no tables is not ready.
        health.turned()
        opened.enter_context(health.told(given.host, given.health_port))
        engine = make_engine(settings.state_url)
        opened.callback(engine.dispose)
        if settings.deployment_mode == places.STANDARD:
            server = opened.enter_context(xds.Server(engine, given.host, given.xds_port))
            health.depends_on(server.is_alive)
        census = Census(partial(kube.names, client, kube.InferenceService), clock.monotonic)
        watcher = Watcher(str(client.namespace), census)
        watcher.start()
        opened.callback(watcher.stop)
        leader = Leader(engine, LEASE, _holder(), LEASE_S, time.time)
        opened.callback(leader.resign)
        champion = Champion(engine, leader, clock)
        opened.callback(champion.stop)
        reconciler = Reconciler(
            engine,
            Board(client, clock.now, clock.monotonic),
            leader,
            watcher,
            partial(places.of, settings, client, engine, guard=leader.guard),
            clock,
            champion.promoted,
            partial(_bundle_uri, settings),
            health.turned,
            settings.keep_rollouts,
        )
        opened.callback(reconciler.close)
        log.info("operator of namespace %s, mode %s", client.namespace, settings.deployment_mode)
        told = None if given.no_registry else champion
        _loop(reconciler, watcher, health, told, stop)
    return 0


def _holder() -> str:
    """What this process is called in the lease."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _loop(
    reconciler: Reconciler,
    watcher: Watcher,
    health: Health,
    champion: Champion | None,
    stop: threading.Event,
) -> None:
    """Turn until told to stop. Raises LoopBroken when nothing is watched any more."""
    told = _Said()
    while not stop.is_set():
        leads = _turn(reconciler, champion, told)
        watcher.check()
        health.turned()
        stop.wait(TURN_S if leads else IDLE_S)


class _Said:
    """The last trouble, so that a log tells it once."""

    text = ""


def _turn(reconciler: Reconciler, champion: Champion | None, told: _Said) -> bool:
    """One turn; what does not answer now is asked again at the next."""
    try:
        leads = reconciler.turn()
        if champion:
            champion.turn()
        told.text = ""
        return leads
    except (Unavailable, DBAPIError) as exc:
        if str(exc) != told.text:
            log.warning("waits: %s", exc)
        told.text = str(exc)
        return False


def _bundle_uri(settings: Settings, project: str, digest: str) -> str:
    """Where the registry keeps a bundle."""
    return f"{settings.state(project).artifacts('bundles')}/{digest.removeprefix('sha256:')}"


if __name__ == "__main__":
    sys.exit(main())
