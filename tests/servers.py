"""Real servers for tests: the predictor and the transformer as child processes."""

import http.client
import json
import os
import socket
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perennial.settings import Settings

JSON = {"content-type": "application/json"}


def runtime_python() -> Path:
    """Python of the runtime environment; without it a test is skipped."""
    python = Settings().runtime_python
    if not python.exists():
        pytest.skip(f"no runtime environment at {python}; run 'make env'")
    return python


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """One of our servers on free ports; ``stop`` ends it by its process."""

    def __init__(self, module: str, log: Path, python: Path, **options: object) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.log = log
        options = {"model_name": "tiny", **options}
        command = [str(python), "-m", f"perennial.serving.{module}"]
        command += [f"--http_port={self.port}", f"--grpc_port={self.grpc_port}"]
        command += [f"--{name}={value}" for name, value in options.items()]
        # As KServe's controller injects them.
        command += ["--workers=1", "--predictor_request_timeout_seconds=10"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with log.open("wb") as file:
            self.child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def wait_ready(self, seconds: float = 60.0) -> "Server":
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.child.poll() is None:
            try:
                if self.ask("GET", "/v2/health/ready")[0] == 200:
                    return self
            except OSError:
                time.sleep(0.05)
        self.stop()
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, told, answer.read()
        finally:
            connection.close()

    def infer(self, document: object, **headers: str) -> tuple[int, dict[str, Any]]:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        named = {"content_type": "application/json", **headers}
        status, _, answer = self.ask("POST", "/v2/models/tiny/infer", body, **named)
        return status, json.loads(answer)

    def metric(self, name: str) -> float:
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    def stop(self) -> int:
        self.child.terminate()
        try:
            return self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            return self.child.wait()


class Sink:
    """Takes events like the retraining service, when it is up."""

    def __init__(self, port: int = 0) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                outer.got.append((dict(self.headers.items()), self.rfile.read(size)))
                self.send_response(outer.answer())
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self) -> int:
        """The status that a request is answered with."""
        return 202

    def wait(self, count: int, seconds: float = 10.0) -> list[tuple[dict[str, str], bytes]]:
        until = time.monotonic() + seconds
        while len(self.got) < count and time.monotonic() < until:
            time.sleep(0.05)
        return self.got

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
