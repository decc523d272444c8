"""Where people see how far rollouts are: ModelRollouts, written only when something changed."""

import logging
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

from lightkube import Client

from perennial import kube
from perennial.errors import PerennialError
from perennial.rollout import resource
from perennial.rollout.resource import Document

log = logging.getLogger(__name__)

# Words change with every look, and a move is told at once; more often nobody reads them.
WORDS_S = 5.0
# Deleted at a time: a turn must end, and more are found after the next rollout.
MOST = 50


class Board:
    """The ModelRollouts of one namespace, as far as they are known here."""

    def __init__(
        self, client: Client, now: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        self._client = client
        self._now = now
        self._monotonic = monotonic
        self._told: dict[str, Document] = {}
        self._told_at: dict[str, float] = {}

    def read(self) -> None:
        """Learn all of them anew. Raises Unavailable."""
        self._told.clear()
        with kube.asking("listing ModelRollouts"):
            for found in self._client.list(kube.ModelRollout):
                self.learn(found["metadata"]["name"], found)

    def learn(self, name: str, found: Document | None) -> None:
        """Take note of what stands on the API server; None when it was deleted."""
        if found is None:
            self._told.pop(name, None)
        else:
            self._told[name] = found.get("status") or {}

    def knows(self, name: str) -> bool:
        return name in self._told

    def before(self, name: str) -> Document:
        """The status that stands there."""
        return self._told.get(name, {})

    def make(self, document: Document) -> None:
        """Make an object; nothing happens when it is there. Raises Unavailable or BadInput."""
        name = document["metadata"]["name"]
        try:
            with kube.asking(f"creating ModelRollout {name}"):
                self._client.create(kube.ModelRollout(**document))
        except kube.Conflict:
            log.debug("ModelRollout %s is there", name)
        self._told.setdefault(name, {})

    def remove(self, ids: Collection[int]) -> None:
        """Delete what tells of these rollouts; what cannot be deleted now may be later."""
        found = [name for name, told in self._told.items() if told.get("rollout") in ids]
        for name in found[:MOST]:
            try:
                kube.delete(self._client, kube.ModelRollout, name)
            except PerennialError as exc:
                log.warning("%s", exc)
                return
            self._told.pop(name)
            self._told_at.pop(name, None)

    def tell(self, name: str, status: Document) -> bool:
        """Write a status, unless it stands there; does it now? Raises Unavailable.

        False asks to be told again: other words came too soon, or the object is gone.
        """
        before = self._told.get(name, {})
        moved = _moves(status) != _moves(before)
        waited = self._monotonic() - self._told_at.get(name, -WORDS_S) >= WORDS_S
        if _plain(status) == _plain(before):
            return True
        if not (moved or waited):
            return False
        body: dict[str, Any] = {"metadata": {"name": name}, "status": status}
        kind = kube.ModelRollout.Status
        try:
            with kube.asking(f"telling ModelRollout {name}"):
                found = kind(apiVersion=resource.API, kind=resource.KIND, **body)
                self._client.apply(found, force=True)
        except kube.Missing:
            self.learn(name, None)
            return False
        self._told[name], self._told_at[name] = status, self._monotonic()
        return True


def _moves(status: Document) -> list[object]:
    """What is told at once."""
    turns = [(c["type"], c["status"]) for c in status.get("conditions", ())]
    return [turns, *(status.get(key) for key in ("phase", "step", "weight", "verdict", "history"))]


def _plain(status: Document) -> Document:
    return {key: value for key, value in status.items() if value not in ("", [], None)}
