"""The Broker, Triggers and PingSource that we ship, on a real Knative: what they do with events."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import retraining as loop
import yaml
from brokers import ended, host, listening, ready, send
from neighbours import Loop, served
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perennial import events
from perennial.ledger import Entry

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "kustomize" / "base" / "events.yaml"
SCHEDULE = ROOT / "kustomize" / "components" / "schedule" / "ping.yaml"
# As often as it may be, and as the shipped ones beside that.
QUICK = {"retry": 3, "backoffDelay": "PT0.2S"}
EVERY_MINUTE = "* * * * *"
PATIENCE_S = 120.0
# A source may have missed this minute by a second, and its sender's pod may have to start.
MINUTES_S = 240.0


class Door:
    """The way to a service, which may be shut; keeps who came, and what each was answered."""

    def __init__(self, app: ASGIApp, shut: float = 0) -> None:
        """``shut`` is how many events are answered 503 before the first is let in."""
        self.answers: list[tuple[str, int]] = []
        self._app = app
        self._shut = shut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answers.append((scope["path"], message["status"]))
            await send(message)

        await self._behind(scope["path"])(scope, receive, told)

    def _behind(self, path: str) -> ASGIApp:
        if path != "/" or self._shut <= 0:
            return self._app
        self._shut -= 1
        return Response(status_code=503)


def shipped(path: Path, space: str, port: int) -> list[dict[str, Any]]:
    """What a file of ours holds, with a port of this machine where the service would be."""
    found = list(yaml.safe_load_all(path.read_text()))
    for document in found:
        document["metadata"]["namespace"] = space
        spec = document.get("spec", {})
        if document["kind"] == "Trigger":
            spec["subscriber"] = at(spec["subscriber"], port)
            spec["delivery"] |= QUICK
        if "deadLetterSink" in spec.get("delivery", {}):
            spec["delivery"]["deadLetterSink"] = at(spec["delivery"]["deadLetterSink"], port)
        if document["kind"] == "PingSource":
            spec["schedule"] = EVERY_MINUTE
    return found


def at(sink: dict[str, Any], port: int) -> dict[str, str]:
    return {"uri": f"http://{host()}:{port}{sink.get('uri', '/')}"}


def applied(kubectl: Any, space: str, documents: list[dict[str, Any]]) -> None:
    kubectl.apply(documents)
    named = [f"{d['kind']}/{d['metadata']['name']}" for d in documents if d["kind"] != "EventType"]
    ready(kubectl, space, *named)


def eventually(is_so: Callable[[], object], patience_s: float = PATIENCE_S) -> bool:
    limit = time.monotonic() + patience_s
    while not is_so():
        if time.monotonic() > limit:
            return False
        time.sleep(0.5)
    return True


def told(ours: Loop, kind: str) -> list[str]:
    """The events that the ledger has entries of this kind about."""
    return [entry.subject for entry in ours.ledger.entries("churn", kind)]


def test_an_event_that_is_sent_twice_is_decided_once(kubectl, space, postgres):
    with served(postgres.migrated("twice")) as ours:
        door = Door(ours.app)
        with listening(door) as port:
            applied(kubectl, space, shipped(BASE, space, port))
            event = loop.event(1)
            send(kubectl, space, event, 2)
            ended(kubectl, space)

            # Two at the same moment: one of them may have been asked to come again.
            assert eventually(lambda: door.answers.count(("/", 202)) == 2), door.answers
            assert ours.decided(event)
            assert eventually(lambda: ours.inbox.counts()["pending"] == 0)

        assert told(ours, "event.received") == [event.id]
        assert told(ours, "decision") == [event.id]


def test_an_event_that_a_service_could_not_take_comes_again_and_is_decided_once(
    kubectl, space, postgres
):
    with served(postgres.migrated("again")) as ours:
        door = Door(ours.app, shut=2)
        with listening(door) as port:
            applied(kubectl, space, shipped(BASE, space, port))
            event = loop.event(2)
            send(kubectl, space, event, 1)

            assert eventually(lambda: ("/", 202) in door.answers), door.answers
            assert ours.decided(event)
            ended(kubectl, space)

        assert door.answers == [("/", 503), ("/", 503), ("/", 202)]
        assert told(ours, "event.received") == [event.id]
        assert told(ours, "decision") == [event.id]


def test_an_event_that_is_never_taken_is_told_to_the_service_as_a_dead_letter(
    kubectl, space, postgres
):
    with served(postgres.migrated("dead")) as ours:
        door = Door(ours.app, shut=math.inf)
        with listening(door) as port:
            applied(kubectl, space, shipped(BASE, space, port))
            event = loop.event(3)
            send(kubectl, space, event, 1)

            assert eventually(lambda: told(ours, "event.undelivered")), door.answers
            ended(kubectl, space)

        assert door.answers.count(("/", 503)) > 1, "it was not even tried again"
        assert ("/dead", 202) in door.answers
        assert told(ours, "event.undelivered") == [event.id]
        assert told(ours, "decision") == []


def test_a_timer_reaches_the_policy_through_the_broker_and_nothing_else(kubectl, space, postgres):
    with served(postgres.migrated("timer")) as ours:
        door = Door(ours.app)
        with listening(door) as port:
            documents = [*shipped(BASE, space, port), *shipped(SCHEDULE, space, port)]
            applied(kubectl, space, documents)

            assert eventually(lambda: decided_by_timer(ours), MINUTES_S), door.answers
            kubectl.run("-n", space, "delete", "pingsource/schedule")

        # The Trigger for drift is there too, and takes no tick.
        assert set(door.answers) == {("/schedule", 202)}
        first = decided_by_timer(ours)[0]
        assert first.body["action"] == "retrain"
        assert told(ours, "event.received") == []


def decided_by_timer(ours: Loop) -> list[Entry]:
    source = events.schedule_event("churn", loop.START).source
    return [e for e in ours.ledger.entries("churn", "decision") if e.body["source"] == source]
