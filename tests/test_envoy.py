"""The edge, by a real Envoy before small servers: shares, guard, and what it counts."""

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from adapters import TrafficContract
from edges import (
    CALL,
    INFER,
    Edge,
    EdgeBench,
    Handler,
    Server,
    ended,
    envoy,
    free_ports,
    metrics,
    running_edge,
    split,
    wait_until,
)

from perennial.errors import Unavailable
from perennial.records import Evidence
from perennial.rollout import edge
from perennial.rollout.envoy import Files
from perennial.rollout.evidence import Counters


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Edge]:
    with running_edge(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with running_edge(tmp_path_factory.mktemp("edge")) as found:
        found.traffic.set_weights({"v1": 100})
        yield found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EdgeBench]:
    port, admin = free_ports(2)
    way = Files(tmp_path_factory.mktemp("contract"), port, admin)
    bench = EdgeBench(way, port)
    process = envoy(way.bootstrap())
    wait_until(bench.traffic.is_live)
    yield bench
    bench.close()
    ended(process)


class TestFiles(TrafficContract):
    """The one Envoy of a machine, told by files."""


def test_before_any_model_serves_the_edge_says_so(live):
    answer = live.infer(1)[0]

    assert (answer.status_code, answer.json()) == (503, {"error": "no model serves yet"})
    assert httpx.get(f"{live.url}/anything").status_code == 404


def test_requests_are_split_by_weight_and_told_who_answered(live):
    live.traffic.set_weights({"v1": 90, "v2": 10})
    counted = split(live.infer(1000))
    assert 60 <= counted["v2"] <= 140
    assert counted.total() == 1000

    live.traffic.set_weights({"v1": 0, "v2": 100})
    assert split(live.infer(50)) == {"v2": 50}
    assert live.traffic.weights() == {"v2": 100}


def test_no_request_fails_while_weights_change(live):
    live.traffic.set_weights({"v1": 100})
    with futures.ThreadPoolExecutor(1) as pool:
        answers = pool.submit(live.infer, 1500)
        for percent in (10, 50, 100, 0, 30):
            live.traffic.set_weights({"v1": 100 - percent, "v2": percent})
            time.sleep(0.05)

    assert split(answers.result()).total() == 1500


def test_grpc_goes_through_the_same_port_and_the_same_split(live):
    live.traffic.set_weights({"v2": 100})

    assert live.call(b"hello") == [b"hello"]


def test_an_unknown_revision_is_refused_and_the_old_split_stays(live):
    live.traffic.set_weights({"v1": 100})

    with pytest.raises(Unavailable, match="unknown revisions: \\['v9'\\]"):
        live.traffic.set_weights({"v1": 50, "v9": 50})
    live.traffic._revisions["v9"] = edge.Ports(1, 1)
    with pytest.raises(Unavailable, match=re.escape("Envoy refused a new rds.json")):
        live.traffic.set_weights({"v1": 50, "v9": 50})

    assert split(live.infer(50)) == {"v1": 50}
    live.traffic.set_weights({"v1": 50, "v2": 50})
    assert set(split(live.infer(50))) == {"v1", "v2"}


def test_an_edge_that_is_gone_is_unavailable(live):
    live.process.terminate()
    live.process.wait(10)

    with pytest.raises(Unavailable, match="the edge does not answer"):
        live.traffic.set_weights({"v1": 100})
    assert live.traffic.weights() == {}


def test_a_dead_canary_costs_no_client_an_answer_and_counts_as_its_fault(live):
    live.traffic.set_weights({"v1": 50, "v2": 50})
    source = live.evidence()
    source.look("1.0", "v2", "v1")
    page = live.revisions["v2"].rest.server_port
    live.revisions["v2"].stop()

    answers = live.infer(60)

    assert split(answers) == {"v1": 60}
    with serving_metrics(page):
        canary = source.look("1.0", "v2", "v1").canary
    assert canary.server_errors >= 10
    live.revisions.pop("v2")


def test_a_canary_that_goes_with_a_request_in_hand_costs_no_client_an_answer(live):
    live.traffic.set_weights({"v1": 50, "v2": 50})
    live.revisions["v2"].rest.drops = True

    assert split(live.infer(60)) == {"v1": 60}


