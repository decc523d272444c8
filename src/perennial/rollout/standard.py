"""KServe's Standard mode as the place where revisions run, behind our own edge.

Each revision is an InferenceService of its own, because in this mode KServe splits no traffic; the
edge's Envoys take the weights, so a revision's pods never change while its share does.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from copy import deepcopy
from typing import Any

import httpx
from lightkube import Client
from lightkube.models.core_v1 import ServicePort
from lightkube.resources.core_v1 import Service

from perennial import kube
from perennial.errors import Unavailable
from perennial.records import RolloutState
from perennial.rollout import conditions, edge, manifest, plan, pods
from perennial.rollout.envoy import EnvoyTraffic
from perennial.rollout.manifest import Document

log = logging.getLogger(__name__)

COMPONENT, EDGE = "app.kubernetes.io/component", "edge"
PROBE_S = 5.0
# What a transformer listens on: KServe makes a Service of the ports that are named.
REST, GRPC = pods.PORT, 8081
_FIRST_PORT = 80


def service_name(project: str, revision: str) -> str:
    """The InferenceService of one revision."""
    return f"{project}-{revision}"


def with_ports(document: Document) -> Document:
    """The same with a door for gRPC; Knative allows one port only, this mode does not."""
    made = deepcopy(document)
    for container in made["spec"]["predictor"]["containers"]:
        if container["name"] == manifest.TRANSFORMER:
            container["ports"] = [
                {"name": "http", "containerPort": REST, "protocol": "TCP"},
                {"name": "grpc", "containerPort": GRPC, "protocol": "TCP"},
            ]
    return made


class EdgePods:
    """Where the Envoys of a project's edge show their statistics; a pod that is not ready has none.

    One that is told to go still answers its last clients, so it is asked as long as it is ready.
    """

    def __init__(self, client: Client, project: str) -> None:
        self._client = client
        self._project = project

    def __call__(self) -> Mapping[str, str]:
        labels = {COMPONENT: EDGE, manifest.PROJECT: self._project}
        found = pods.listed(self._client, f"the edge of {self._project}", labels)
        return {
            pods.key(pod): f"http://{pod.status.podIP}:{edge.STATS_PORT}"
            for pod in found
            if pods.is_ready(pod) and pod.status and pod.status.podIP
        }


class StandardRevisions:
    """Starts, watches and ends the InferenceServices of one project."""

    def __init__(
        self,
        client: Client,
        project: str,
        manifest_of: Callable[[RolloutState], Document],
        traffic: EnvoyTraffic,
        serving: Callable[[], RolloutState | None],
        pinned: Callable[[int], Document | None] = lambda _: None,
    ) -> None:
        self._client = client
        self._project = project
        self._manifest_of = manifest_of
        self._traffic = traffic
        self._serving = serving
        self._pinned = pinned
        self._labels: dict[str, Any] = {manifest.PROJECT: project}
        # A connection made before the network knew the Service stays with whoever took it.
        anew = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.Client(timeout=PROBE_S, trust_env=False, verify=False, limits=anew)

    def names(self) -> tuple[str, ...]:
        return tuple(manifest.revision(s) for s in self._live() if manifest.revision(s))

    def start(self, state: RolloutState) -> None:
        """Make the InferenceService of a rollout. Raises a PerennialError."""
        document = with_ports(self._manifest_of(state))
        name = service_name(self._project, plan.name(state))
        document["metadata"]["name"] = name
        try:
            with kube.asking(f"creating InferenceService {name}"):
                self._client.create(kube.InferenceService(**document))
            log.info("created InferenceService %s", name)
        except kube.Conflict:
            # Made by a controller that was killed, or not gone yet since it was stopped.
            if self._find(plan.name(state)) is None:
                raise

    def ready(self, name: str) -> bool:
        """Would a request through the edge be answered? Raises Unavailable that says why not."""
        found = self._find(name)
        if found is None:
            return False
        if not conditions.is_true(found, "Ready"):
            raise Unavailable(f"{name} is not ready: {self._why(name, found)}")
        ports = self._ports(name)
        if not self._answers(ports):
            raise Unavailable(f"{name} is ready, but does not answer at {ports.host} yet")
        self._traffic.add(name, ports)
        return True

    def died(self, name: str) -> str:
        """How a server of the revision ended, or that somebody deleted it; empty while it runs."""
        if self._find(name) is None:
            return f"InferenceService {service_name(self._project, name)} was deleted"
        return pods.died(self._client, self._project, name)

    def stop(self, name: str) -> None:
        """End a revision: first the edge forgets it, then its servers go."""
        self._traffic.remove(name)
        kube.delete(self._client, kube.InferenceService, service_name(self._project, name))

    def pages(self, name: str) -> Mapping[str, str]:
        """Pages on which the servers of a revision count, one for each pod."""
        return pods.pages(self._client, self._project, name)

    def platform_name(self, name: str) -> str:
        """What KServe calls a revision."""
        return service_name(self._project, name)

    def edits(self, _allowed: Collection[int | None] = ()) -> list[str]:
        """What somebody else changed of what serves, or stands beside it as a candidate does.

        Shares are not KServe's here.
        """
        serving = self._serving()
        if serving is None:
            return []
        name = service_name(self._project, plan.name(serving))
        live = self._find(plan.name(serving))
        if live is None:
            return [f"InferenceService {name} was deleted"]
        found = _differences(name, self._manifest_of(serving), live)
        for other in self._live():
            applied = self._pinned(manifest.rollout(other))
            if applied and other["metadata"]["name"] != name:
                found += _differences(other["metadata"]["name"], applied, other)
        return found

    def close(self) -> None:
        self._http.close()

    def _live(self) -> list[Document]:
        """All InferenceServices of the project that are not being deleted."""
        with kube.asking(f"listing InferenceServices of {self._project}"):
            found = list(self._client.list(kube.InferenceService, labels=self._labels))
        return [s for s in found if not s["metadata"].get("deletionTimestamp")]

    def _find(self, name: str) -> Document | None:
        """The live InferenceService of a revision; one that is being deleted is none."""
        wanted = service_name(self._project, name)
        found = kube.find(self._client, kube.InferenceService, wanted)
        return found if found and not found["metadata"].get("deletionTimestamp") else None

    def _ports(self, name: str) -> edge.Ports:
        """Where the Service of a revision is: its address, or its name when it has none."""
        wanted = f"{service_name(self._project, name)}-predictor"
        service = kube.find(self._client, Service, wanted)
        if service is None or service.spec is None or service.metadata is None:
            raise Unavailable(f"KServe has not made Service {wanted} yet")
        ports = {port.name or "": port for port in service.spec.ports or ()}
        rest = next((p for p in ports.values() if p.port == _FIRST_PORT), None)
        if rest is None:
            raise Unavailable(f"Service {wanted} has no port {_FIRST_PORT}")
        ip = service.spec.clusterIP
        # Without an address of its own it is a name for the pods, and their ports are not mapped.
        headless = ip in (None, "", "None")
        host = f"{wanted}.{service.metadata.namespace}.svc" if headless else str(ip)
        grpc = ports.get("grpc", rest)
        return edge.Ports(_number(rest, headless), _number(grpc, headless), host)

    def _answers(self, ports: edge.Ports) -> bool:
        url = f"http://{ports.host}:{ports.rest}/v2/models/{self._project}/ready"
        try:
            return self._http.get(url).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _why(self, name: str, found: Document) -> str:
        """What the pods of a revision wait for, else what KServe says of it."""
        waits = pods.waits(self._client, self._project, name)
        return waits or conditions.complaint(found) or "its pods come up"


def _differences(name: str, applied: Document, live: Document) -> list[str]:
    found = manifest.differences(with_ports(applied), live)
    return [f"InferenceService {name}: {one}" for one in found]


def _number(port: ServicePort, headless: bool) -> int:
    return int(port.targetPort or port.port) if headless else port.port
