"""Revisions of a model as processes: a predictor and its transformer, known to the edge."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx

from perennial.bundle import MANIFEST, MODEL
from perennial.errors import BadInput
from perennial.local.isvc import InferenceService
from perennial.local.processes import LOOPBACK, Children, free_ports
from perennial.records import RolloutState
from perennial.rollout import plan
from perennial.rollout.edge import Ports
from perennial.rollout.envoy import EnvoyTraffic

PROBE_S = 5.0
METRICS = "/metrics"


@dataclass(frozen=True)
class Places:
    """What a revision's processes are told besides the InferenceService."""

    python: Path
    env: Mapping[str, str]
    segments: str  # URI that takes served rows
    sink: str  # URL that takes drift events
    key: Path  # file with the key that signs them
    features: str = ""  # URL of the feature server; empty: features come with the request


@dataclass(frozen=True)
class _Pair:
    transformer: Ports
    predictor: Ports


class LocalRevisions:
    """Starts, watches and ends revisions; their traffic is the edge's business."""

    def __init__(
        self, service: InferenceService, places: Places, children: Children, traffic: EnvoyTraffic
    ) -> None:
        self._service = service
        self._places = places
        self._children = children
        self._traffic = traffic
        self._pairs: dict[str, _Pair] = {}
        self._http = httpx.Client(timeout=PROBE_S, trust_env=False)

    def names(self) -> tuple[str, ...]:
        return tuple(self._pairs)

    def start(self, state: RolloutState) -> None:
        """Start both servers of a rollout's bundle. Raises BadInput without a bundle."""
        name = plan.name(state)
        bundle = bundle_folder(state.bundle_uri)
        if not (bundle / MODEL / MANIFEST).is_file():
            raise BadInput(f"no bundle of {name} at {bundle}; was it deleted?")
        rest, grpc, own_rest, own_grpc = free_ports(4)
        pair = _Pair(transformer=Ports(rest, grpc), predictor=Ports(own_rest, own_grpc))
        self._traffic.add(name, pair.transformer)
        self._pairs[name] = pair
        given = {"bundle": str(bundle), "digest": state.digest, "revision": name}
        self._run(f"predictor-{name}", self._predictor(pair, given), self._service.predictor.env)
        transformer = self._transformer(pair, given)
        self._run(f"transformer-{name}", transformer, self._service.transformer.env)

    def ready(self, name: str) -> bool:
        """Do both servers answer their probes?"""
        if name not in self._pairs:
            return False
        pair = self._pairs[name]
        probes = (
            (pair.predictor.rest, self._service.predictor.probe),
            (pair.transformer.rest, self._service.transformer.probe),
        )
        return all(self._answers(f"http://{LOOPBACK}:{port}{path}") for port, path in probes)

    def died(self, name: str) -> str:
        """How one of its processes ended; empty while both run."""
        ends = [self._children.ended(process) for process in self.processes(name)]
        return "; ".join(end for end in ends if end)

    def stop(self, name: str) -> None:
        """End a revision: first who takes requests, then who answers them."""
        if name not in self._pairs:
            return
        for process in self.processes(name):
            self._children.stop(process)
        del self._pairs[name]
        self._traffic.remove(name)

    def processes(self, name: str) -> tuple[str, ...]:
        """Names of the processes of a revision."""
        return (f"transformer-{name}", f"predictor-{name}") if name in self._pairs else ()

    def pages(self, name: str) -> Mapping[str, str]:
        """Page on which a revision's predictor counts invalid outputs."""
        pair = self._pairs.get(name)
        return {name: f"http://{LOOPBACK}:{pair.predictor.rest}{METRICS}"} if pair else {}

    def close(self) -> None:
        self._http.close()

    def _predictor(self, pair: _Pair, given: Mapping[str, str]) -> list[str]:
        return self._service.predictor.command_line(
            self._places.python, {**given, **_listening(pair.predictor)}
        )

    def _transformer(self, pair: _Pair, given: Mapping[str, str]) -> list[str]:
        changes = {
            **given,
            **_listening(pair.transformer),
            "predictor_host": f"{LOOPBACK}:{pair.predictor.rest}",
            "segments": self._places.segments,
            "sink": self._places.sink,
            "key": str(self._places.key),
            **({"features": self._places.features} if self._places.features else {}),
        }
        return self._service.transformer.command_line(self._places.python, changes)

    def _run(self, process: str, command: list[str], env: Mapping[str, str]) -> None:
        self._children.start(process, command, {**self._places.env, **env})

    def _answers(self, url: str) -> bool:
        try:
            return self._http.get(url).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False


def bundle_folder(uri: str) -> Path:
    """The folder that a rollout's ``file:`` URI, or plain path, names."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else Path(uri)


def _listening(ports: Ports) -> dict[str, str]:
    return {"host": LOOPBACK, "http_port": str(ports.rest), "grpc_port": str(ports.grpc)}
