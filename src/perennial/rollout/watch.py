"""What changed on the API server: ModelRollouts and InferenceServices, watched by kopf."""

import asyncio
import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any

from perennial.drift import light
from perennial.errors import LoopBroken

# kopf would log in by it; that we do by files spares 40 MB and a second.
with light.without("kubernetes"):
    import kopf

log = logging.getLogger(__name__)

ROLLOUTS = ("perennial.dev", "v1alpha1", "modelrollouts")
SERVICES = ("serving.kserve.io", "v1beta1", "inferenceservices")
_STOP_S = 10.0


@dataclass(frozen=True)
class Change:
    """One object as it is now; what was deleted is gone."""

    kind: str
    name: str
    gone: bool
    body: dict[str, Any]


class Watcher:
    """A thread in which kopf watches one namespace; changes wait until they are taken."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._changes: queue.SimpleQueue[Change] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._failed = ""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(_STOP_S)

    def take(self) -> list[Change]:
        """What changed since the last call, the newest word on each object."""
        found: dict[tuple[str, str], Change] = {}
        while not self._changes.empty():
            change = self._changes.get()
            found[change.kind, change.name] = change
        return list(found.values())

    def check(self) -> None:
        """Raises LoopBroken when the watch ended: only a new process can mend that."""
        if self._failed or not self._thread.is_alive():
            raise LoopBroken(f"the watch of the API server ended: {self._failed or 'by itself'}")

    def _watch(self) -> None:
        try:
            asyncio.run(
                kopf.operator(
                    registry=self._registry(),
                    settings=_settings(),
                    namespaces=[self._namespace],
                    standalone=True,
                    stop_flag=self._stop,
                )
            )
        except Exception as exc:
            log.exception("the watch ended")
            self._failed = f"{type(exc).__name__}: {exc}"

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        kopf.on.login(registry=registry)(_login)
        for group, version, plural in (ROLLOUTS, SERVICES):
            kopf.on.event(group, version, plural, registry=registry)(self._put)
        return registry

    async def _put(self, event: Any, body: Any, resource: Any, **_: Any) -> None:
        meta = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
        told = {**body, "metadata": meta}
        gone = event["type"] == "DELETED"
        self._changes.put(Change(resource.plural, meta["name"], gone, told))


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True
    settings.posting.enabled = False
    settings.watching.server_timeout = 300
    settings.watching.client_timeout = 330
    return settings
