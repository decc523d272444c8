"""What do the pods of a revision say: where each is, what it waits for, and how it ended."""

from collections.abc import Mapping
from typing import Any

from lightkube import Client
from lightkube.models.core_v1 import ContainerStatus
from lightkube.resources.core_v1 import Pod

from perennial import kube
from perennial.errors import Unavailable
from perennial.rollout import manifest

# Of the transformer, which every request passes.
PORT, METRICS = 8080, "/metrics"


def listed(client: Client, what: str, labels: Mapping[str, str]) -> list[Pod]:
    """The pods that have these labels. Raises Unavailable."""
    wanted: dict[str, Any] = dict(labels)
    with kube.asking(f"listing pods of {what}"):
        return list(client.list(Pod, labels=wanted))


def of(client: Client, project: str, revision: str) -> list[Pod]:
    """The pods of one revision of a project."""
    labels = {manifest.PROJECT: project, manifest.REVISION: revision}
    return listed(client, revision, labels)


def died(client: Client, project: str, revision: str) -> str:
    """How a server of a revision ended by itself; empty while none did."""
    found = of(client, project, revision)
    ends = (end(pod, status) for pod in found for status in servers(pod))
    return next((f"{revision}: {text}" for text in ends if text), "")


def waits(client: Client, project: str, revision: str) -> str:
    """What the pods of a revision wait for; empty while they only come up."""
    found = of(client, project, revision)
    said = (wait(status) for pod in found for status in statuses(pod))
    return next((text for text in said if text), "")


def pages(client: Client, project: str, revision: str) -> Mapping[str, str]:
    """Pages on which the servers of a revision count, one for each pod."""
    at = {key(pod): address(pod) for pod in of(client, project, revision)}
    return {name: f"http://{ip}:{PORT}{METRICS}" for name, ip in at.items() if ip}


def address(pod: Pod) -> str:
    """Where a pod is, empty before it has an address and when it is told to go."""
    going = pod.metadata is None or pod.metadata.deletionTimestamp
    return "" if going or pod.status is None else pod.status.podIP or ""


def key(pod: Pod) -> str:
    """Its name and how often it began anew: what counts from nothing has another key."""
    name = pod.metadata.name if pod.metadata else ""
    return f"{name}/{sum(status.restartCount for status in statuses(pod))}"


def is_ready(pod: Pod) -> bool:
    """Does it get requests?"""
    conditions = (pod.status.conditions if pod.status else None) or ()
    return any(c.type == "Ready" and c.status == "True" for c in conditions)


def statuses(pod: Pod) -> list[ContainerStatus]:
    """All its containers, in the order in which they start."""
    if pod.status is None:
        return []
    return [*(pod.status.initContainerStatuses or ()), *(pod.status.containerStatuses or ())]


def servers(pod: Pod) -> list[ContainerStatus]:
    """The containers that are ours: what an init container fetches may come yet."""
    ours = (manifest.PREDICTOR, manifest.TRANSFORMER, manifest.LOOKUP)
    return [s for s in statuses(pod) if s.name in ours]


def wait(status: ContainerStatus) -> str:
    """What a container waits for, empty while it only comes up."""
    waiting = status.state.waiting if status.state else None
    if waiting is None or waiting.reason in ("ContainerCreating", "PodInitializing"):
        return ""
    last = status.lastState.terminated if status.lastState else None
    said = (last.message if last else "") or waiting.message or ""
    return f"{status.name} {waiting.reason}: {_line(said)}"


def end(pod: Pod, status: ContainerStatus) -> str:
    """How a container ended by itself, empty while it did not."""
    ends = [s.terminated for s in (status.state, status.lastState) if s and s.terminated]
    # One that says that something is not to be had now tries again, and may succeed.
    bad = next((e for e in ends if e.exitCode not in (0, Unavailable.exit_code)), None)
    # A pod that is told to go ends its servers, and not always with 0.
    if bad is None or (pod.metadata and pod.metadata.deletionTimestamp):
        return ""
    return f"{status.name} ended with {bad.exitCode} ({bad.reason}): {_line(bad.message or '')}"


def _line(text: str) -> str:
    """The last line of what a container said."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
