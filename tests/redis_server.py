"""A Redis of the test's own on the loopback, ended by its process id."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest
import redis

NO_REDIS = "no redis-server on the path"


@contextlib.contextmanager
def running(password: str = "") -> Iterator[str]:
    """URL of a server without persistence, for as long as the block."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip(NO_REDIS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly"]
    command += ["no", *(["--requirepass", password] if password else [])]
    with tempfile.TemporaryDirectory() as folder:
        child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        try:
            _await(port, password)
            secret = f":{quote(password, safe='')}@" if password else ""
            yield f"redis://{secret}127.0.0.1:{port}/0"
        finally:
            child.terminate()
            child.wait(10)


def _await(port: int, password: str) -> None:
    limit = time.monotonic() + 20
    with redis.Redis(port=port, password=password or None) as client:
        while time.monotonic() < limit:
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                return
            time.sleep(0.05)
    raise TimeoutError(f"redis-server did not answer on port {port}")