def test_an_answer_is_never_asked_for_twice_however_bad_it_is(live):
    live.traffic.set_weights({"v1": 50, "v2": 50})

    canary = looked(live, lambda: live.infer(40, status=503))

    assert canary.canary.requests + canary.stable.requests == 40


@contextmanager
def serving_metrics(port: int) -> Iterator[None]:
    server = Server(("127.0.0.1", port), Handler)
    server.metrics = metrics(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield
    server.shutdown()
    server.server_close()


def test_a_revision_can_be_forgotten_and_added_anew(live):
    live.traffic.set_weights({"v1": 100})
    live.traffic.remove("v2")
    assert "v2" not in live.way.read(edge.CDS)

    live.traffic.add("v3", edge.Ports(live.revisions["v2"].rest.server_port, 1))
    live.traffic.set_weights({"v3": 100})

    assert split(live.infer(20)) == {"v3": 20}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/health/live", 200),
        ("GET", "/v2/health/ready", 200),
        ("GET", "/v2/models/retail", 200),
        ("GET", "/v2/models/retail/ready", 200),
        ("POST", "/v2/repository/models/retail/unload", 404),
        ("POST", "/v2/models/retail/../../repository/models/retail/unload", 404),
        ("POST", "/v2/%2e%2e/v2/repository/models/retail/unload", 404),
        ("POST", "/v2/models%2fretail/infer", 400),
        ("POST", "//v2/repository/models/retail/unload", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("POST", "/v1/models/retail:predict", 404),
        ("POST", CALL, 404),
        ("GET", "/metrics", 404),
        ("GET", "/", 404),
    ],
)
def test_only_the_allowed_paths_reach_a_server(shared, method, path, status):
    target = httpx.URL(shared.url, raw_path=path.encode())

    assert httpx.request(method, target).status_code == status


def test_the_guard_answers_before_a_server_is_asked(shared):
    def post(**request: object) -> int:
        return httpx.post(f"{shared.url}{INFER}", **request).status_code

    assert post(content=b"x" * (edge.MAX_BODY + 1)) == 413
    assert post(content=(b"x" * 65536 for _ in range(20))) == 413
    assert post(json={}, headers={"under_score": "1"}) == 400
    assert post(json={}, headers={"long": "x" * 20_000}) == 431
    assert post(json={}) == 200


def test_only_the_calls_of_the_inference_protocol_reach_a_grpc_server(shared):
    service = f"/{edge.GRPC_SERVICE}"
    refused = [f"{service}/RepositoryModelUnload", "/other.Service/ModelInfer"]

    assert [shared.call(b"x", path=p) for p in refused] == [[grpc.StatusCode.UNIMPLEMENTED]] * 2
    assert shared.call(b"x") == [b"x"]


def test_a_slow_head_is_cut_off(shared):
    with socket.create_connection(("127.0.0.1", shared.port), timeout=10) as client:
        client.sendall(b"POST /v2/models/retail/infer HTTP/1.1\r\nhost: x\r\n")
        started = time.monotonic()
        said = client.recv(4096)

    assert b" 408 " in said.splitlines()[0] + b" "
    assert 4 < time.monotonic() - started < 8


def test_the_listeners_bind_loopback_only(shared):
    source = edge.folder_source(Path("x"))
    config = json.dumps(edge.listener(source, 1)) + json.dumps(edge.bootstrap(source, 2))

    assert set(re.findall(r'"address": "([^"]+)"', config)) == {"127.0.0.1"}


def looked(live: Edge, send: Callable[[], object]) -> Evidence:
    """Evidence of what ``send`` does while both revisions have traffic."""
    source = live.evidence()
    source.look("1.0", "v2", "v1")
    send()
    return source.look("1.0", "v2", "v1")


def test_evidence_counts_only_what_came_since_the_step_began(live):
    live.traffic.set_weights({"v2": 100})
    live.infer(20, status=500)
    source = live.evidence()

    first = source.look("1.0", "v2", "v1")
    live.infer(40)
    second = source.look("1.0", "v2", "v1")
    third = source.look("1.1", "v2", "v1")

    assert [e.canary.requests for e in (first, second, third)] == [0, 40, 0]
    assert second.canary.server_errors == 0
    assert second.stable.requests == 0
    assert second.age_s < 1


