"""What Standard mode makes of answers that a real cluster gives rarely."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from adapters import rollout
from lightkube.models.core_v1 import (
    ContainerState,
    ContainerStateTerminated,
    ContainerStateWaiting,
    ContainerStatus,
    PodCondition,
    PodStatus,
    ServicePort,
    ServiceSpec,
)
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Pod, Service

from perennial import kube
from perennial.errors import Unavailable
from perennial.rollout import edge, pods, standard

READY = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
PORTS = [
    ServicePort(80, name="http", targetPort=8080),
    ServicePort(8081, name="grpc", targetPort=8081),
]


class FakeClient:
    """A few objects by name, and pods."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.pods: list[Pod] = []
        self.refused = ""

    def list(self, _kind: type, **_: Any) -> list[Pod]:
        return self.pods

    def create(self, _found: Any) -> None:
        raise kube.Conflict(self.refused)


class FakeTraffic:
    def __init__(self) -> None:
        self.known: dict[str, edge.Ports] = {}

    def add(self, name: str, ports: edge.Ports) -> None:
        self.known[name] = ports


def document(**meta: Any) -> dict[str, Any]:
    predictor = {"labels": {"perennial.dev/revision": "v7"}, "containers": []}
    return {"metadata": {"name": "retail", **meta}, "spec": {"predictor": predictor}}


@pytest.fixture
def client() -> FakeClient:
    return FakeClient()


@pytest.fixture
def revisions(client: FakeClient) -> Iterator[standard.StandardRevisions]:
    made = standard.StandardRevisions(
        client, "retail", lambda _: document(), FakeTraffic(), lambda: None
    )
    made._answers = lambda ports: True
    yield made
    made.close()


def lives(client: FakeClient, **changes: Any) -> None:
    client.objects["retail-v7"] = kube.InferenceService(**(document() | READY | changes))


def has_service(client: FakeClient, ip: str, ports: list[ServicePort]) -> None:
    meta = ObjectMeta(name="retail-v7-predictor", namespace="perennial")
    spec = ServiceSpec(clusterIP=ip, ports=ports)
    client.objects["retail-v7-predictor"] = Service(metadata=meta, spec=spec)


