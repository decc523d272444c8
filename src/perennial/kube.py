"""How is a Kubernetes API server asked, and what does its refusal mean in one sentence?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx2
from lightkube import Client, KubeConfig
from lightkube.core.exceptions import ApiError, ConfigError
from lightkube.core.resource import NamespacedResource
from lightkube.generic_resource import GenericNamespacedResource, create_namespaced_resource

from perennial.errors import BadInput, PerennialError, Unavailable

MANAGER = "perennial"
TIMEOUT_S = 10.0

InferenceService = create_namespaced_resource(
    "serving.kserve.io", "v1beta1", "InferenceService", "inferenceservices"
)
ModelRollout = create_namespaced_resource(
    "perennial.dev", "v1alpha1", "ModelRollout", "modelrollouts"
)

Kind = TypeVar("Kind", bound=NamespacedResource)


class Conflict(Unavailable):
    """The object exists already, or somebody changed it meanwhile."""


class Forbidden(Unavailable):
    """The identity may not do this, or a quota is full; an administrator can mend it."""


class Missing(Unavailable):
    """The object, its namespace or its kind is not there (yet)."""


def connect(namespace: str = "") -> Client:
    """A client for the pod's service account, else for KUBECONFIG. Raises BadInput without one.

    ``namespace`` is what calls without one mean; empty is the pod's or the kubeconfig's.
    """
    try:
        config = KubeConfig.from_env().get()
    except (ConfigError, OSError, KeyError, ValueError) as exc:
        raise BadInput(
            f"no Kubernetes cluster is configured ({exc}); set KUBECONFIG or run in a pod"
        ) from exc
    return Client(
        config,
        namespace=namespace or None,
        field_manager=MANAGER,
        timeout=httpx2.Timeout(TIMEOUT_S),
    )


@contextmanager
def asking(what: str) -> Iterator[None]:
    """Tell a failed call as ``<what>: <why>``.

    What may mend by itself or by an administrator is Unavailable (also as Conflict, Forbidden or
    Missing); what the same words will never bring about is BadInput.
    """
    try:
        yield
    except ApiError as exc:
        raise _translated(what, int(exc.status.code or 0), exc.status.message or "") from exc
    except httpx2.HTTPStatusError as exc:
        # A kind that is not installed is answered by a plain page.
        raise _translated(what, exc.response.status_code, exc.response.text[:200]) from exc
    except (httpx2.HTTPError, ConfigError) as exc:
        why = f"the API server does not answer ({type(exc).__name__})"
        raise Unavailable(f"{what}: {why}") from exc


def find(client: Client, kind: type[Kind], name: str, namespace: str | None = None) -> Kind | None:
    """One object, None when it is not there."""
    try:
        with asking(f"reading {kind.__name__} {name}"):
            return client.get(kind, name, namespace=namespace)
    except Missing:
        return None


def names(client: Client, kind: type[GenericNamespacedResource]) -> set[str]:
    """What all objects of a kind are called. Raises a PerennialError."""
    with asking(f"listing every {kind.__name__}"):
        return {str(found["metadata"]["name"]) for found in client.list(kind)}


def delete(client: Client, kind: type[Kind], name: str, namespace: str | None = None) -> None:
    """Delete one object and its dependents; nothing happens when it is not there."""
    try:
        with asking(f"deleting {kind.__name__} {name}"):
            client.delete(kind, name, namespace=namespace)
    except Missing:
        return


def _translated(what: str, code: int, message: str) -> PerennialError:
    said = " ".join(message.split())
    # Webhooks refuse with the code of a missing right.
    if code in (400, 422) or "denied the request" in said:
        return BadInput(f"{what}: refused by the API server: {said}")
    kinds = {401: Forbidden, 403: Forbidden, 404: Missing, 409: Conflict}
    return kinds.get(code, Unavailable)(f"{what}: {said or f'HTTP {code}'}")
