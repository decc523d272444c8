"""Envoy as the traffic of a rollout: files that appear whole, and its word that they hold."""

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from perennial.errors import Unavailable
from perennial.rollout import edge
from perennial.store import files

log = logging.getLogger(__name__)

APPLY_S = 5.0
_POLL_S = 0.01


class EnvoyTraffic:
    """Splits requests between revisions; the edge itself is a process that the stack runs."""

    def __init__(self, folder: Path, model: str, edge_port: int, admin_port: int) -> None:
        self._folder = folder
        self._model = model
        self._edge_port = edge_port
        self._admin = httpx.Client(
            base_url=f"http://{edge.LOOPBACK}:{admin_port}", timeout=APPLY_S, trust_env=False
        )
        self._admin_port = admin_port
        self._revisions: dict[str, edge.Ports] = {}
        self._weights: dict[str, int] = {}

    def write(self) -> Path:
        """Write all files anew, without any revision, and give the one that Envoy starts with."""
        self._publish(edge.CDS, [])
        self._publish(edge.RDS, [edge.routes(self._model, {})])
        self._publish(edge.LDS, [edge.listener(self._folder, self._edge_port)])
        config = edge.bootstrap(self._folder, self._admin_port)
        files.write_atomic(self._folder / edge.BOOTSTRAP, json.dumps(config, indent=1))
        return self._folder / edge.BOOTSTRAP

    def is_live(self) -> bool:
        """Does the edge listen with routes?"""
        try:
            return bool(self._admin.get("/ready").status_code == httpx.codes.OK)
        except httpx.HTTPError:
            return False

    def add(self, revision: str, ports: edge.Ports) -> None:
        """Make a revision known, without traffic. Raises Unavailable."""
        self._set_revisions({**self._revisions, revision: ports})

    def remove(self, revision: str) -> None:
        """Forget a revision that has no traffic. Raises Unavailable."""
        self._set_revisions({n: p for n, p in self._revisions.items() if n != revision})

    def weights(self) -> Mapping[str, int]:
        """Percent of each revision, as Envoy confirmed it last."""
        return dict(self._weights)

    def set_weights(self, weights: Mapping[str, int]) -> None:
        """Split requests anew; returns when Envoy does so. Raises Unavailable."""
        wanted = {name: percent for name, percent in weights.items() if percent}
        if wanted == self._weights:
            return
        unknown = sorted(set(wanted) - set(self._revisions))
        if unknown or sum(wanted.values()) != 100:
            raise Unavailable(f"the edge cannot split {wanted}; unknown revisions: {unknown}")
        self._apply(edge.RDS, [edge.routes(self._model, wanted)], "http.edge.rds.edge")
        self._weights = wanted
        log.info("edge weights %s", wanted)

    def close(self) -> None:
        self._admin.close()

    def _set_revisions(self, revisions: dict[str, edge.Ports]) -> None:
        if revisions == self._revisions:
            return
        self._apply(edge.CDS, edge.clusters(self._model, revisions), "cluster_manager.cds")
        self._revisions = revisions

    def _apply(self, name: str, resources: list[edge.Config], where: str) -> None:
        """Write one file and return when Envoy runs it; a refused one is taken back."""
        old = (self._folder / name).read_bytes()
        state = self._state(where)
        refused = state.refused
        version = self._publish(name, resources)
        limit = time.monotonic() + APPLY_S
        while time.monotonic() < limit and state.refused == refused:
            state = self._state(where)
            if state.version == version:
                return
            time.sleep(_POLL_S)
        # The next renamed file makes Envoy read this one again: it must not find a bad one.
        files.write_atomic(self._folder / name, old)
        why = f"was silent about a new {name} for {APPLY_S:g} s"
        if state.refused > refused:
            why = f"refused a new {name}"
        raise Unavailable(f"Envoy {why}; its log says more")

    def _publish(self, name: str, resources: list[edge.Config]) -> str:
        """Write one file; its version is its content, so that the same words are no change."""
        version = files.digest_bytes(json.dumps(resources, sort_keys=True).encode())[7:19]
        body = {"version_info": version, "resources": resources}
        files.write_atomic(self._folder / name, json.dumps(body, indent=1))
        return version

    def _state(self, where: str) -> "_Subscription":
        stats = self._ask("/stats", filter=rf"^{re.escape(where)}\.(version_text|update_rejected)$")
        found = dict(line.split(": ", 1) for line in stats.text.splitlines() if ": " in line)
        version = found.get(f"{where}.version_text", "").strip('"')
        return _Subscription(version, int(found.get(f"{where}.update_rejected", 0)))

    def _ask(self, path: str, **query: str) -> httpx.Response:
        try:
            return self._admin.get(path, params=query).raise_for_status()
        except httpx.HTTPError as exc:
            raise Unavailable(f"the edge does not answer ({type(exc).__name__})") from exc


@dataclass(frozen=True)
class _Subscription:
    """What Envoy says of one file: the version in force, and how many were refused so far."""

    version: str
    refused: int
