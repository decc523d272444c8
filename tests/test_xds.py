"""Several Envoys that ask for their configuration: what each takes, and what it does alone."""

import json
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from adapters import TrafficContract
from edges import EdgeBench, ended, envoy, free_ports, wait_until
from sqlalchemy import Engine
from starlette.testclient import TestClient

from perennial.errors import Unavailable
from perennial.records import ArmTraffic
from perennial.rollout import edge, edgepod, operator, xds
from perennial.rollout.evidence import NOTHING, Counters, EnvoyEvidence
from perennial.store import edges
from perennial.store.engine import make_engine

HOLD_S = 1.0


class Cluster:
    """A database, an operator's server, and Envoys that share a port as pods share a Service."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engine = make_engine(f"sqlite:///{folder}/state.db")
        self.port, self.xds_port = free_ports(2)
        self.way = xds.Rows(self.engine, "retail", lambda: self.urls, self.port)
        self.urls: dict[str, str] = {}
        self.processes = {}
        self.served: xds.Server | None = None

    def serve(self) -> None:
        self.served = xds.Server(self.engine, "127.0.0.1", self.xds_port, HOLD_S)
        self.served.__enter__()

    def leave(self) -> None:
        if self.served:
            self.served.__exit__()
        self.served = None

    def start(self, name: str) -> None:
        admin, stats = free_ports(2)
        pod = edge.Pod("retail", name, ("127.0.0.1", self.xds_port), admin, stats)
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(edge.pod_bootstrap(pod)))
        self.processes[name] = envoy(file)
        self.urls[name] = f"http://127.0.0.1:{stats}"

    def end(self, name: str) -> None:
        del self.urls[name]
        ended(self.processes.pop(name))

    def is_ready(self, name: str) -> bool:
        try:
            return httpx.get(f"{self.urls[name]}/ready").status_code == 200
        except httpx.HTTPError:
            return False

    def close(self) -> None:
        for name in list(self.processes):
            self.end(name)
        self.leave()
        self.engine.dispose()


def started(folder: Path) -> tuple[Cluster, EdgeBench]:
    cluster = Cluster(folder)
    bench = EdgeBench(cluster.way, cluster.port)
    cluster.serve()
    cluster.start("one")
    cluster.start("two")
    wait_until(bench.traffic.is_live)
    return cluster, bench


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeBench]:
    cluster, bench = started(tmp_path_factory.mktemp("xds"))
    yield bench
    bench.close()
    cluster.close()


class TestXds(TrafficContract):
    """Two Envoys that ask an operator."""


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Cluster, EdgeBench]]:
    """Two Envoys with v1 at 90 and v2 at 10 percent."""
    cluster, bench = started(tmp_path)
    for _ in range(2):
        bench.revisions.start(bench.state())
    bench.traffic.set_weights({"v1": 90, "v2": 10})
    yield cluster, bench
    bench.close()
    cluster.close()


def answered(bench: EdgeBench, count: int = 50) -> Counter[str]:
    said = bench.ask(count)
    assert {status for status, _ in said} == {200}
    return Counter(name for _, name in said)


def requests_by_edge(cluster: Cluster) -> dict[str, int]:
    """Requests of clients that each Envoy took."""
    wanted = {"filter": r"^http\.edge\.downstream_rq_total$"}
    pages = {n: httpx.get(f"{u}/stats", params=wanted).text for n, u in cluster.urls.items()}
    return {name: int(page.rpartition(" ")[2]) for name, page in pages.items()}


def test_both_envoys_answer_and_evidence_is_their_sum(two):
    cluster, bench = two
    before = requests_by_edge(cluster)
    bench.traffic.set_weights({"v1": 50, "v2": 50})
    bench.evidence.look("2.0", "v2", "v1")

    asked = Counter(name for _ in range(30) for name in answered(bench, 4).elements())

    took = {name: now - before[name] for name, now in requests_by_edge(cluster).items()}
    evidence = bench.evidence.look("2.0", "v2", "v1")
    assert min(took.values()) > 0
    assert sum(took.values()) == 120
    assert (evidence.canary.requests, evidence.stable.requests) == (asked["v2"], asked["v1"])
    assert evidence.canary.p95_ms > 0


def test_without_an_operator_the_split_stays_and_weights_are_not_said_to_hold(two):
    cluster, bench = two
    cluster.leave()

    with pytest.raises(Unavailable, match="silent about a new rds"):
        bench.traffic.set_weights({"v1": 100})
    assert bench.traffic.weights() == {}
    assert answered(bench, 200)["v2"] > 0

    cluster.serve()
    bench.traffic.set_weights({"v1": 100})
    assert bench.traffic.weights() == {"v1": 100}
    assert answered(bench, 200) == {"v1": 200}


def test_an_envoy_that_starts_takes_what_is_wished_now(two):
    cluster, bench = two
    cluster.end("one")
    bench.traffic.set_weights({"v2": 100})

    cluster.start("one")
    wait_until(lambda: cluster.is_ready("one"))
    cluster.end("two")

    assert answered(bench) == {"v2": 50}


@pytest.mark.slow
def test_an_envoy_that_was_told_nothing_yet_is_not_ready(two):
    cluster, bench = two
    cluster.leave()
    cluster.start("three")
    # Envoy would give up waiting 15 s for each of two documents, and call that ready.
    with pytest.raises(AssertionError):
        wait_until(lambda: cluster.is_ready("three"), 33)
    with pytest.raises(Unavailable, match="does not answer .three."):
        bench.traffic.set_weights({"v1": 100})

    cluster.serve()
    wait_until(lambda: cluster.is_ready("three"))

    bench.traffic.set_weights({"v1": 100})
    assert answered(bench, 200) == {"v1": 200}


def test_a_way_back_reaches_every_envoy_that_answers_even_when_one_is_silent(two):
    cluster, bench = two
    cluster.urls["gone"] = "http://127.0.0.1:1"

    with pytest.raises(Unavailable, match="does not answer .gone."):
        bench.traffic.set_weights({"v1": 100})
    del cluster.urls["gone"]
    wait_until(lambda: answered(bench, 100) == {"v1": 100})

    bench.traffic.set_weights({"v1": 100})
    assert bench.traffic.weights() == {"v1": 100}


def test_with_no_envoy_at_all_nothing_holds_but_the_wish_is_kept(two):
    cluster, bench = two
    for name in ("one", "two"):
        cluster.end(name)

    with pytest.raises(Unavailable, match="none runs"):
        bench.traffic.set_weights({"v1": 100})

    cluster.start("three")
    wait_until(lambda: cluster.is_ready("three"))
    assert answered(bench) == {"v1": 50}


def test_what_one_envoy_refuses_is_taken_back_from_all(two):
    cluster, bench = two
    bench.traffic._revisions["v9"] = edge.Ports(1, 1)

    with pytest.raises(Unavailable, match="refused a new rds"):
        bench.traffic.set_weights({"v9": 100})
    cluster.start("three")
    wait_until(lambda: cluster.is_ready("three"))

    assert set(answered(bench, 200)) == {"v1", "v2"}
    bench.traffic.set_weights({"v2": 100})
    assert answered(bench) == {"v2": 50}


def test_an_envoy_that_begins_anew_is_missing_numbers(two):
    cluster, bench = two
    bench.traffic.set_weights({"v1": 50, "v2": 50})
    bench.evidence.look("2.0", "v2", "v1")
    answered(bench)

    cluster.end("one")
    cluster.start("uno")
    wait_until(lambda: cluster.is_ready("uno"))

    assert bench.evidence.look("2.0", "v2", "v1").canary is None
    answered(bench)
    assert 0 < bench.evidence.look("2.0", "v2", "v1").canary.requests < 50


def test_the_statistics_can_be_read_and_nothing_else(two):
    cluster, _ = two
    url = cluster.urls["one"]

    assert httpx.get(f"{url}/stats").status_code == 200
    assert "\nenvoy_cluster_upstream_rq_total{" in httpx.get(f"{url}/stats/prometheus").text
    assert httpx.post(f"{url}/stats").status_code == 404
    for path in ("/quitquitquit", "/config_dump", "/stats/../quitquitquit", "/stats/recentlookups"):
        assert httpx.post(f"{url}{path}").status_code == 404
        assert httpx.get(f"{url}{path}").status_code == 404


def test_only_statistics_and_clients_have_a_door_to_a_pod():
    pod = edge.pod_bootstrap(edge.Pod("retail", "x", ("operator", 8081)))
    rows = edge.listener(edge.operator_source, edge.POD_PORT, edge.ANYWHERE)

    assert pod["admin"]["address"]["socket_address"]["address"] == "127.0.0.1"
    assert rows["address"]["socket_address"]["address"] == "0.0.0.0"


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = make_engine(f"sqlite:///{tmp_path}/state.db")
    yield engine
    engine.dispose()


def asked(engine: Engine, kind: str = "routes", **body: object) -> httpx.Response:
    with TestClient(xds.app(engine, hold_s=0.3)) as client:
        return client.post(f"/v3/discovery:{kind}", json=body)


def test_an_envoy_hears_of_its_own_project_only(engine):
    edges.write(engine, "retail", edge.RDS, "a", '{"version_info": "a"}')
    edges.write(engine, "bank", edge.RDS, "b", '{"version_info": "b"}')

    assert asked(engine, node={"cluster": "retail"}).json() == {"version_info": "a"}
    assert asked(engine, node={"cluster": "bank"}).json() == {"version_info": "b"}


def test_what_an_envoy_has_already_is_no_news(engine):
    edges.write(engine, "retail", edge.RDS, "a", "{}")

    assert asked(engine, node={"cluster": "retail"}, version_info="a").status_code == 304


def test_a_lost_configuration_is_no_empty_one(engine):
    assert asked(engine, node={"cluster": "retail"}).status_code == 304
    assert asked(engine, node={"cluster": "retail"}, version_info="a").status_code == 503


@pytest.mark.parametrize(
    ("kind", "body"), [("secrets", {"node": {"cluster": "retail"}}), ("routes", {})]
)
def test_a_question_that_is_none_is_refused(engine, kind, body):
    assert asked(engine, kind, **body).status_code == 404


def test_a_port_that_is_taken_is_told(engine):
    port = free_ports(1)[0]

    with (
        xds.Server(engine, "127.0.0.1", port),
        pytest.raises(Unavailable, match=f"cannot serve the edge's configuration on .*{port}"),
    ):
        xds.Server(engine, "127.0.0.1", port).__enter__()


def counted(**numbers: int) -> Counters:
    return replace(NOTHING, **numbers)


class Pages:
    """What edges and servers count, as their pages would tell it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.edges: dict[str, Counters | None] = {}
        self.servers: dict[str, Counters | None] = {}
        self.source = EnvoyEvidence("retail", lambda: self.urls(self.edges), self.pages)
        monkeypatch.setattr(self.source, "_seen", lambda key, _: self.edges[key])
        monkeypatch.setattr(self.source, "_told", lambda key: self.servers[key])

    def urls(self, found: dict[str, Counters | None]) -> dict[str, str]:
        return {key: key for key in found}

    def pages(self, _revision: str) -> dict[str, str]:
        return self.urls(self.servers)

    def canary(self) -> ArmTraffic | None:
        return self.source.look("1.0", "v2", "v1").canary


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pages]:
    pages = Pages(monkeypatch)
    pages.edges = {"a": counted(good=100), "b": counted(good=50)}
    pages.servers = {"x": counted(invalid_outputs=7)}
    assert pages.canary().requests == 0
    yield pages
    pages.source.close()


