"""A tenant's load on the shared Broker and PostgreSQL does not stop its neighbour's loop."""

import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import retraining as loop
import uvicorn
from neighbours import KEY, Loop, neighbour, served
from sqlalchemy.engine import make_url
from stores import POSTGRES

from perennial import events
from perennial.records import Event
from perennial.retrain import job, service

pytestmark = pytest.mark.cluster

IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
INGRESS = "http://broker-ingress.knative-eventing.svc.cluster.local"
EVENTS = 300
DISCARD = 9  # where nobody listens: every event is tried again, and again

# The Broker answers when its subscribers did or were given up, so many are sent at a time.
SEND = """
import json, sys, httpx
from concurrent.futures import ThreadPoolExecutor
url, count, headers, body = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
with httpx.Client(timeout=60) as client, ThreadPoolExecutor(20) as pool:
    sent = [pool.submit(client.post, url, headers=headers, content=body) for _ in range(count)]
    print(len([one.result().raise_for_status() for one in sent]))
"""


@contextmanager
def listening(ours: Loop) -> Iterator[int]:
    """The loop's service on a port of this machine where pods reach it, as they do PostgreSQL."""
    server = service.listen(str(make_url(POSTGRES).host), 0)
    config = uvicorn.Config(ours.app, lifespan="off", log_config=None)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [server]})
    thread.start()
    try:
        yield int(server.getsockname()[1])
    finally:
        running.should_exit = True
        thread.join()


def made(kind: str, space: str, name: str, version: str, **body: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": space}
    return {"apiVersion": version, "kind": kind, "metadata": meta, **body}


def broker(kubectl: Any, space: str, port: int) -> None:
    """A Broker of a tenant's own, whose events go to a port of this machine."""
    to = {"uri": f"http://{make_url(POSTGRES).host}:{port}/"}
    delivery = {"retry": 3, "backoffPolicy": "exponential", "backoffDelay": "PT0.2S"}
    spec = {"broker": "default", "subscriber": to, "delivery": delivery}
    version = "eventing.knative.dev/v1"
    kubectl.apply(
        [
            made("Broker", space, "default", version),
            made("Trigger", space, "drift", version, spec=spec),
        ]
    )
    for one in ("broker/default", "trigger/drift"):
        kubectl.run("-n", space, "wait", "--for=condition=Ready", one, "--timeout=120s")


def send(kubectl: Any, space: str, event: Event, count: int) -> None:
    """Let a pod of the tenant send an event to its Broker, so many times."""
    headers, body = events.to_http(event, KEY)
    asked = [f"{INGRESS}/{space}/default", str(count), json.dumps(headers), body.decode()]
    container = {
        "name": "main",
        "image": IMAGE,
        "command": ["python", "-c", SEND, *asked],
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


def test_an_event_is_decided_while_a_neighbour_floods_its_broker_and_holds_its_database(
    kubectl, spaces, postgres
):
    first, second = spaces("first"), spaces("second")
    with (
        served(postgres.migrated("first")) as ours,
        listening(ours) as port,
        neighbour(postgres.migrated("second")) as theirs,
    ):
        broker(kubectl, first, port)
        broker(kubectl, second, DISCARD)
        send(kubectl, second, loop.event(7), EVENTS)
        theirs.take_all()
        theirs.lock()

        event = loop.event(1)
        send(kubectl, first, event, 1)
        ended(kubectl, first)

        assert ours.decided(event)
        assert [e.subject for e in ours.ledger.entries("churn", "event.received")] == [event.id]
        ended(kubectl, second)
