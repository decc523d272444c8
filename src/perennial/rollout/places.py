"""Which adapters move a project's traffic on this cluster, and what is every revision told?"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from sqlalchemy import Engine

from perennial import kube
from perennial.errors import Unavailable
from perennial.project import Rollout
from perennial.rollout import edge, plan, standard, xds
from perennial.rollout.envoy import EnvoyTraffic
from perennial.rollout.evidence import EnvoyEvidence
from perennial.rollout.knative import KnativeService
from perennial.rollout.manifest import Place, Scale
from perennial.rollout.pinned import Manifests
from perennial.rollout.podmetrics import PodEvidence
from perennial.rollout.ports import EvidenceSource, Revisions, Traffic
from perennial.settings import Settings
from perennial.store import fence, rollouts

Broker = create_namespaced_resource("eventing.knative.dev", "v1", "Broker", "brokers")
BROKER = "default"
KNATIVE, STANDARD = "Knative", "Standard"
# Rows of a pod that has no object store to keep them in.
SCRATCH = "/tmp/segments"


@dataclass(frozen=True)
class Adapters:
    """One project's traffic, and what is asked about it."""

    traffic: Traffic
    revisions: Revisions
    evidence: EvidenceSource
    platform_name: Callable[[str], str]
    edits: Callable[[Collection[int | None]], list[str]]
    close: Callable[[], None]


def of(
    settings: Settings,
    client: Client,
    engine: Engine,
    project: str,
    guard: fence.Guard = fence.free,
) -> Adapters:
    """The adapters of a project in the mode that the settings say. Raises a PerennialError."""
    scale = Scale(settings.min_replicas, settings.max_replicas)
    manifests = Manifests(engine, settings.root, partial(place, settings, client), scale, guard)
    if settings.deployment_mode == STANDARD:
        return _standard(client, engine, project, manifests, guard)
    return _knative(client, engine, project, manifests)


def place(settings: Settings, client: Client, project: str) -> Place:
    """What the surroundings decide about every revision of a project."""
    segments = settings.state(project).artifacts("segments") if settings.artifacts else SCRATCH
    return Place(
        namespace=str(client.namespace),
        mode=settings.deployment_mode,
        image=settings.serving_image,
        segments=segments,
        sink=sink(settings, client),
        steps_image=settings.image,
    )


def sink(settings: Settings, client: Client) -> str:
    """Who takes drift events. Raises Unavailable until there is somebody.

    What is told here stays with a rollout for good, so nothing is told for the time being.
    """
    if settings.sink:
        return settings.sink
    broker = kube.find(client, Broker, BROKER)
    if broker is None:
        raise Unavailable(
            f"there is no Broker {BROKER} in {client.namespace} to take drift events; apply the"
            " overlay again, or set PERENNIAL_SINK to a listener of your own"
        )
    url = ((broker.get("status") or {}).get("address") or {}).get("url", "")
    if not url:
        raise Unavailable(f"Broker {BROKER} has no address yet")
    return str(url)


def _knative(client: Client, engine: Engine, project: str, manifests: Manifests) -> Adapters:
    service = KnativeService(
        client,
        project,
        manifests.of,
        lambda: rollouts.serving(engine, project),
        manifests.pinned,
        partial(_percents, engine, project),
    )
    evidence = PodEvidence(project, service.pages, service.weights)
    return Adapters(
        traffic=service,
        revisions=service,
        evidence=evidence,
        platform_name=service.platform_name,
        edits=service.edits,
        close=evidence.close,
    )


def _percents(engine: Engine, project: str) -> set[int | None]:
    going = rollouts.open_rollout(engine, project)
    limits = Rollout.model_validate_json((going and going.limits) or "{}")
    return plan.percents(going, limits.steps)


def _standard(
    client: Client, engine: Engine, project: str, manifests: Manifests, guard: fence.Guard
) -> Adapters:
    edges = standard.EdgePods(client, project)
    traffic = EnvoyTraffic(project, xds.Rows(engine, project, edges, edge.POD_PORT, guard))
    traffic.resume()
    revisions = standard.StandardRevisions(
        client,
        project,
        manifests.of,
        traffic,
        lambda: rollouts.serving(engine, project),
        manifests.pinned,
    )
    evidence = EnvoyEvidence(project, edges, revisions.pages)

    def close() -> None:
        for one in (traffic, revisions, evidence):
            one.close()

    return Adapters(
        traffic=traffic,
        revisions=revisions,
        evidence=evidence,
        platform_name=revisions.platform_name,
        edits=revisions.edits,
        close=close,
    )