def test_what_all_edges_and_servers_added_is_summed(told):
    told.edges = {"a": counted(good=110), "b": counted(good=55, server_errors=2)}
    told.servers = {"x": counted(invalid_outputs=8)}

    canary = told.canary()

    assert (canary.requests, canary.server_errors, canary.invalid_outputs) == (17, 2, 1)


def test_an_edge_that_is_silent_is_missing_numbers(told):
    told.edges["b"] = None

    assert told.canary() is None


@pytest.mark.parametrize("gone", ["edges", "servers"])
def test_without_any_edge_or_server_there_are_no_numbers(told, gone):
    setattr(told, gone, {})

    assert told.canary() is None


def test_one_that_vanished_holds_once_and_the_others_are_counted_from_there(told):
    told.edges = {"a": counted(good=150)}
    assert told.canary() is None
    told.edges = {"a": counted(good=160)}

    assert told.canary().requests == 10


def test_one_that_came_is_counted_from_the_first_look_at_it(told):
    told.edges["c"] = counted(good=30, server_errors=3)
    assert told.canary().requests == 0
    told.edges["c"] = counted(good=40, server_errors=3)

    assert (told.canary().requests, told.canary().server_errors) == (10, 0)


def test_a_counter_that_fell_is_seen_even_above_where_the_step_began(told):
    told.edges["b"] = counted(good=90)
    assert told.canary().requests == 40
    told.edges["b"] = counted(good=60)

    assert told.canary() is None
    assert told.canary().requests == 0


