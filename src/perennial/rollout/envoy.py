"""Envoy as the traffic of a rollout: documents that appear whole, and its word that they hold."""

import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from perennial.errors import Unavailable
from perennial.rollout import edge
from perennial.store import files

log = logging.getLogger(__name__)

APPLY_S = 5.0
_FIRST_POLL_S, _LAST_POLL_S = 0.01, 0.25


class Way(Protocol):
    """How documents reach the Envoys of one edge, and where each of them answers for them."""

    def listener(self) -> edge.Config:
        """What clients connect to."""
        ...

    def read(self, name: str) -> str | None:
        """A document as it was written last."""
        ...

    def write(self, name: str, version: str, body: str) -> None:
        """Replace a document as a whole; every Envoy takes it by itself."""
        ...

    def edges(self) -> Mapping[str, str]:
        """Base URL of the statistics of each running Envoy; its key changes when it starts anew."""
        ...


class Files:
    """One Envoy on this machine, which reads a folder."""

    def __init__(self, folder: Path, edge_port: int, admin_port: int) -> None:
        self._folder = folder
        self._source = edge.folder_source(folder)
        self._edge_port = edge_port
        self._admin_port = admin_port

    def bootstrap(self) -> Path:
        """Write the file that Envoy starts with."""
        config = edge.bootstrap(self._source, self._admin_port)
        files.write_atomic(self._folder / edge.BOOTSTRAP, json.dumps(config, indent=1))
        return self._folder / edge.BOOTSTRAP

    def listener(self) -> edge.Config:
        return edge.listener(self._source, self._edge_port)

    def read(self, name: str) -> str | None:
        file = self._folder / name
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def write(self, name: str, version: str, body: str) -> None:
        files.write_atomic(self._folder / name, body)

    def edges(self) -> Mapping[str, str]:
        return {"edge": f"http://{edge.LOOPBACK}:{self._admin_port}"}


class EnvoyTraffic:
    """Splits requests between revisions; who runs the Envoys is not its business."""

    def __init__(self, model: str, way: Way) -> None:
        self._model = model
        self._way = way
        self._http = httpx.Client(timeout=APPLY_S, trust_env=False, verify=False)
        self._revisions: dict[str, edge.Ports] = {}
        self._weights: dict[str, int] = {}

    def begin(self) -> None:
        """Write all documents anew, without any revision."""
        self._publish(edge.CDS, [])
        self._publish(edge.RDS, [edge.routes(self._model, {})])
        self._publish(edge.LDS, [self._way.listener()])

    def resume(self) -> None:
        """Go on from what was written last; the split stays as it is until it is set."""
        told = self._way.read(edge.CDS)
        if told is None or self._way.read(edge.RDS) is None:
            self.begin()
            return
        self._revisions = edge.revisions(self._model, json.loads(told)["resources"])
        self._publish(edge.LDS, [self._way.listener()])

    def is_live(self) -> bool:
        """Does every edge listen with routes?"""
        try:
            edges = self._way.edges().values()
            answers = [self._http.get(f"{url}/ready").status_code for url in edges]
        except httpx.HTTPError:
            return False
        return bool(answers) and set(answers) == {httpx.codes.OK}

    def add(self, revision: str, ports: edge.Ports) -> None:
        """Make a revision known, without traffic. Raises Unavailable."""
        self._set_revisions({**self._revisions, revision: ports})

    def remove(self, revision: str) -> None:
        """Forget a revision that has no traffic. Raises Unavailable."""
        self._set_revisions({n: p for n, p in self._revisions.items() if n != revision})

    def weights(self) -> Mapping[str, int]:
        """Percent of each revision, as every Envoy confirmed it last."""
        return dict(self._weights)

    def set_weights(self, weights: Mapping[str, int]) -> None:
        """Split requests anew; returns when every Envoy does so. Raises Unavailable."""
        wanted = {name: percent for name, percent in weights.items() if percent}
        if wanted == self._weights:
            return
        unknown = sorted(set(wanted) - set(self._revisions))
        if unknown or sum(wanted.values()) != 100 or min(wanted.values()) < 0:
            raise Unavailable(f"the edge cannot split {wanted}; unknown revisions: {unknown}")
        # What holds is not known until it is confirmed: some Envoys may be told, some not.
        self._weights = {}
        self._apply(edge.RDS, [edge.routes(self._model, wanted)], "http.edge.rds.edge")
        self._weights = wanted
        log.info("edge weights %s", wanted)

    def close(self) -> None:
        self._http.close()

    def _set_revisions(self, revisions: dict[str, edge.Ports]) -> None:
        if revisions == self._revisions:
            return
        self._apply(edge.CDS, edge.clusters(self._model, revisions), "cluster_manager.cds")
        self._revisions = revisions

    def _apply(self, name: str, resources: list[edge.Config], where: str) -> None:
        """Write a document and return when every Envoy runs it; a refused one is taken back.

        One that meets silence stays: it may be a way back, and whoever asks again confirms it.
        """
        old = self._way.read(name)
        before = {key: s.refused if s else 0 for key, s in self._states(where).items()}
        version = self._publish(name, resources)
        limit = time.monotonic() + APPLY_S
        pause_s = _FIRST_POLL_S
        while time.monotonic() < limit:
            states = self._answers(where)
            if all(state.version == version for state in states.values()):
                return
            if any(s.refused > before.get(key, s.refused) for key, s in states.items()):
                self._take_back(name, old)
                raise Unavailable(f"Envoy refused a new {name}; its log says more")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        raise Unavailable(f"Envoy was silent about a new {name} for {APPLY_S:g} s")

    def _take_back(self, name: str, old: str | None) -> None:
        # The next document makes Envoy read this one again: it must not find a bad one.
        if old is not None:
            self._way.write(name, json.loads(old)["version_info"], old)

    def _publish(self, name: str, resources: list[edge.Config]) -> str:
        """Write a document; its version is its content, so that the same words are no change."""
        version = files.digest_bytes(json.dumps(resources, sort_keys=True).encode())[7:19]
        body = {"version_info": version, "resources": resources}
        self._way.write(name, version, json.dumps(body, indent=1))
        return version

    def _answers(self, where: str) -> "dict[str, _Subscription]":
        """What every Envoy says of a document. Raises Unavailable when one says nothing."""
        states = self._states(where)
        found = {key: state for key, state in states.items() if state}
        if not found or len(found) < len(states):
            silent = ", ".join(sorted(set(states) - set(found))) or "none runs"
            raise Unavailable(f"the edge does not answer ({silent})")
        return found

    def _states(self, where: str) -> "dict[str, _Subscription | None]":
        return {key: self._state(url, where) for key, url in self._way.edges().items()}

    def _state(self, url: str, where: str) -> "_Subscription | None":
        """What one Envoy says of a document, None when it does not answer."""
        wanted = rf"^{re.escape(where)}\.(version_text|update_rejected)$"
        try:
            stats = self._http.get(f"{url}/stats", params={"filter": wanted}).raise_for_status()
        except httpx.HTTPError:
            return None
        found = dict(line.split(": ", 1) for line in stats.text.splitlines() if ": " in line)
        version = found.get(f"{where}.version_text", "").strip('"')
        return _Subscription(version, int(found.get(f"{where}.update_rejected", 0)))


@dataclass(frozen=True)
class _Subscription:
    """What Envoy says of one document: the version in force, and how many were refused so far."""

    version: str
    refused: int
