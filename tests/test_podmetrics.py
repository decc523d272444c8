"""Evidence from the metrics pages of pods."""

import httpx
import pytest

from perennial.records import LATENCY_BOUNDS_MS
from perennial.rollout.podmetrics import PodEvidence, read


def page(ok=0, client=0, model=0, platform=0, ms=9.0) -> str:
    causes = {"ok": ok, "client": client, "model": model, "platform": platform}
    lines = [
        f'perennial_requests_total{{cause="{c}",model_name="m"}} {n}.0' for c, n in causes.items()
    ]
    below = {b: float((ok + model + platform) * (b >= ms)) for b in LATENCY_BOUNDS_MS}
    lines += [
        f'perennial_request_seconds_bucket{{le="{b / 1000}",model_name="m"}} {count}'
        for b, count in below.items()
    ]
    return "\n".join(["# TYPE x counter", *lines, ""])


class Pods:
    """Pages of pods, by name of the revision and key of the pod."""

    def __init__(self) -> None:
        self.pages: dict[str, dict[str, str]] = {"v2": {"a/0": page()}, "v1": {"b/0": page()}}
        self.shares = {"v1": 90, "v2": 10}

    def urls(self, revision: str) -> dict[str, str]:
        return {key: f"http://pod/{revision}/{key}" for key in self.pages[revision]}

    def answer(self, request: httpx.Request) -> httpx.Response:
        _, revision, key = request.url.path.split("/", 2)
        return httpx.Response(200, text=self.pages[revision][key])

    def evidence(self) -> PodEvidence:
        made = PodEvidence("m", self.urls, lambda: self.shares)
        made._http = httpx.Client(transport=httpx.MockTransport(self.answer))
        return made


@pytest.fixture
def pods() -> Pods:
    return Pods()


@pytest.fixture
def evidence(pods):
    made = pods.evidence()
    yield made
    made.close()


def test_our_own_servers_write_pages_that_are_read(root):
    """The names in the page are those of serving.service."""
    source = (root / "src/perennial/serving/service.py").read_text()

    assert '"perennial_requests"' in source and '"perennial_request_seconds"' in source


def test_what_a_client_got_wrong_is_no_evidence(pods, evidence):
    evidence.look("1.0", "v2", "v1")
    pods.pages["v2"]["a/0"] = page(ok=40, client=500, model=2, platform=3)

    canary = evidence.look("1.0", "v2", "v1").canary

    assert (canary.requests, canary.server_errors, canary.invalid_outputs) == (45, 5, 2)
    assert 8 < canary.p95_ms <= 10


def test_pods_are_summed_and_a_new_one_counts_from_its_first_look(pods, evidence):
    pods.pages["v2"]["a/0"] = page(ok=7)
    evidence.look("1.0", "v2", "v1")
    pods.pages["v2"] = {"a/0": page(ok=17), "c/0": page(ok=5)}
    evidence.look("1.0", "v2", "v1")
    pods.pages["v2"] = {"a/0": page(ok=27), "c/0": page(ok=9)}

    assert evidence.look("1.0", "v2", "v1").canary.requests == 20 + 4


@pytest.mark.parametrize(
    "after",
    [
        pytest.param({}, id="vanished"),
        pytest.param({"a/1": page(ok=3)}, id="began anew"),
        pytest.param({"a/0": page(ok=3)}, id="counts backwards"),
        pytest.param({"a/0": "# no page of ours"}, id="tells nothing"),
        pytest.param(
            {"a/0": page(ok=12).replace('le="0.001"', 'le="0.0015"')}, id="tells of other bounds"
        ),
        pytest.param({"a/0": page(ok=12).replace("cause=", "why=")}, id="tells no cause"),
    ],
)
def test_a_pod_that_vanished_or_began_anew_is_missing_data(pods, evidence, after):
    pods.pages["v2"]["a/0"] = page(ok=9)
    evidence.look("1.0", "v2", "v1")
    pods.pages["v2"] = after

    assert evidence.look("1.0", "v2", "v1").canary is None


def test_pods_that_stay_away_stay_missing_while_they_have_a_share(pods, evidence):
    evidence.look("1.0", "v2", "v1")
    pods.pages["v2"] = {}

    found = [evidence.look("1.0", "v2", "v1").canary for _ in range(3)]

    assert found == [None, None, None]


def test_a_revision_without_a_share_may_have_no_pods(pods, evidence):
    pods.shares = {"v2": 100}
    pods.pages["v1"] = {}

    evidence.look("1.2", "v2", "v1")
    stable = evidence.look("1.2", "v2", "v1").stable

    assert (stable.requests, stable.server_errors, stable.p95_ms) == (0, 0, None)


def test_a_page_of_another_server_says_nothing():
    assert read("request_predict_seconds_count 3\n") is None
