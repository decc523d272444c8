"""What changed on the API server: ModelRollouts and InferenceServices, watched by kopf."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from perennial.drift import light
from perennial.errors import LoopBroken, Unavailable

# kopf would log in by it; that we do by files spares 40 MB and a second.
with light.without("kubernetes"):
    import kopf

log = logging.getLogger(__name__)

ROLLOUTS = ("perennial.dev", "v1alpha1", "modelrollouts")
SERVICES = ("serving.kserve.io", "v1beta1", "inferenceservices")
_STOP_S = 10.0
# One list a minute for all projects together.
LOOK_S = 60.0


@dataclass(frozen=True)
class Change:
    """One object as it is now; what was deleted is gone."""

    kind: str
    name: str
    gone: bool
    body: dict[str, Any]


@dataclass
class Census:
    """Which InferenceServices are there; a watch that broke off never tells which went meanwhile.

    ``there`` lists their names and may raise Unavailable; then it is asked again later.
    """

    there: Callable[[], Collection[str]]
    monotonic: Callable[[], float]
    looked_s: float = 0.0
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.looked_s = self.monotonic()

    def gone(self, told: Collection[Change]) -> list[Change]:
        """What went without a word, after all that was told."""
        for change in told:
            if change.kind == SERVICES[2]:
                self._note(change)
        if self.monotonic() - self.looked_s < LOOK_S:
            return []
        self.looked_s = self.monotonic()
        try:
            missing = self._known.keys() - self.there()
        except Unavailable as exc:
            log.info("who is there is not known: %s", exc)
            return []
        return [
            Change(SERVICES[2], name, gone=True, body={"metadata": self._known.pop(name)})
            for name in sorted(missing)
        ]

    def _note(self, change: Change) -> None:
        if change.gone:
            self._known.pop(change.name, None)
        else:
            labels = change.body["metadata"].get("labels")
            self._known[change.name] = {"name": change.name, "labels": labels}


class Watcher:
    """A thread in which kopf watches one namespace; changes wait until they are taken."""

    def __init__(self, namespace: str, census: Census) -> None:
        self._namespace = namespace
        self._census = census
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
        return [*found.values(), *self._census.gone(found.values())]

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
