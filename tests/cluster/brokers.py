"""A tenant's own Broker on the cluster, whose events go to a service in the test's process."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from neighbours import KEY
from sqlalchemy.engine import make_url
from starlette.types import ASGIApp
from stores import POSTGRES

from perennial import events
from perennial.records import Event
from perennial.retrain import job, service

IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
INGRESS = "http://broker-ingress.knative-eventing.svc.cluster.local"

# Nobody listens there: every event is tried again, and again.
NOBODY = "http://127.0.0.1:9/"
# The Broker answers when its subscribers did or were given up, so many are sent at a time.
# One that was ready just now may not know its own name for a moment yet.
SEND = """
import json, sys, time, httpx
from concurrent.futures import ThreadPoolExecutor
url, count, headers, body = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
def post(client):
    for _ in range(40):
        answer = client.post(url, headers=headers, content=body)
        if answer.status_code != 404:
            break
        time.sleep(0.5)
    return answer.raise_for_status()
with httpx.Client(timeout=60) as client, ThreadPoolExecutor(20) as pool:
    sent = [pool.submit(post, client) for _ in range(count)]
    print(len([one.result() for one in sent]))
"""
# It ends by itself, also when nobody ends it.
FLOOD = """
import json, sys, time, httpx
from concurrent.futures import ThreadPoolExecutor
url, seconds, headers, body = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
until = time.monotonic() + seconds
def post(client):
    sent = 0
    while time.monotonic() < until:
        client.post(url, headers=headers, content=body)
        sent += 1
    return sent
with httpx.Client(timeout=60) as client, ThreadPoolExecutor(10) as pool:
    print(sum(pool.map(post, [client] * 10)))
"""


@contextmanager
def listening(app: ASGIApp) -> Iterator[int]:
    """An application on a port of this machine where pods reach it, as they do PostgreSQL."""
    server = service.listen(host(), 0)
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [server]})
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join()


def host() -> str:
    """This machine, as pods know it."""
    return str(make_url(POSTGRES).host)


def made(kind: str, space: str, name: str, version: str, **body: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": space}
    return {"apiVersion": version, "kind": kind, "metadata": meta, **body}


def here(port: int) -> str:
    """A port of this machine, as pods know it."""
    return f"http://{host()}:{port}/"


def broker(kubectl: Any, space: str, uri: str) -> None:
    """A Broker of a tenant's own, whose events go to ``uri``."""
    to = {"uri": uri}
    delivery = {"retry": 3, "backoffPolicy": "exponential", "backoffDelay": "PT0.2S"}
    spec = {"broker": "default", "subscriber": to, "delivery": delivery}
    version = "eventing.knative.dev/v1"
    kubectl.apply(
        [
            made("Broker", space, "default", version),
            made("Trigger", space, "drift", version, spec=spec),
        ]
    )
    ready(kubectl, space, "broker/default", "trigger/drift")


def ready(kubectl: Any, space: str, *names: str) -> None:
    for one in names:
        kubectl.run("-n", space, "wait", "--for=condition=Ready", one, "--timeout=120s")


def send(kubectl: Any, space: str, event: Event, count: int) -> None:
    """Let a pod of the tenant send an event to its Broker, so many times."""
    _start(kubectl, space, SEND, event, count)


def flood(kubectl: Any, space: str, event: Event, seconds: int) -> None:
    """Let a pod of the tenant send an event to its Broker again and again, for so long."""
    _start(kubectl, space, FLOOD, event, seconds)


def _start(kubectl: Any, space: str, code: str, event: Event, how_many: int) -> None:
    headers, body = events.to_http(event, KEY)
    asked = [f"{INGRESS}/{space}/default", str(how_many), json.dumps(headers), body.decode()]
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["python", "-c", code, *asked],
        "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}},
        "securityContext": job.RESTRICTED,
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    }
    kubectl.apply([made("Pod", space, "sender", "v1", spec=spec)])


def ended(kubectl: Any, space: str) -> None:
    phase = "--for=jsonpath={.status.phase}=Succeeded"
    kubectl.run("-n", space, "wait", phase, "pod/sender", "--timeout=180s")