def test_a_restarted_controller_finds_the_revisions_in_what_it_wrote():
    known = {
        "v1": edge.Ports(80, 8081, "10.0.0.1"),
        "v22": edge.Ports(8080, 8081, "retail-v22-predictor.perennial.svc"),
    }

    made = edge.clusters("retail", known)

    assert edge.revisions("retail", made) == known
    assert {c["type"] for c in made if "v22" in c["name"]} == {"STRICT_DNS"}
    assert {c["type"] for c in made if "v1" in c["name"]} == {"STATIC"}


def test_a_pod_of_the_edge_becomes_envoy_with_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    command = edgepod.envoy("retail", "operator:8081", tmp_path)

    config = json.loads((tmp_path / edge.BOOTSTRAP).read_text())
    operator = config["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]
    address = operator["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert command[:3] == ["/usr/bin/envoy", "-c", str(tmp_path / edge.BOOTSTRAP)]
    assert config["node"] == {"id": socket.gethostname(), "cluster": "retail"}
    assert address == {"address": "operator", "port_value": 8081}


@pytest.mark.parametrize("operator", ["operator", "operator:", ":8081", ""])
def test_an_operator_without_a_port_is_told(operator, tmp_path, capsys):
    words = ["--project=retail", f"--operator={operator}", f"--folder={tmp_path}"]

    assert edgepod.main(words) == 2
    assert capsys.readouterr().err == f"--operator is {operator!r}, wanted host:port\n"


def test_an_image_without_envoy_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))

    assert edgepod.main(["--project=retail", f"--folder={tmp_path}"]) == 2
    assert "no envoy on PATH" in capsys.readouterr().err


def test_draining_an_envoy_that_is_gone_says_so(capsys):
    assert edgepod.main(["--drain"]) == 3
    assert "Envoy does not answer" in capsys.readouterr().err


def test_a_server_that_leaves_lets_nobody_wait(engine, caplog):
    port = free_ports(1)[0]
    question = {"node": {"cluster": "retail"}}

    with futures.ThreadPoolExecutor(1) as pool, httpx.Client(timeout=30) as client:
        with xds.Server(engine, "127.0.0.1", port):
            url = f"http://127.0.0.1:{port}/v3/discovery:routes"
            held = pool.submit(client.post, url, json=question)
            time.sleep(0.5)
            began = time.monotonic()
        assert held.result().status_code == 304

    assert time.monotonic() - began < 5
    assert caplog.records == []


def test_the_operator_is_unwell_when_its_discovery_service_ended(engine):
    port, health_port = free_ports(2)
    health = operator.Health()

    def asked() -> int:
        return httpx.get(f"http://127.0.0.1:{health_port}/healthz", trust_env=False).status_code

    with health.told("127.0.0.1", health_port):
        with xds.Server(engine, "127.0.0.1", port) as server:
            health.depends_on(server.is_alive)
            assert asked() == 200
        assert asked() == 503