@pytest.fixture
def live(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """A cluster with v7."""
    monkeypatch.setattr(kube, "find", lambda _client, _kind, name: client.objects.get(name))
    lives(client)
    return client


def test_a_service_with_an_address_is_asked_there(live, revisions):
    has_service(live, "10.96.1.2", PORTS)

    assert revisions.ready("v7")
    assert revisions._traffic.known == {"v7": edge.Ports(80, 8081, "10.96.1.2")}


def test_a_service_without_an_address_is_asked_by_name_at_the_ports_of_its_pods(live, revisions):
    has_service(live, "None", PORTS)

    assert revisions.ready("v7")
    host = "retail-v7-predictor.perennial.svc"
    assert revisions._traffic.known == {"v7": edge.Ports(8080, 8081, host)}


@pytest.mark.parametrize(
    ("ports", "why"),
    [(None, "has not made Service retail-v7-predictor"), ([], "has no port 80")],
    ids=["no service", "no port"],
)
def test_a_ready_revision_without_a_door_is_waited_for(live, revisions, ports, why):
    if ports is not None:
        has_service(live, "10.96.1.2", ports)

    with pytest.raises(Unavailable, match=why):
        revisions.ready("v7")
    assert revisions._traffic.known == {}


def test_a_door_that_nobody_answers_is_waited_for_and_unknown_to_the_edge(live, revisions):
    has_service(live, "10.96.1.2", PORTS)
    revisions._answers = lambda ports: False

    with pytest.raises(Unavailable, match="does not answer at 10.96.1.2 yet"):
        revisions.ready("v7")
    assert revisions._traffic.known == {}


class Stranger(BaseHTTPRequestHandler):
    """Takes the first connection to an address, as a gateway may before a Service has it."""

    protocol_version = "HTTP/1.1"
    connections = 0

    def setup(self) -> None:
        super().setup()
        type(self).connections += 1
        self.status = 502 if type(self).connections == 1 else 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def test_each_question_at_a_door_is_a_new_connection(live, revisions):
    with ThreadingHTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_address[1]

        ports = edge.Ports(port, port, "127.0.0.1")
        answers = [standard.StandardRevisions._answers(revisions, ports) for _ in range(2)]

        server.shutdown()
    assert answers == [False, True]


def test_what_is_being_deleted_is_no_revision_any_more(live, revisions):
    lives(live, metadata={"name": "retail-v7", "deletionTimestamp": "2026-01-01T00:00:00Z"})

    assert not revisions.ready("v7")
    assert revisions.died("v7") == "InferenceService retail-v7 was deleted"


def pod(name: str, restarts: int = 0, **status: Any) -> Pod:
    server = ContainerStatus(
        image="", imageID="", name="kserve-container", ready=True, restartCount=restarts, **status
    )
    conditions = [PodCondition(status="True", type="Ready")]
    told = PodStatus(podIP="10.244.0.9", containerStatuses=[server], conditions=conditions)
    return Pod(metadata=ObjectMeta(name=name), status=told)


def test_an_edge_that_began_anew_counts_as_another_one(client):
    edges = standard.EdgePods(client, "retail")
    client.pods = [pod("edge-a")]
    first = edges()
    client.pods = [pod("edge-a", restarts=1)]

    assert first == {"edge-a/0": "http://10.244.0.9:8082"}
    assert edges() == {"edge-a/1": "http://10.244.0.9:8082"}


def test_an_edge_that_is_not_ready_is_not_asked(client):
    waits = pod("edge-a")
    waits.status.conditions = [PodCondition(status="False", type="Ready")]
    client.pods = [waits]

    assert standard.EdgePods(client, "retail")() == {}


def test_how_a_server_ended_is_told_by_its_last_line():
    ended = ContainerStateTerminated(137, reason="OOMKilled", message="loading\nout of memory\n")
    one = pod("a", state=ContainerState(terminated=ended))
    going = pod("a", state=ContainerState(terminated=ended))
    going.metadata.deletionTimestamp = "2026-01-01T00:00:00Z"

    told = "kserve-container ended with 137 (OOMKilled): out of memory"
    assert [pods.end(p, s) for p in (one, going) for s in pods.servers(p)] == [told, ""]


@pytest.mark.parametrize(
    ("name", "counts"),
    [("feature-server", True), ("transformer-container", True), ("queue-proxy", False)],
)
def test_of_the_containers_of_a_pod_ours_can_end_a_revision(name: str, counts: bool):
    one = pod("a", state=ContainerState(terminated=ContainerStateTerminated(2, message="no")))
    one.status.containerStatuses[0].name = name

    assert bool(pods.servers(one)) == counts


def test_what_a_server_waits_for_is_told_unless_it_only_comes_up():
    def wait(reason: str) -> str:
        waiting = ContainerStateWaiting(message="no such image", reason=reason)
        one = pod("a", state=ContainerState(waiting=waiting))
        return pods.wait(pods.statuses(one)[0])

    assert wait("ErrImagePull") == "kserve-container ErrImagePull: no such image"
    assert wait("ContainerCreating") == ""


def test_starting_what_is_going_away_waits_until_it_is_gone(live, revisions):
    live.refused = "retail-v7 is being deleted"
    lives(live, metadata={"name": "retail-v7", "deletionTimestamp": "2026-01-01T00:00:00Z"})

    with pytest.raises(Unavailable, match="being deleted"):
        revisions.start(rollout(7))


def test_starting_what_was_started_before_changes_nothing(live, revisions):
    live.refused = "retail-v7 exists already"

    revisions.start(rollout(7))