def test_evidence_tells_a_servers_errors_from_a_clients(live):
    live.traffic.set_weights({"v2": 100})

    def send():
        live.infer(30)
        live.infer(5, status=500)
        live.infer(25, status=400)

    canary = looked(live, send).canary

    assert (canary.requests, canary.server_errors) == (35, 5)


def test_evidence_counts_grpc_by_its_own_status(live):
    live.traffic.set_weights({"v2": 100})

    canary = looked(live, lambda: live.call(*[b"x"] * 10, *[b"2"] * 3, *[b"3"] * 4)).canary

    assert (canary.requests, canary.server_errors) == (13, 3)


def test_probes_are_no_evidence(live):
    live.traffic.set_weights({"v2": 100})

    def send():
        for path in ("/v2/health/ready", "/v2/models/retail"):
            assert httpx.get(f"{live.url}{path}").headers["x-revision"] == "v2"

    assert looked(live, send).canary.requests == 0


def test_evidence_measures_latency_of_this_step_only(live):
    live.traffic.set_weights({"v2": 100})
    live.infer(20, sleep_s=0.1)

    fast = looked(live, lambda: live.infer(30)).canary.p95_ms
    slow = looked(live, lambda: live.infer(20, sleep_s=0.1)).canary.p95_ms

    assert fast < 90
    assert 100 <= slow <= 200


def test_evidence_counts_invalid_outputs_of_the_server(live):
    live.traffic.set_weights({"v2": 100})

    def send():
        live.infer(30)
        live.revisions["v2"].rest.metrics = metrics(2)

    assert looked(live, send).canary.invalid_outputs == 2


@pytest.mark.parametrize("page", ["", "other_total 3\n"])
def test_a_metrics_page_without_the_counter_is_no_evidence(live, page):
    live.traffic.set_weights({"v2": 100})
    live.revisions["v2"].rest.metrics = page

    assert looked(live, lambda: live.infer(30)).canary is None


def test_a_server_that_counts_anew_holds_once_and_is_then_counted_from_there(live):
    live.traffic.set_weights({"v2": 100})
    live.revisions["v2"].rest.metrics = metrics(5)
    source = live.evidence()
    source.look("1.0", "v2", "v1")
    live.infer(30)

    live.revisions["v2"].rest.metrics = metrics(0)
    assert source.look("1.0", "v2", "v1").canary is None
    live.infer(10)

    assert source.look("1.0", "v2", "v1").canary.requests == 10


def test_an_edge_that_is_gone_gives_no_evidence_and_its_age_grows(live):
    live.traffic.set_weights({"v2": 100})
    source = live.evidence()
    source.look("1.0", "v2", "v1")
    live.process.terminate()
    live.process.wait(10)
    time.sleep(0.2)

    evidence = source.look("1.0", "v2", "v1")

    assert (evidence.canary, evidence.stable) == (None, None)
    assert evidence.age_s >= 0.2


def test_a_flood_that_the_edge_turns_away_is_no_fault_of_the_model(live):
    live.traffic.set_weights({"v2": 100})

    def send():
        limits = httpx.Limits(max_connections=200)
        with (
            httpx.Client(base_url=live.url, limits=limits, timeout=10) as client,
            futures.ThreadPoolExecutor(200) as pool,
        ):
            sent = [pool.submit(client.post, INFER, json={"sleep_s": 1.5}) for _ in range(200)]
        statuses = Counter(s.result().status_code for s in sent)
        assert statuses[503] > 10

    canary = looked(live, send).canary

    assert canary.requests >= 64
    assert canary.server_errors == 0


def test_the_p95_lies_between_the_bounds_of_its_bucket():
    index = edge.LATENCY_BOUNDS_MS.index(50)
    latency = tuple(100 if i >= index else 90 if i == index - 1 else 0
                    for i in range(len(edge.LATENCY_BOUNDS_MS)))  # fmt: skip
    counted = Counters(100, 0, 0, 0, latency)

    assert counted.p95_ms == pytest.approx(45.0)


def test_latencies_that_lag_far_behind_are_not_taken_for_all():
    latency = tuple([50] * len(edge.LATENCY_BOUNDS_MS))

    assert Counters(100, 0, 0, 0, latency).p95_ms is None
    assert Counters(60, 0, 0, 0, latency).p95_ms is not None
