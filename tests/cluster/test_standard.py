"""Standard mode on a real cluster: two pods of the edge before the Services that KServe makes."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fronts
import grpc
import httpx
import pytest
from adapters import ERRORS, FINE, TrafficContract, rollout
from fronts import EDGES
from lightkube import Client
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Pod
from small import inference_service

from perennial import kube
from perennial.errors import Unavailable
from perennial.ledger import Ledger
from perennial.project import Rollout
from perennial.records import Phase, RolloutState
from perennial.rollout import plan, pods, standard, xds
from perennial.rollout.controller import Controller
from perennial.rollout.edge import GRPC_SERVICE
from perennial.rollout.envoy import EnvoyTraffic
from perennial.rollout.evidence import EnvoyEvidence
from perennial.store import rollouts
from perennial.store.engine import make_engine

IMAGE = os.environ.get("PERENNIAL_TEST_IMAGE", "dev.local/perennial:0.1.0-python3.11")
INFER = "/v2/models/retail/infer"

pytestmark = pytest.mark.cluster


class StandardBench:
    """The contract's surroundings: an operator's adapters here, everything else in pods."""

    patience_s = 120.0

    def __init__(self, client: Client, namespace: str, kubectl: Any, folder: Path) -> None:
        self.client = client
        self.namespace = namespace
        self._kubectl = kubectl
        self._faults: dict[int, str] = {}
        self.engine = make_engine(f"sqlite:///{folder}/state.db")
        self.host = fronts.host_address(kubectl)
        self.port = fronts.free_port(self.host)
        self.edges = standard.EdgePods(client, "retail")
        self._open()

    def _open(self) -> None:
        self.traffic = EnvoyTraffic("retail", xds.Rows(self.engine, "retail", self.edges))
        self.traffic.resume()
        self.revisions = standard.StandardRevisions(
            self.client, "retail", self.document, self.traffic, lambda: None
        )
        self.evidence = EnvoyEvidence("retail", self.edges, self.revisions.pages)

    def close(self) -> None:
        for one in (self.traffic, self.revisions, self.evidence):
            one.close()

    def restart(self) -> None:
        self.close()
        self._open()

    def document(self, state: RolloutState) -> dict[str, Any]:
        fault = self._faults[state.version]
        return inference_service(state, "retail", self.namespace, "Standard", IMAGE, fault)

    def state(self, fault: str = FINE) -> RolloutState:
        version = len(self._faults) + 1
        self._faults[version] = fault
        return rollout(version)

    def install(self) -> None:
        fronts.install(self._kubectl, self.namespace, self.host, self.port)

    @property
    def address(self) -> str:
        return fronts.address(self.client)

    def ask(self, count: int) -> list[tuple[int, str]]:
        said = []
        for _ in range(0, count, 10):
            # A new connection may go to another pod of the edge.
            with httpx.Client(base_url=f"http://{self.address}", timeout=10) as http:
                said += [http.post(INFER, json={}) for _ in range(min(10, count - len(said)))]
        return [(a.status_code, a.headers.get("x-revision", a.text)) for a in said]

    def servers(self, name: str) -> int:
        return len(self.revisions.pages(name))

    def kill(self, name: str) -> None:
        for pod in pods.of(self.client, "retail", name):
            self._kubectl.run(
                "delete",
                "pod",
                pod.metadata.name,
                "-n",
                self.namespace,
                "--force",
                "--grace-period=0",
            )


@pytest.fixture(scope="module")
def bench(
    kubectl: Any, spaces: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StandardBench]:
    namespace = spaces("standard")
    client = kube.connect(namespace)
    made = StandardBench(client, namespace, kubectl, tmp_path_factory.mktemp("standard"))
    with xds.Server(made.engine, made.host, made.port):
        made.install()
        until(lambda: len(made.edges()) == EDGES, 120)
        if not made.traffic.is_live():
            pytest.skip("addresses of pods cannot be reached from here")
        yield made
    made.close()
    made.engine.dispose()
    client.close()


def until(is_so: Callable[[], object], seconds: float) -> None:
    limit = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < limit, "it did not come about in time"
        time.sleep(0.2)


class TestStandard(TrafficContract):
    """Two Envoys in pods before the Services of KServe."""


suite = TrafficContract()


@pytest.fixture
def pair(bench: StandardBench) -> Iterator[tuple[str, str]]:
    """Two revisions that are ready, the first with all requests."""
    stable = suite.served(bench) or suite.serve_first(bench)
    new = suite.bring_up(bench)
    yield stable, new
    suite.split(bench, {suite.served(bench) or stable: 100})
    suite.drive(bench, lambda: bench.revisions.stop(new))


def test_grpc_goes_through_the_edge_with_the_same_split(bench, pair):
    stable, new = pair
    suite.split(bench, {stable: 50, new: 50})

    with grpc.insecure_channel(f"{bench.address}:80") as channel:
        call = channel.unary_unary(f"/{GRPC_SERVICE}/ModelInfer")
        said = Counter(call(b"", timeout=5).decode() for _ in range(60))

    assert set(said) == {stable, new}


def test_evidence_is_the_sum_of_all_edges(bench, pair):
    stable, new = pair
    suite.split(bench, {stable: 50, new: 50})
    assert len(bench.edges()) == EDGES
    suite.look(bench, f"{new}.sum", new, stable)

    asked = Counter(name for _, name in bench.ask(200))

    found = suite.look(bench, f"{new}.sum", new, stable)
    assert (found.canary.requests, found.stable.requests) == (asked[new], asked[stable])


def test_an_edge_that_is_killed_under_traffic_comes_back_with_the_split_of_now(bench, pair):
    stable, new = pair
    suite.split(bench, {stable: 50, new: 50})
    killed, *_ = bench.client.list(Pod, labels={standard.COMPONENT: standard.EDGE})

    bench._kubectl.run("delete", "pod", killed.metadata.name, "-n", bench.namespace, "--wait=false")
    suite.split(bench, {stable: 100})
    until(lambda: len(bench.edges()) == EDGES, 60)
    until(lambda: killed.metadata.name not in str(bench.edges()), 60)

    assert suite.answers(bench, 200) == {stable: 200}


def test_an_edge_drains_so_that_no_client_is_cut_off(bench, pair):
    stable, new = pair
    suite.split(bench, {stable: 50, new: 50})

    with suite.clients(bench) as said:
        bench._kubectl.run("rollout", "restart", "deployment/edge", "-n", bench.namespace)
        bench._kubectl.run("rollout", "status", "deployment/edge", "-n", bench.namespace)
        until(lambda: len(bench.edges()) == EDGES, 60)

    assert {status for status, _ in said} == {200}


def test_a_revision_that_somebody_deleted_is_told_and_can_be_left(bench, pair):
    stable, new = pair
    suite.split(bench, {stable: 90, new: 10})
    name = standard.service_name("retail", new)

    bench._kubectl.run("delete", "isvc", name, "-n", bench.namespace)

    assert bench.revisions.died(new) == f"InferenceService {name} was deleted"
    suite.split(bench, {stable: 100})
    assert suite.answers(bench, 60) == {stable: 60}


def test_what_a_revision_waits_for_is_told(bench, pair):
    stable, _ = pair
    state = bench.state()
    document = bench.document(state)
    document["spec"]["predictor"]["containers"][0]["image"] = "dev.local/nosuch:1"
    revisions = standard.StandardRevisions(
        bench.client, "retail", lambda _: document, bench.traffic, lambda: state
    )

    suite.drive(bench, lambda: revisions.start(state))

    def is_told() -> bool:
        try:
            return revisions.ready(plan.name(state))
        except Unavailable as exc:
            return "kserve-container ErrImagePull" in str(exc) or "ImagePullBackOff" in str(exc)

    until(is_told, 60)
    assert plan.name(state) not in bench.traffic._revisions
    assert suite.answers(bench, 30) == {stable: 30}
    assert revisions.edits() == []
    document["spec"]["predictor"]["minReplicas"] = 0
    said = "spec.predictor.minReplicas is 1, applied was 0"
    name = standard.service_name("retail", plan.name(state))
    assert revisions.edits() == [f"InferenceService {name}: {said}"]
    revisions.stop(plan.name(state))
    revisions.close()


def test_starting_twice_means_once(bench, pair):
    stable, new = pair
    state = rollout(int(new[1:]))

    bench.revisions.start(state)

    assert sorted(bench.revisions.names()) == sorted([stable, new])


def test_the_edge_has_the_labels_that_the_operator_looks_for(bench):
    deployment = bench.client.get(Deployment, "edge")

    assert deployment.spec.template.metadata.labels["perennial.dev/project"] == "retail"


@dataclass(frozen=True)
class Subject:
    name: str = "retail"
    rollout: Rollout = Rollout(
        steps=(10, 100), min_requests=20, deadline_s=90, max_p95_ms=5000, max_p95_ratio=50
    )


class Clock:
    def monotonic(self) -> float:
        return time.monotonic()

    def now(self) -> datetime:
        return datetime.now(UTC)


def new_controller(bench: StandardBench) -> Controller:
    adapters = bench.traffic, bench.evidence, bench.revisions
    return Controller(Subject(), bench.engine, Ledger(bench.engine), *adapters, Clock())


def wished(bench: StandardBench, state: RolloutState) -> RolloutState:
    return rollouts.wish(
        bench.engine,
        project="retail",
        version=state.version,
        digest=state.digest,
        bundle_uri="s3://bucket/retail",
        run_id=state.run_id,
    )


def decided(bench: StandardBench, wish: RolloutState) -> tuple[RolloutState, set[int]]:
    """Its end and the shares it was seen with; the controller is killed after each move."""
    controller = new_controller(bench)
    shares, last = set(), (Phase.WISHED, -1)
    while not (now := rollouts.get(bench.engine, wish.id)).phase.over:
        controller.tick()
        shares.add(bench.traffic.weights().get(plan.name(wish), 0))
        moved = rollouts.get(bench.engine, wish.id)
        if (moved.phase, moved.step) != last:
            last = (moved.phase, moved.step)
            bench.restart()
            controller = new_controller(bench)
        time.sleep(0.5)
    suite.until(bench, lambda: controller.tick() or controller.settled)
    return now, shares


def test_a_good_revision_comes_to_all_and_a_bad_one_is_taken_back_by_a_controller_that_is_killed(
    bench, pair
):
    stable, _ = pair
    serves = wished(bench, rollout(int(stable[1:])))
    rollouts.save(bench.engine, replace(serves, phase=Phase.PROMOTED, weight=100))
    rollouts.set_serving(bench.engine, "retail", serves.id)

    with suite.clients(bench) as said:
        good, shares = decided(bench, wished(bench, bench.state()))
    assert (good.phase, shares) == (Phase.PROMOTED, {0, 10, 100}), good.reason
    assert {status for status, _ in said} == {200}

    with suite.clients(bench) as said:
        bad, shares = decided(bench, wished(bench, bench.state(ERRORS)))
    assert (bad.phase, shares) == (Phase.ROLLED_BACK, {0, 10}), bad.reason
    assert "server error" in bad.reason
    assert suite.answers(bench, 200) == {plan.name(good): 200}
    assert plan.name(bad) not in bench.revisions.names()
