"""What does a pod of the edge run: Envoy, which the operator tells the rest, and a drained end."""

import argparse
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from perennial.errors import BadInput, PerennialError, Unavailable
from perennial.rollout import edge
from perennial.store import files

DRAIN_S = 5


def main(words: list[str]) -> int:
    """Become Envoy, or let a running one send its clients elsewhere before it is ended."""
    parser = argparse.ArgumentParser(prog="perennial.rollout.edgepod", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--project", help="whose requests it splits")
    what.add_argument("--drain", action="store_true", help="before the pod ends")
    parser.add_argument("--operator", default="operator:8081", help="host:port that tells weights")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="takes one small file")
    args = parser.parse_args(words)
    try:
        if args.drain:
            return drain(edge.ADMIN_PORT)
        command = envoy(args.project, args.operator, args.folder)
    except PerennialError as exc:
        print(exc, file=sys.stderr)
        return exc.exit_code
    return os.execv(command[0], command)


def envoy(project: str, operator: str, folder: Path) -> list[str]:
    """Write what Envoy starts with, and say how it is started. Raises BadInput."""
    server = urlsplit(f"//{operator}")
    if not server.hostname or not server.port:
        raise BadInput(f"--operator is {operator!r}, wanted host:port")
    program = shutil.which("envoy")
    if program is None:
        raise BadInput("no envoy on PATH; the image of the core environment has it")
    pod = edge.Pod(project, socket.gethostname(), (server.hostname, server.port))
    file = folder / edge.BOOTSTRAP
    files.write_atomic(file, json.dumps(edge.pod_bootstrap(pod), indent=1))
    how = ["--concurrency", "2", "--disable-hot-restart", "--log-level", "warning"]
    drained = ["--drain-time-s", str(DRAIN_S), "--drain-strategy", "immediate"]
    return [program, "-c", str(file), *how, *drained]


def drain(admin_port: int) -> int:
    """Ask clients to connect anew, elsewhere, and give those who are answered the time."""
    url = f"http://{edge.LOOPBACK}:{admin_port}/drain_listeners?graceful&skip_exit"
    try:
        httpx.post(url, timeout=DRAIN_S, trust_env=False)
    except httpx.HTTPError as exc:
        raise Unavailable(f"Envoy does not answer ({type(exc).__name__})") from exc
    time.sleep(DRAIN_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
